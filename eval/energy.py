"""How much of a weight change a sparse spectrum reaches: pure functions of matrices (d, k) and positions (m, 2).

Energies are shares of a matrix's squared Frobenius norm, by Parseval.
"""

from __future__ import annotations

import torch

from s2ft_diffusion.tuner.basis import fourier_transform
from s2ft_diffusion.tuner.grid import Grid
from s2ft_diffusion.tuner.rearrange import Rearrangement, path_length
from s2ft_diffusion.tuner.spectrum import CoefficientKind, half_plane


def cosine_energy(latent: torch.Tensor, kind: CoefficientKind) -> torch.Tensor:
    """The share of energy (d, k // 2 + 1) that each position of the half plane reaches, 0 at a mirror's second place.

    A complex coefficient reaches the whole of its frequency, a real one what is in phase with a cosine.
    """
    d, k = latent.shape
    spectrum = torch.fft.rfft2(latent.double())
    energy = spectrum.real.square() if kind == "real" else spectrum.real.square() + spectrum.imag.square()
    rows, columns = torch.arange(d)[:, None], torch.arange(k // 2 + 1)
    in_mirror_column = (columns == 0) | (2 * columns == k)
    own_mirror = in_mirror_column & ((rows == 0) | (2 * rows == d))
    energy = torch.where(own_mirror, energy, 2 * energy)
    energy = torch.where(in_mirror_column & (2 * rows > d), 0.0, energy)
    return energy / (d * k * latent.double().square().sum())


def share_reached(
    weight: torch.Tensor, positions: torch.Tensor, rearrangement: Rearrangement, kind: CoefficientKind
) -> float:
    """The share of a weight change's energy that coefficients at `positions` can reach at all, best chosen."""
    latent = rearrangement.invert(weight)
    rows, columns, _ = half_plane(positions, tuple(latent.shape))
    mirrored = (columns == 0) | (2 * columns == latent.shape[1])
    rows = torch.where(mirrored, torch.minimum(rows, -rows % latent.shape[0]), rows)
    places = (rows * (latent.shape[1] // 2 + 1) + columns).unique()
    return float(cosine_energy(latent, kind).flatten()[places].sum())


def share_on_grid(weight: torch.Tensor, grid: Grid, rearrangement: Rearrangement) -> float:
    """The share of a weight change's energy that the trained places of a grid can reach, best chosen."""
    latent = rearrangement.invert(weight).double()
    table = fourier_transform(fourier_transform(latent, 0), 1)[grid.row_functions.long()][
        :, grid.column_functions.long()
    ]
    found = table.flatten() if grid.places is None else table.flatten()[grid.places.long()]
    return float(found.square().sum() / latent.square().sum())


def reconstruction_error(latent: torch.Tensor, shares: torch.Tensor, kind: CoefficientKind) -> torch.Tensor:
    """The relative error (n,) of a matrix made again from its largest coefficients, for `shares` (n,) of d * k numbers.

    A complex coefficient counts as two numbers (the paper's Figure 6 counts it as one).
    """
    energy = cosine_energy(latent, kind).flatten().sort(descending=True).values.cumsum(0)
    cost = 2 if kind == "complex" else 1
    counts = (shares * latent.numel() / cost).long().clamp(0, len(energy))
    kept = torch.cat([torch.zeros(1, dtype=energy.dtype), energy])[counts]
    return (1.0 - kept).clamp_min(0.0).sqrt().float()


def radial_power(latent: torch.Tensor, bins: int) -> torch.Tensor:
    """The share of energy (bins,) by distance from frequency zero, from 0 to the corner (0.5, 0.5) of the plane."""
    d, k = latent.shape
    power = torch.fft.fft2(latent.double()).abs().square()
    radius = torch.sqrt(torch.fft.fftfreq(d)[:, None] ** 2 + torch.fft.fftfreq(k) ** 2) / 0.5**0.5
    place = (radius * bins).long().clamp_max(bins - 1).flatten()
    found = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, power.flatten())
    return (found / power.sum()).float()


def amplitude_quantiles(latent: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Quantiles (n,) of the spectrum's amplitudes, relative to their root mean square."""
    amplitude = torch.fft.fft2(latent.double()).abs().flatten()
    ordered = (amplitude / amplitude.square().mean().sqrt()).sort().values
    return ordered[(quantiles.double() * (len(ordered) - 1)).round().long()].float()


def objective(latent: torch.Tensor, *, squared: bool = False) -> float:
    """Eq. 5 of a matrix in its present order, rows and columns together, relative to its norm (squared: its square)."""
    norm = float(latent.double().norm()) ** (2 if squared else 1)
    return (path_length(latent, squared=squared) + path_length(latent.T, squared=squared)) / norm
