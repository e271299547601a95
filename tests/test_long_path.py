"""Paths through many rows, against tables of all distances."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from s2ft_diffusion.tuner import long_path, rearrange
from s2ft_diffusion.tuner.long_path import (
    Sketch,
    greedy_fragments,
    nearest_walk,
    short_path,
    shorten,
    sketch_rows_and_columns,
    walk,
)
from s2ft_diffusion.tuner.rearrange import (
    distance_table,
    find_rearrangement,
    nearest_neighbor_order,
    pairwise_inner_products,
    path_length,
    two_opt,
)

KINDS = [("cosine", True), ("cosine", False), ("euclidean", True), ("euclidean", False)]


def structured(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Like a prior: directions of falling weight, and noise."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, 257) ** -0.7
    left, right = torch.randn(rows, 256, generator=generator), torch.randn(256, columns, generator=generator)
    return (left * weights) @ right + 0.3 * torch.randn(rows, columns, generator=generator)


def table_of(matrix: torch.Tensor, distance: str, signs: bool) -> np.ndarray:
    return distance_table(pairwise_inner_products(matrix, distance), distance, signs)


def sketch_of(matrix: torch.Tensor, distance: str, signs: bool) -> Sketch:
    generator = torch.Generator().manual_seed(0)
    return sketch_rows_and_columns(matrix, cosine=distance == "cosine", signs=signs, generator=generator)[0]


@pytest.mark.parametrize(("distance", "signs"), KINDS)
@pytest.mark.parametrize("rows", [2, 7, 45, 200])
def test_a_narrow_matrix_is_sketched_whole(rows, distance, signs) -> None:
    """Then distances, and who is nearest, are those of the table; also over several blocks."""
    matrix = structured(rows, 20)
    table, sketch = table_of(matrix, distance, signs), sketch_of(matrix, distance, signs)
    near, distances = sketch.nearest(5)
    np.fill_diagonal(table, np.inf)
    expected = np.sort(table, axis=1)[:, : min(5, rows - 1)]
    np.testing.assert_allclose(distances, expected, atol=2e-3)
    np.testing.assert_allclose(np.take_along_axis(table, near, 1), expected, atol=2e-3)
    if rows > 40:
        order = nearest_walk(sketch, 3)
        steps = table[order[:-1], order[1:]]
        assert order[0] == 3
        assert steps[0] == pytest.approx(table[3].min(), abs=2e-3)
        assert steps.sum() == pytest.approx(table_walk(table, 3), rel=0.02)  # some steps are as long as others


def table_walk(table: np.ndarray, start: int) -> float:
    order = nearest_neighbor_order(table, start)
    return float(table[order[:-1], order[1:]].sum())


def test_blocks_make_no_difference(monkeypatch) -> None:
    sketch = sketch_of(structured(300, 20), "cosine", True)
    expected = sketch.nearest(8)
    monkeypatch.setattr(long_path, "BLOCK_ROWS", 70)
    monkeypatch.setattr(long_path, "PIECE_COLUMNS", 90)
    monkeypatch.setattr(long_path, "PAIRS", 7)
    for found, before in zip(sketch.nearest(8), expected, strict=True):
        np.testing.assert_allclose(found, before, atol=1e-6)


@pytest.mark.parametrize(("distance", "signs"), KINDS)
@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(70, 5),
        torch.ones(70, 5),
        torch.eye(80)[:, :30],
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        structured(500, 3),
        structured(90, 400),
    ],
)
def test_every_row_comes_once(matrix, distance, signs) -> None:
    sketch = sketch_of(matrix, distance, signs)
    for order in (short_path(sketch, 1), nearest_walk(sketch, 1)):
        assert sorted(order.tolist()) == list(range(len(matrix)))
    fragments = greedy_fragments(*sketch.nearest(4))
    assert sorted(np.concatenate(fragments).tolist()) == list(range(len(matrix)))


def test_fragments_take_the_shortest_steps() -> None:
    near = np.array([[1, 2], [0, 2], [1, 0], [2, 1]])
    distances = np.array([[1.0, 3.0], [1.0, 2.0], [2.0, 3.0], [4.0, 5.0]])
    assert [fragment.tolist() for fragment in greedy_fragments(near, distances)] == [[0, 1, 2, 3]]


def test_two_opt_never_makes_a_path_longer() -> None:
    sketch = sketch_of(structured(400, 30), "cosine", True)
    near, distances = sketch.nearest(8)
    order = np.random.default_rng(0).permutation(400)
    shorter = shorten(sketch, order, near, distances)
    assert sorted(shorter.tolist()) == list(range(400))

    def length(order: np.ndarray) -> float:
        return float(sketch.distance(order[:-1], order[1:]).sum())

    assert length(shorter) < 0.8 * length(order)
    walked = walk(sketch, greedy_fragments(near, distances), 0)
    assert length(shorten(sketch, walked, near, distances)) <= length(walked)


def test_a_path_is_as_short_as_from_a_table() -> None:
    """At most 3 % longer, of 1,280 rows, by the distances of whole rows."""
    matrix = structured(1280, 1280)
    table = table_of(matrix, "cosine", True)
    exact = two_opt(table, nearest_neighbor_order(table, 0))
    found = short_path(sketch_of(matrix, "cosine", True), 0)
    assert table[found[:-1], found[1:]].sum() < 1.03 * table[exact[:-1], exact[1:]].sum()


@pytest.mark.parametrize("columns", [True, False])
def test_large_matrices_take_this_way(monkeypatch, columns) -> None:
    """A smooth matrix, shuffled and with signs flipped, becomes smooth again; the same generator, the same orders."""
    grid = torch.linspace(0, 1, 150)
    smooth = torch.cos(2.5 * grid[:, None] + 1.5 * grid[None, :70] + 0.3) + 2
    generator = torch.Generator().manual_seed(0)
    flips = torch.randint(0, 2, (150,), generator=generator) * 2 - 1
    shuffled = smooth[torch.randperm(150, generator=generator)][:, torch.randperm(70, generator=generator)]
    shuffled = shuffled * flips[:, None]
    monkeypatch.setattr(rearrange, "EXACT_ROWS", 100)
    options = {"distance": "cosine", "signs": True, "refine": "2opt", "columns": columns}
    found, again = (find_rearrangement(shuffled, **options, generator=generator.manual_seed(1)) for _ in range(2))
    assert torch.equal(found.row_order, again.row_order)
    assert torch.equal(found.row_sign, again.row_sign)
    assert path_length(found.invert(shuffled)) < 0.1 * path_length(shuffled)
    assert torch.equal(found.apply_columns(found.scatter_rows(found.invert(shuffled))), shuffled)
    assert (found.column_order.tolist() == list(range(70))) != columns


def test_no_table_is_made() -> None:
    """The peak is a small part of what distances of all pairs would take."""
    matrix = torch.randn(2500, 8)
    tracemalloc.start()
    short_path(sketch_of(matrix, "cosine", True), 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2500 * 2500 * 4 / 4  # and PyTorch's blocks have `BLOCK_ROWS`
