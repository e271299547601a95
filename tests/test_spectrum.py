"""The spectrum against a plain float64 reference that builds every cosine and sine from the equations."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ft_diffusion.tuner.rearrange import Rearrangement, find_rearrangement
from s2ft_diffusion.tuner.spectrum import (
    count_positions,
    delta_weight,
    distinct_positions,
    sample_positions,
)

SHAPES = [(6, 8), (5, 7), (8, 5), (5, 8), (1, 4), (4, 1), (1, 1), (2, 2), (7, 6)]


def reference(coefficients, positions, rearrangement: Rearrangement, shape, norm) -> torch.Tensor:
    """Eq. 3 by hand: Re(sum F e^{i theta}), then every entry put where the orders and signs say."""
    d, k = shape
    latent = torch.zeros(d, k, dtype=torch.float64)
    p, q = torch.arange(d).double()[:, None], torch.arange(k).double()[None, :]
    for i, (u, v) in enumerate(positions.tolist()):
        theta = 2 * math.pi * (u * p / d + v * q / k)
        if coefficients.ndim == 1:
            latent += coefficients[i] * theta.cos()
        else:
            latent += coefficients[i, 0] * theta.cos() - coefficients[i, 1] * theta.sin()
    latent /= d * k if norm == "backward" else math.sqrt(d * k)
    weight = torch.zeros(d, k, dtype=torch.float64)
    for i in range(d):
        for j in range(k):
            row, column = int(rearrangement.row_order[i]), int(rearrangement.column_order[j])
            sign = int(rearrangement.row_sign[row]) * int(rearrangement.column_sign[column])
            weight[row, column] = sign * latent[i, j]
    return weight


def some_rearrangement(shape, seed=0) -> Rearrangement:
    generator = torch.Generator().manual_seed(seed)
    prior = torch.randn(shape, generator=generator)
    return find_rearrangement(prior, distance="cosine", signs=True, refine="2opt", generator=generator)


@pytest.mark.parametrize("norm", ["ortho", "backward"])
@pytest.mark.parametrize("kind", ["complex", "real"])
@pytest.mark.parametrize("shape", SHAPES)
def test_delta_equals_the_equations_at_every_position(shape, kind, norm) -> None:
    count = distinct_positions(shape, kind)  # all: axes, Nyquist and self-conjugate points included
    positions = sample_positions(count, shape, kind=kind, sampling="random")
    coefficients = torch.randn((count,) if kind == "real" else (count, 2), dtype=torch.float64)
    rearrangement = some_rearrangement(shape)
    delta = delta_weight(coefficients, positions, rearrangement, norm)
    torch.testing.assert_close(delta, reference(coefficients, positions, rearrangement, shape, norm))


@pytest.mark.parametrize("norm", ["ortho", "backward"])
@pytest.mark.parametrize("kind", ["complex", "real"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, kind, norm) -> None:
    count = distinct_positions(shape, kind)
    positions = sample_positions(count, shape, kind=kind, sampling="random")
    size = (count,) if kind == "real" else (count, 2)
    coefficients = torch.randn(size, dtype=torch.float64, requires_grad=True)
    rearrangement = some_rearrangement(shape)
    assert torch.autograd.gradcheck(lambda c: delta_weight(c, positions, rearrangement, norm), coefficients)


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 12),
    k=st.integers(1, 12),
    kind=st.sampled_from(["complex", "real"]),
    norm=st.sampled_from(["ortho", "backward"]),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_count(d, k, kind, norm, share, seed) -> None:
    shape, generator = (d, k), torch.Generator().manual_seed(seed)
    count = max(1, int(share * distinct_positions(shape, kind)))
    positions = sample_positions(count, shape, kind=kind, sampling="random", generator=generator)
    coefficients = torch.randn((count,) if kind == "real" else (count, 2), dtype=torch.float64, generator=generator)
    rearrangement = some_rearrangement(shape, seed)
    delta = delta_weight(coefficients, positions, rearrangement, norm)
    torch.testing.assert_close(delta, reference(coefficients, positions, rearrangement, shape, norm))
    torch.testing.assert_close(
        rearrangement.apply_columns(rearrangement.scatter_rows(rearrangement.invert(delta))), delta, rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_complex_positions_have_no_mirrors_and_span_everything(shape) -> None:
    d, k = shape
    positions = sample_positions(distinct_positions(shape, "complex"), shape, kind="complex", sampling="random")
    taken = {tuple(p) for p in positions.tolist()}
    mirrors = {((-u) % d, (-v) % k) for u, v in taken}
    assert len(taken) == len(positions)
    assert taken | mirrors == {(u, v) for u in range(d) for v in range(k)}
    assert all((-u % d, -v % k) == (u, v) for u, v in taken & mirrors)


def test_positions_are_sorted_distinct_and_repeatable() -> None:
    options = {"kind": "complex", "sampling": "power", "latent": torch.randn(30, 41)}
    draws = [sample_positions(200, (30, 41), generator=torch.Generator().manual_seed(s), **options) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    flat = draws[0][:, 0] * 41 + draws[0][:, 1]
    assert bool((flat.diff() > 0).all())


def test_power_sampling_follows_the_spectrum() -> None:
    """Draws of one position land in proportion to |DFT|^gamma."""
    latent = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(4, 5)
    for _ in range(4000):
        u, v = sample_positions(
            1, (4, 5), kind="real", sampling="power", gamma=1.5, latent=latent, generator=generator
        )[0].tolist()
        counts[u, v] += 1
    expected = torch.fft.fft2(latent).abs() ** 1.5
    expected = expected / expected.sum()
    assert (counts / 4000 - expected).abs().max() < 4 * (expected * (1 - expected) / 4000).sqrt().max()


@pytest.mark.parametrize("shape", [(30, 41), (30, 40), (31, 41)])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_top_takes_the_largest_once(kind, shape) -> None:
    """Planted frequencies are found, whichever of a mirrored pair they were planted at, and no mirror is taken."""
    d, k = shape
    chosen = sample_positions(12, shape, kind=kind, sampling="random", generator=torch.Generator().manual_seed(1))
    size = (len(chosen), 2) if kind == "complex" else (len(chosen),)
    latent = delta_weight(10 + torch.rand(size), chosen, Rearrangement.identity(*shape), "ortho")
    latent = latent + 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = sample_positions(13 * len(chosen), shape, kind=kind, sampling="top", latent=latent).tolist()
    pairs = {frozenset({(u, v), (-u % d, -v % k)}) for u, v in found}
    assert len(pairs) == len(found) == 13 * len(chosen)
    assert {frozenset({(u, v), (-u % d, -v % k)}) for u, v in chosen.tolist()} <= pairs
    again = sample_positions(13 * len(chosen), shape, kind=kind, sampling="top", latent=latent)
    assert again.tolist() == found  # nothing is drawn


def test_top_prefers_neighbourhoods_to_lone_bins() -> None:
    """Of two equal amplitudes, the one among large ones: a lone bin is more likely to be noise."""
    spectrum = torch.zeros(32, 17, dtype=torch.complex64)
    spectrum[4:7, 4:7] = 1.0
    spectrum[20, 10] = 1.0
    latent = torch.fft.irfft2(spectrum, s=(32, 32))
    found = sample_positions(9, (32, 32), kind="complex", sampling="top", latent=latent).tolist()
    assert [5, 5] in found
    assert [20, 10] not in found


def test_top_fills_both_halves_of_the_plane_where_it_must() -> None:
    latent = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert len(sample_positions(60, (8, 8), kind="real", sampling="top", latent=latent).unique(dim=0)) == 60


def test_low_frequency_sampling_prefers_low_frequencies() -> None:
    positions = sample_positions(300, (64, 64), kind="real", sampling="low_frequency").float() / 64
    radius = torch.minimum(positions, 1 - positions).norm(dim=1)
    assert radius.median() < 0.2


def test_too_few_nonzero_frequencies_are_filled_with_a_warning() -> None:
    latent = torch.cos(2 * math.pi * torch.arange(16) / 16)[:, None].expand(16, 8)
    with pytest.warns(UserWarning, match=r"layer\.x has 1 nonzero"):
        positions = sample_positions(20, (16, 8), kind="complex", sampling="power", latent=latent, name="layer.x")
    assert [1, 0] in positions.tolist()
    assert len(positions.unique(dim=0)) == 20
    with pytest.warns(UserWarning, match="0 nonzero"):
        sample_positions(20, (16, 8), kind="complex", sampling="power", latent=torch.zeros(16, 8))


def test_nan_prior_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"blocks\.3"):
        sample_positions(2, (4, 4), kind="real", sampling="power", latent=torch.full((4, 4), math.nan), name="blocks.3")


def test_budget() -> None:
    assert count_positions(8000, (320, 320), "complex") == 4000
    assert count_positions(8001, (320, 320), "complex") == 4000
    assert count_positions(8000, (320, 320), "real") == 8000
    assert count_positions(0.02, (100, 50), "real") == 100
    with pytest.raises(ValueError, match="4x4"):
        count_positions(17, (4, 4), "real")
    with pytest.raises(ValueError, match="buys no"):
        count_positions(1, (4, 4), "complex")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_positions(20, (4, 4), "complex") == 10


def test_reduces_to_fourierft() -> None:
    """Identity order, real coefficients, the same positions: PEFT's own FourierFT makes the same delta weight."""
    from peft import FourierFTConfig, get_peft_model

    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(24, 31)),
        FourierFTConfig(target_modules=["0"], n_frequency=90, scaling=7.0, init_weights=False),
    )
    layer = model.base_model.model[0]
    theirs = layer.get_delta_weight("default")
    ours = 7.0 * delta_weight(
        layer.fourierft_spectrum["default"],
        layer.indices["default"].T,
        Rearrangement.identity(31, 24),
        "backward",
    )
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
