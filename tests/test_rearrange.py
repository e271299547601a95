"""The rearrangement against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from s2ft_diffusion.tuner.rearrange import (
    Rearrangement,
    chain_signs,
    distance_table,
    find_rearrangement,
    nearest_neighbor_order,
    pairwise_inner_products,
    path_length,
    two_opt,
)


def brute_distance(a, b, distance, signs) -> float:
    def one(x, y):
        if distance == "euclidean":
            return float((x - y).norm())
        return float(1 - x @ y / (x.norm() * y.norm()))

    return min(one(a, b), one(a, -b)) if signs else one(a, b)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("shape", [(6, 4), (9, 9), (5, 12), (1, 3)])
def test_greedy_order_equals_brute_force(shape, distance, signs) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
    for start in range(len(matrix)):
        expected, left = [start], set(range(len(matrix))) - {start}
        while left:
            last = matrix[expected[-1]]
            expected.append(min(left, key=lambda j: brute_distance(last, matrix[j], distance, signs)))
            left.remove(expected[-1])
        table = distance_table(pairwise_inner_products(matrix, distance), distance, signs)
        assert nearest_neighbor_order(table, start).tolist() == expected


def length(table, order) -> float:
    return float(table[order[:-1], order[1:]].sum())


def test_two_opt_finds_what_no_reversal_improves() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 7, 12):
        points = rng.normal(size=(count, 2))
        table = np.linalg.norm(points[:, None] - points[None], axis=-1)
        start = rng.permutation(count)
        order = two_opt(table, start, max_sweeps=1000)
        assert sorted(order) == list(range(count))
        assert length(table, order) <= length(table, start) + 1e-12
        for i, j in itertools.combinations(range(count), 2):
            other = order.copy()
            other[i : j + 1] = other[i : j + 1][::-1]
            assert length(table, other) >= length(table, order) - 1e-9


def test_two_opt_shortens_a_greedy_path() -> None:
    matrix = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = distance_table(pairwise_inner_products(matrix, "euclidean"), "euclidean", False)
    greedy = nearest_neighbor_order(table, 0)
    assert length(table, two_opt(table, greedy)) < 0.97 * length(table, greedy)


def test_signs_turn_neighbours_towards_each_other() -> None:
    matrix = torch.randn(20, 3, dtype=torch.float64)
    similarity = pairwise_inner_products(matrix, "cosine")
    order = nearest_neighbor_order(distance_table(similarity, "cosine", True), 0)
    turned = matrix[order] * torch.from_numpy(chain_signs(similarity[order[:-1], order[1:]], order))[order][:, None]
    assert bool(((turned[1:] * turned[:-1]).sum(1) >= 0).all())


def test_recovers_a_shuffled_and_negated_smooth_matrix() -> None:
    """The point of it all: a smooth matrix, shuffled and with signs flipped, becomes smooth again."""
    grid = torch.linspace(0, 1, 40, dtype=torch.float64)
    smooth = torch.cos(2.5 * grid[:, None] + 1.5 * grid[None, :] + 0.3) + 2
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(40, generator=generator), torch.randperm(40, generator=generator)
    flips = torch.randint(0, 2, (40,), generator=generator) * 2 - 1
    shuffled = smooth[rows][:, columns] * flips[:, None]
    found = find_rearrangement(shuffled, distance="cosine", signs=True, refine="2opt", generator=generator)
    latent = found.invert(shuffled)
    assert path_length(latent) < 0.1 * path_length(shuffled)
    assert path_length(latent.T) < 0.2 * path_length(shuffled.T)

    def concentration(matrix: torch.Tensor) -> float:
        spectrum = torch.fft.fft2(matrix).abs().square().flatten()
        return float(spectrum.topk(8).values.sum() / spectrum.sum())

    assert concentration(latent) > 0.98 * concentration(smooth)
    assert 1 - concentration(latent) < 0.2 * (1 - concentration(shuffled))


def test_inverse_is_exact() -> None:
    matrix = torch.randn(13, 8)
    found = find_rearrangement(matrix, signs=True, distance="cosine")
    assert torch.equal(found.apply(found.invert(matrix)), matrix)
    assert torch.equal(found.invert(found.apply(matrix)), matrix)
    latent = found.invert(matrix)
    signs = found.row_sign[:, None] * found.column_sign[None, :]
    rows, columns = found.row_order.long(), found.column_order.long()
    assert torch.equal((matrix * signs)[rows][:, columns], latent)
    identity = Rearrangement.identity(13, 8)
    assert torch.equal(identity.apply(matrix), matrix)


def test_paper_choice_has_no_signs_and_is_repeatable() -> None:
    matrix = torch.randn(10, 6)
    orders = [find_rearrangement(matrix, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert bool((orders[0].row_sign == 1).all())
    assert bool((orders[0].column_sign == 1).all())
    assert torch.equal(orders[0].row_order, orders[1].row_order)


def test_bad_priors() -> None:
    with pytest.raises(ValueError, match="NaN"):
        find_rearrangement(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="matrix"):
        find_rearrangement(torch.zeros(3))
    zero = find_rearrangement(torch.zeros(4, 3), distance="cosine", signs=True, refine="2opt")
    assert sorted(zero.row_order.tolist()) == [0, 1, 2, 3]


def test_objective_in_both_forms() -> None:
    matrix = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    assert path_length(matrix) == pytest.approx(5.0)
    assert path_length(matrix, squared=True) == pytest.approx(25.0)
