"""What positions reach of a weight change, with known answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("open_clip")

from eval import energy
from eval.constructions import constructions
from s2ft_diffusion.tuner.rearrange import Rearrangement, find_rearrangement
from s2ft_diffusion.tuner.spectrum import delta_weight, sample_positions

SHAPES = [(12, 15), (12, 16), (13, 15), (13, 16)]


def change(kind: str, shape: tuple[int, int], count: int = 9) -> tuple[torch.Tensor, torch.Tensor, Rearrangement]:
    """A weight change made of known positions under a known rearrangement."""
    generator = torch.Generator().manual_seed(0)
    positions = sample_positions(count, shape, kind=kind, sampling="random", generator=generator)
    size = (count, 2) if kind == "complex" else (count,)
    rearrangement = find_rearrangement(torch.randn(shape, generator=generator), signs=True, generator=generator)
    weight = delta_weight(torch.randn(size, generator=generator), positions, rearrangement, "ortho")
    return weight, positions, rearrangement


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_positions_reach_what_was_made_at_them(kind, shape) -> None:
    weight, positions, rearrangement = change(kind, shape)
    assert energy.share_reached(weight, positions, rearrangement, kind) == pytest.approx(1.0, abs=1e-6)
    assert energy.share_reached(weight, positions[:4], rearrangement, kind) < 0.9
    mirrored = torch.stack([-positions[:, 0] % shape[0], -positions[:, 1] % shape[1]], dim=1)
    assert energy.share_reached(weight, mirrored, rearrangement, kind) == pytest.approx(1.0, abs=1e-6)
    both = torch.cat([positions, mirrored])  # a mirror reaches nothing further
    assert energy.share_reached(weight, both, rearrangement, kind) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_reached_is_a_least_squares_fit(shape) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for kind in ("real", "complex"):
        positions = sample_positions(8, shape, kind=kind, sampling="random", generator=torch.Generator().manual_seed(4))
        identity = Rearrangement.identity(*shape)
        columns = 2 if kind == "complex" else 1
        basis = []
        for unit in torch.eye(8 * columns, dtype=torch.float64):
            coefficients = unit.view(8, 2) if kind == "complex" else unit
            basis.append(delta_weight(coefficients, positions, identity, "ortho").flatten())
        matrix = torch.stack(basis, dim=1)
        fit = matrix @ torch.linalg.lstsq(matrix, weight.flatten(), driver="gelsd").solution
        expected = float(fit.square().sum() / weight.square().sum())
        assert energy.share_reached(weight, positions, identity, kind) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_it_is_there(shape) -> None:
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert float(energy.cosine_energy(latent, "complex").sum()) == pytest.approx(1.0)
    symmetric = (latent + latent.roll((-1, -1), (0, 1)).flip(0, 1)) / 2  # f(p, q) = f(-p, -q): cosines alone
    assert float(energy.cosine_energy(symmetric, "real").sum()) == pytest.approx(1.0)
    assert 0.3 < float(energy.cosine_energy(latent, "real").sum()) < 0.7
    errors = energy.reconstruction_error(latent, torch.tensor([0.0, 0.1, 1.1]), "complex")
    assert errors[0] == pytest.approx(1.0)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(0.0, abs=1e-4)
    power = energy.radial_power(latent, 10)
    assert float(power.sum()) == pytest.approx(1.0)
    flat = energy.radial_power(torch.ones(shape), 10)
    assert flat[0] == pytest.approx(1.0)


def test_the_objective_falls_when_rows_and_columns_are_in_order() -> None:
    smooth = torch.sin(torch.linspace(0, 3, 20))[:, None] * torch.linspace(-1, 1, 24)
    shuffled = smooth[torch.randperm(20)][:, torch.randperm(24)]
    order = find_rearrangement(shuffled, refine="2opt")
    for squared in (False, True):
        assert energy.objective(order.invert(shuffled), squared=squared) < 0.7 * energy.objective(
            shuffled, squared=squared
        )


def test_amplitudes_of_a_single_wave() -> None:
    wave = torch.cos(2 * torch.pi * torch.arange(16) / 16)[:, None].expand(16, 16)
    quantiles = energy.amplitude_quantiles(wave, torch.tensor([0.0, 0.5, 1.0]))
    assert quantiles[1] == pytest.approx(0.0, abs=1e-5)
    assert quantiles[2] == pytest.approx((256 / 2) ** 0.5, rel=1e-5)  # two of 256 bins hold it all


def test_constructions_go_from_the_paper_to_the_default() -> None:
    from s2ft_diffusion import S2FTConfig

    built = {c.name: c.config for c in constructions()}
    assert built["paper: nearest neighbour, real"] == S2FTConfig.from_preset("paper")
    free = S2FTConfig.from_preset("default", positions="free")
    assert built["+ γ = 2"] == free
    assert replace(built["+ prior of 48 steps of full fine-tuning"], gamma=2.0) == free
    assert built["default: on a grid"] == S2FTConfig.from_preset("default")
