"""The sparse spectrum: coefficients to delta weight and back (S2FT, Eqs. 1-3), and where they sit (Eq. 7).

Pure functions of torch tensors; nothing here knows about models.

A matrix of shape (d, k) has spectrum positions (u, v), 0 <= u < d, 0 <= v < k. Two kinds of coefficients:

* "real", the paper's: one real number c at any position of the full plane. It makes c * cos(2 pi (up/d + vq/k)).
* "complex": a pair (a, b) at a position of one half-plane. It makes a * cos(...) - b * sin(...): a free phase. Because
  the real part is taken, (u, v) and its mirror (-u mod d, -v mod k) make the same functions, so only one of the two is
  ever a position. At a point that is its own mirror the sine vanishes and `b` has no effect.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from .rearrange import Rearrangement

CoefficientKind = Literal["complex", "real"]
Norm = Literal["backward", "ortho"]
Sampling = Literal["power", "top", "low_frequency", "random"]

LOW_FREQUENCY_WIDTH = 0.1  # standard deviation of the "low_frequency" density, in cycles per row or column
_ADJOINT_NORM = {"backward": "forward", "ortho": "ortho"}


@dataclass(frozen=True)
class SpectrumIndex:
    """Where coefficients go in the half spectrum (d, k // 2 + 1) of a real inverse transform.

    `columns` (w,) are those of the half spectrum that hold any; places count in a (d, w) matrix of them alone.
    `gather` (m,) is each coefficient's own place; `scatter` (m + r,) repeats those whose conjugate is in the half
    spectrum too (columns 0 and k / 2), `source` (m + r,) says which coefficient each entry takes and `weight`
    (m + r, 2) the factors of its real and imaginary part. `phase` (m,) is -1 where the half spectrum holds the mirror.
    """

    shape: tuple[int, int]
    columns: torch.Tensor
    gather: torch.Tensor
    phase: torch.Tensor
    scatter: torch.Tensor
    source: torch.Tensor
    weight: torch.Tensor


def index_dtype(shape: tuple[int, int]) -> torch.dtype:
    """The narrowest type for positions and orders of a (d, k) matrix: an adapter is held in memory with many others."""
    return torch.int16 if max(shape) <= torch.iinfo(torch.int16).max else torch.int32


def half_plane(positions: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows u and columns v (m,) of the half plane v <= k / 2 for `positions` (m, 2), and which of them are mirrors.

    A mirrored position makes the same functions, with the sine negated.
    """
    d, k = shape
    u, v = positions.long().unbind(1)
    mirrored = v >= k // 2 + 1
    return torch.where(mirrored, -u % d, u), torch.where(mirrored, k - v, v), mirrored


def index_spectrum(positions: torch.Tensor, shape: tuple[int, int]) -> SpectrumIndex:
    """Prepare `positions` (m, 2) of a (d, k) spectrum for `delta_weight`."""
    d, k = shape
    u, v, mirrored = half_plane(positions, shape)
    phase = torch.where(mirrored, -1.0, 1.0)
    # A traced graph needs sizes that do not depend on data: there, all columns take part, and below all coefficients.
    traced = torch.compiler.is_compiling()
    columns, place = (torch.arange(k // 2 + 1, device=v.device), v) if traced else v.unique(return_inverse=True)
    width = len(columns)
    gather = u * width + place
    # In columns 0 and k/2 the half spectrum holds both conjugates, and the inverse transform wants them both.
    in_both = (v == 0) | (2 * v == k)
    everything = torch.arange(len(u), device=positions.device)
    doubled = everything if traced else everything[in_both]  # where all take part, the others with weight 0
    conjugate = (-u[doubled] % d) * width + place[doubled]
    own = torch.stack([torch.full_like(phase, 0.5), 0.5 * phase], dim=1)
    other = own[doubled] * in_both[doubled, None] * torch.tensor([1.0, -1.0], device=positions.device)
    return SpectrumIndex(
        shape=shape,
        columns=columns,
        gather=gather,
        phase=phase,
        scatter=torch.cat([gather, conjugate]),
        source=torch.cat([everything, doubled]),
        weight=torch.cat([own, other]),
    )


def delta_norm(coefficients: torch.Tensor, positions: torch.Tensor, shape: tuple[int, int], norm: Norm) -> float:
    """The Frobenius norm of the weight change, from its spectrum (Parseval)."""
    d, k = shape
    index = index_spectrum(positions, shape)
    pairs = coefficients if coefficients.ndim == 2 else torch.stack([coefficients, torch.zeros_like(coefficients)], 1)
    places, inverse = index.scatter.unique(return_inverse=True)
    half = torch.zeros(len(places), 2, dtype=torch.float64)
    half.index_add_(0, inverse, (pairs[index.source] * index.weight).double())
    column = index.columns[places % len(index.columns)]
    twice = torch.where((column == 0) | (2 * column == k), 1.0, 2.0)
    energy = float((half.square().sum(1) * twice).sum())
    return math.sqrt(energy if norm == "ortho" else energy / (d * k))


class _InverseTransform(torch.autograd.Function):
    """T(Re(IDFT2(F))), keeping no dense tensor for the backward pass: the adjoint is a transform of the gradient."""

    @staticmethod
    def forward(ctx, coefficients, index: SpectrumIndex, rearrangement: Rearrangement, norm: Norm):
        ctx.index, ctx.rearrangement, ctx.norm, ctx.real = index, rearrangement, norm, coefficients.ndim == 1
        d, k = index.shape
        width = len(index.columns)
        pairs = coefficients.unsqueeze(1) * coefficients.new_tensor([1.0, 0.0]) if ctx.real else coefficients
        half = coefficients.new_zeros(d * width, 2)
        half.index_add_(0, index.scatter, pairs[index.source] * index.weight.to(pairs.dtype))
        # One dimension after the other: the first needs no columns that are zero, and rows are moved in between, where
        # there is least to move.
        spectrum = torch.fft.ifft(torch.view_as_complex(half).view(d, width), dim=0, norm=norm)
        spectrum = rearrangement.scatter_rows(spectrum)
        if width < k // 2 + 1:
            spectrum = spectrum.new_zeros(d, k // 2 + 1).index_copy_(1, index.columns, spectrum)
        return rearrangement.apply_columns(torch.fft.irfft(spectrum, n=k, dim=1, norm=norm))

    @staticmethod
    def backward(ctx, grad):
        index, rearrangement, adjoint = ctx.index, ctx.rearrangement, _ADJOINT_NORM[ctx.norm]
        spectrum = torch.fft.rfft(rearrangement.invert_columns(grad), dim=1, norm=adjoint)
        if len(index.columns) < spectrum.shape[1]:
            spectrum = spectrum.index_select(1, index.columns)
        spectrum = torch.fft.fft(rearrangement.gather_rows(spectrum), dim=0, norm=adjoint)
        spectrum = spectrum.flatten()[index.gather]
        if ctx.real:
            return spectrum.real.contiguous(), None, None, None
        phase = index.phase.to(grad.dtype)
        return torch.stack([spectrum.real, spectrum.imag * phase], dim=1), None, None, None


def delta_weight(
    coefficients: torch.Tensor, index: SpectrumIndex, rearrangement: Rearrangement, norm: Norm
) -> torch.Tensor:
    """The unscaled weight change T(Re(IDFT2(F))) of Eq. 3, shape (d, k), differentiable in the coefficients.

    `coefficients` has shape (m,) for "real" and (m, 2) for "complex", in float32 or float64. Made by the inverse real
    transform of F's Hermitian part, which equals Re(IDFT2(F)) at half the arithmetic.
    """
    return _InverseTransform.apply(coefficients, index, rearrangement, norm)


def distinct_positions(shape: tuple[int, int], kind: CoefficientKind) -> int:
    """How many positions a (d, k) spectrum offers to coefficients of a kind."""
    d, k = shape
    if kind == "real":
        return d * k
    self_conjugate = (2 - d % 2) * (2 - k % 2)
    return (d * k + self_conjugate) // 2


def count_positions(n_frequency: int | float, shape: tuple[int, int], kind: CoefficientKind) -> int:
    """Positions that a budget of `n_frequency` real trainable numbers buys in a (d, k) layer.

    An int counts numbers, a float below 1 is a share of d * k. A complex position costs two numbers, also at the (at
    most four) points that are their own mirrors, where the second has no effect; an odd remainder is left unused.
    Raises ValueError when the layer has too few positions or the budget buys none.
    """
    d, k = shape
    numbers = round(n_frequency * d * k) if isinstance(n_frequency, float) else n_frequency
    positions = numbers // 2 if kind == "complex" else numbers
    available = distinct_positions(shape, kind)
    if positions < 1:
        raise ValueError(f"n_frequency={n_frequency} buys no {kind} coefficient in a {d}x{k} layer.")
    if positions > available:
        most = 2 * available if kind == "complex" else available
        raise ValueError(
            f"n_frequency={n_frequency} is more than the {most} numbers that a {d}x{k} layer has room for."
        )
    return positions


def sample_positions(
    count: int,
    shape: tuple[int, int],
    *,
    kind: CoefficientKind,
    sampling: Sampling,
    gamma: float = 1.5,
    latent: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    name: str = "the layer",
) -> torch.Tensor:
    """Draw `count` distinct positions (count, 2), int32, sorted, without replacement.

    "power" draws in proportion to |DFT2(latent)|^gamma (Eq. 7), `latent` being the rearranged prior (d, k); "top" takes
    the largest amplitudes, one of each mirrored pair, for "real" those that a cosine reaches (the real part's), their
    squares averaged with those around them: an estimate's noise differs from bin to bin, a smooth matrix's power less;
    "low_frequency" in proportion to a Gaussian of the distance from frequency zero; "random" uniformly. Drawing is an
    exponential race (Gumbel top-k) with a CPU `generator`: `torch.multinomial` stops at 2^24 categories.

    Positions that "power" gives no probability are drawn uniformly where the others don't suffice, with a warning.
    Raises ValueError for a latent that is not finite. `name` says in messages whose positions these are.
    """
    d, k = shape
    u = torch.arange(d)[:, None]
    half = kind == "complex" or (sampling == "top" and count <= distinct_positions(shape, "complex"))
    v = torch.arange(k // 2 + 1 if half else k)
    if sampling in ("power", "top"):
        if latent is None:
            raise ValueError(f'sampling="{sampling}" needs the rearranged prior.')
        averaged = sampling == "top" and half
        amplitude = _averaged_amplitude(latent, kind) if averaged else _amplitude(latent, half=half)
        if not torch.isfinite(amplitude).all():
            raise ValueError(f"The prior of {name} has NaN or infinite entries.")
        log_weight = amplitude.log_().mul_(gamma) if gamma else torch.where(amplitude > 0, 0.0, -math.inf)
    elif sampling == "low_frequency":
        distance = (torch.minimum(u, d - u) / d).square() + (torch.minimum(v, k - v) / k).square()
        log_weight = -distance / (2 * LOW_FREQUENCY_WIDTH**2)
    else:
        log_weight = torch.zeros(len(u), len(v))
    if half:  # in columns that are their own mirrors, half of the places mirror the other half
        taken = torch.zeros(log_weight.shape, dtype=torch.bool)
        taken[d // 2 + 1 :, [0, *([k // 2] if k % 2 == 0 else [])]] = True
        log_weight[taken] = -math.inf
    possible = int(torch.isfinite(log_weight).sum())
    if sampling == "top" and possible >= count:
        race = log_weight
    else:
        race = -torch.empty(log_weight.shape).exponential_(generator=generator).log_()
        if possible >= count:
            race += log_weight
        else:
            warnings.warn(
                f"The prior of {name} has {possible} nonzero spectrum positions, {count} are wanted: "
                "the rest is drawn uniformly.",
                stacklevel=2,
            )
            race = torch.where(torch.isfinite(log_weight), race + 1e4, race)  # those with a probability come first
        if half:
            race[taken] = -math.inf
    chosen = torch.topk(race.flatten(), count, sorted=False).indices.sort().values
    return torch.stack([chosen // len(v), chosen % len(v)], dim=1).int()


def _amplitude(latent: torch.Tensor, *, half: bool) -> torch.Tensor:
    """|DFT2(latent)| in float32, relative to the largest, of the half plane (d, k // 2 + 1) or, of the full one (d, k);
    rounding noise counts as zero."""
    latent = latent.detach().to("cpu", torch.float32)
    return _relative((torch.fft.rfft2(latent) if half else torch.fft.fft2(latent)).abs())


def _averaged_amplitude(latent: torch.Tensor, kind: CoefficientKind) -> torch.Tensor:
    """What coefficients of a kind reach at each position of the half plane (d, k // 2 + 1), the squares averaged with
    their neighbours' by the binomial weights 1, 2, 1 in each direction; relative to the largest."""
    latent = latent.detach().to("cpu", torch.float32)
    spectrum = torch.fft.rfft2(latent)
    power = (spectrum.real if kind == "real" else spectrum.abs()).square()
    power = 0.5 * power + 0.25 * (power.roll(1, 0) + power.roll(-1, 0))
    beyond = power[:, -2 if latent.shape[1] % 2 == 0 else -1]  # its mirror is the first column of the other half
    left, right = (column.flip(0).roll(1, 0)[:, None] for column in (power[:, 1 % power.shape[1]], beyond))
    around = torch.cat([left, power[:, :-1]], dim=1) + torch.cat([power[:, 1:], right], dim=1)
    return _relative((0.5 * power + 0.25 * around).sqrt_())


def _relative(amplitude: torch.Tensor) -> torch.Tensor:
    largest = float(amplitude.max())
    if largest == 0.0 or not math.isfinite(largest):
        return amplitude
    return torch.nn.functional.threshold(amplitude.div_(largest), 1e-6, 0.0)
