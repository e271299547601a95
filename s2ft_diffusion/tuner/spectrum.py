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
MOST_COLUMNS = 0.75  # of the half spectrum; above, leaving out those that hold nothing does not pay


@dataclass(frozen=True)
class SpectrumIndex:
    """What `inverse_transform` needs of positions, rearrangement and normalisation.

    Coefficients go into the half spectrum of a real inverse transform, stored column by column: (w, d), of the
    `columns` (w,) that hold any, or of all k // 2 + 1 where nearly all do (None). Numbers are counted flat, a complex
    one as two: entry i of the spectrum's `scatter` (e,) takes coefficient number `source[i]` times `factor[i]`, more
    than once for those whose conjugate is in the half spectrum too (columns 0 and k / 2). `gather` (numbers,) is each
    coefficient's own place, and its gradient what is found there times `phase`. `scale` is the norm's.
    """

    shape: tuple[int, int]
    rearrangement: Rearrangement
    columns: torch.Tensor | None
    scatter: torch.Tensor
    source: torch.Tensor
    factor: torch.Tensor
    gather: torch.Tensor
    phase: torch.Tensor
    scale: float

    @property
    def width(self) -> int:
        return self.shape[1] // 2 + 1 if self.columns is None else len(self.columns)


def half_plane(positions: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows u and columns v (m,) of the half plane v <= k / 2 for `positions` (m, 2), and which of them are mirrors.

    A mirrored position makes the same functions, with the sine negated.
    """
    d, k = shape
    u, v = positions.long().unbind(1)
    mirrored = v >= k // 2 + 1
    return torch.where(mirrored, -u % d, u), torch.where(mirrored, k - v, v), mirrored


def transform_scale(shape: tuple[int, int], norm: Norm) -> float:
    """What an inverse transform of a (d, k) spectrum multiplies by."""
    d, k = shape
    return (d * k) ** -0.5 if norm == "ortho" else 1.0 / (d * k)


def index_spectrum(positions: torch.Tensor, rearrangement: Rearrangement, norm: Norm, *, real: bool) -> SpectrumIndex:
    """Prepare `positions` (m, 2) for `inverse_transform`; `real` says of which kind the coefficients are."""
    d, k = shape = len(rearrangement.row_order), len(rearrangement.column_order)
    u, v, mirrored = half_plane(positions, shape)
    # A traced graph needs sizes that do not depend on data: there, all columns take part, and below all coefficients.
    traced = torch.compiler.is_compiling()
    columns, place = (None, v) if traced else v.unique(return_inverse=True)
    if columns is not None and len(columns) > MOST_COLUMNS * (k // 2 + 1):
        columns, place = None, v
    # In columns 0 and k/2 the half spectrum holds both conjugates, and the inverse transform wants them both.
    in_both = (v == 0) | (2 * v == k)
    everything = torch.arange(len(u), device=positions.device)
    doubled = everything if traced else everything[in_both]  # where all take part, the others with factor 0
    scatter = torch.cat([place * d + u, place[doubled] * d + -u[doubled] % d])
    source = torch.cat([everything, doubled])
    sign = torch.where(mirrored, -1.0, 1.0)
    own = torch.stack([torch.ones_like(sign), sign], dim=1)
    other = own[doubled] * in_both[doubled, None] * torch.tensor([1.0, -1.0], device=positions.device)
    part = torch.arange(1 if real else 2, device=positions.device)
    return SpectrumIndex(
        shape=shape,
        rearrangement=rearrangement,
        columns=columns,
        scatter=(2 * scatter[:, None] + part).flatten(),
        source=(len(part) * source[:, None] + part).flatten(),
        factor=(0.5 * torch.cat([own, other])[:, part]).flatten(),
        gather=(2 * (place * d + u)[:, None] + part).flatten(),
        phase=own[:, part].flatten(),
        scale=transform_scale(shape, norm),
    )


def delta_norm(coefficients: torch.Tensor, positions: torch.Tensor, shape: tuple[int, int], norm: Norm) -> float:
    """The Frobenius norm of the weight change, from its spectrum (Parseval)."""
    d, k = shape
    index = index_spectrum(positions, Rearrangement.identity(d, k), norm, real=coefficients.ndim == 1)
    places, inverse = index.scatter.unique(return_inverse=True)
    half = torch.zeros(len(places), dtype=torch.float64)
    values = coefficients.flatten()[index.source].double() * index.factor
    half.index_add_(0, inverse, values, alpha=index.scale)
    column = places // (2 * d)
    column = column if index.columns is None else index.columns[column]
    twice = torch.where((column == 0) | (2 * column == k), 1.0, 2.0)
    return math.sqrt(float((half.square() * twice).sum()) * d * k)


def transform(coefficients: torch.Tensor, index: SpectrumIndex, dtype: torch.dtype) -> torch.Tensor:
    """The (d, k) weight change of coefficients, in `dtype`: `inverse_transform` without a gradient.

    A small layer's time is that of calling its operators, so there are as few as can be; a large one's is that of
    passing over its elements, so what can be done in the precision that is asked for is.
    """
    d, k = index.shape
    values = coefficients.reshape(-1).index_select(0, index.source).mul_(index.factor)
    half = coefficients.new_zeros(2 * index.width * d).index_add_(0, index.scatter, values, alpha=index.scale)
    # One dimension after the other: the first needs no columns that are zero, and rows are moved in between, where
    # there is least to move.
    spectrum = torch.fft.ifft(torch.view_as_complex(half.view(-1, d, 2)), dim=1, norm="forward").T
    spectrum = index.rearrangement.scatter_rows(spectrum)
    if index.columns is not None:
        spectrum = spectrum.new_zeros(d, k // 2 + 1).index_copy_(1, index.columns, spectrum)
    latent = torch.fft.irfft(spectrum, n=k, dim=1, norm="forward")
    return index.rearrangement.apply_columns(latent.to(dtype))


def adjoint_transform(grad: torch.Tensor, index: SpectrumIndex, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of coefficients, flat and in their `dtype`, from that of their weight change (d, k)."""
    latent = index.rearrangement.invert_columns(grad).to(dtype)
    spectrum = torch.fft.rfft(latent, dim=1)
    if index.columns is not None:
        spectrum = spectrum.index_select(1, index.columns)
    spectrum = torch.fft.fft(index.rearrangement.gather_rows(spectrum), dim=0)
    found = torch.view_as_real(spectrum.T.contiguous()).view(-1).index_select(0, index.gather)
    return found.mul_(index.phase).mul_(index.scale)


class _InverseTransform(torch.autograd.Function):
    """Keeps no dense tensor for the backward pass: the adjoint is a transform of the gradient."""

    @staticmethod
    def forward(ctx, coefficients, index: SpectrumIndex, dtype: torch.dtype):
        ctx.index, ctx.shape, ctx.dtype = index, coefficients.shape, coefficients.dtype
        return transform(coefficients, index, dtype)

    @staticmethod
    def backward(ctx, grad):
        return adjoint_transform(grad, ctx.index, ctx.dtype).view(ctx.shape), None, None


def inverse_transform(
    coefficients: torch.Tensor, index: SpectrumIndex, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The unscaled weight change T(Re(IDFT2(F))) of Eq. 3, shape (d, k), differentiable in the coefficients.

    `coefficients` has shape (m,) for "real" and (m, 2) for "complex", in float32 or float64; the weight change has
    `dtype`, or theirs. Made by the inverse real transform of F's Hermitian part, which equals Re(IDFT2(F)) at half the
    arithmetic.
    """
    return _InverseTransform.apply(coefficients, index, dtype or coefficients.dtype)


def delta_weight(
    coefficients: torch.Tensor, positions: torch.Tensor, rearrangement: Rearrangement, norm: Norm
) -> torch.Tensor:
    """`inverse_transform` of coefficients (m,) or (m, 2) at `positions` (m, 2), for those who need it once."""
    return inverse_transform(coefficients, index_spectrum(positions, rearrangement, norm, real=coefficients.ndim == 1))


def distinct_positions(shape: tuple[int, int], kind: CoefficientKind) -> int:
    """How many positions a (d, k) spectrum offers to coefficients of a kind."""
    d, k = shape
    if kind == "real":
        return d * k
    self_conjugate = (2 - d % 2) * (2 - k % 2)
    return (d * k + self_conjugate) // 2


def count_numbers(n_frequency: int | float, shape: tuple[int, int], *, least: int = 1, most: int | None = None) -> int:
    """The real trainable numbers that `n_frequency` means in a (d, k) layer: itself, or a share below 1 of d * k.

    Raises ValueError for fewer than `least` and for more than `most` (d * k).
    """
    d, k = shape
    most = d * k if most is None else most
    numbers = round(n_frequency * d * k) if isinstance(n_frequency, float) else n_frequency
    if numbers < least:
        raise ValueError(f"n_frequency={n_frequency} buys no coefficient in a {d}x{k} layer.")
    if numbers > most:
        raise ValueError(f"n_frequency={n_frequency} is more than the {most} numbers of a {d}x{k} layer.")
    return numbers


def count_positions(n_frequency: int | float, shape: tuple[int, int], kind: CoefficientKind) -> int:
    """Positions that a budget of `n_frequency` real trainable numbers buys in a (d, k) layer.

    An int counts numbers, a float below 1 is a share of d * k. A complex position costs two numbers, also at the (at
    most four) points that are their own mirrors, where the second has no effect; an odd remainder is left unused.
    Raises ValueError when the layer has too few positions or the budget buys none.
    """
    cost = 2 if kind == "complex" else 1
    return count_numbers(n_frequency, shape, least=cost, most=cost * distinct_positions(shape, kind)) // cost


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
        # A side of a few entries has its lowest frequencies further apart: 1 / n cycles.
        across, along = (max(LOW_FREQUENCY_WIDTH, 1 / n) for n in shape)
        distance = (torch.minimum(u, d - u) / (d * across)).square() + (torch.minimum(v, k - v) / (k * along)).square()
        log_weight = -distance / 2
    else:
        log_weight = torch.zeros(len(u), len(v))
    if half:  # in columns that are their own mirrors, half of the places mirror the other half
        taken = torch.zeros(log_weight.shape, dtype=torch.bool)
        taken[d // 2 + 1 :, [0, *([k // 2] if k % 2 == 0 else [])]] = True
        log_weight[taken] = -math.inf
    chosen = draw_places(log_weight, count, sampling == "top", generator, name, taken if half else None)
    return torch.stack([chosen // len(v), chosen % len(v)], dim=1).int()


def draw_places(
    log_weight: torch.Tensor,
    count: int,
    largest: bool,
    generator: torch.Generator | None,
    name: str,
    excluded: torch.Tensor | None = None,
) -> torch.Tensor:
    """`count` distinct flat places of a table of log weights, sorted: drawn by an exponential race, or the `largest`.

    Places of weight 0 (-inf) are drawn uniformly where the others don't suffice, with a warning; those `excluded`
    never.
    """
    possible = int(torch.isfinite(log_weight).sum())
    if largest and possible >= count:
        race = log_weight
    else:
        race = -torch.empty(log_weight.shape).exponential_(generator=generator).log_()
        if possible >= count:
            race += log_weight
        else:
            warnings.warn(
                f"The prior of {name} has {possible} nonzero spectrum positions, {count} are wanted: "
                "the rest is drawn uniformly.",
                stacklevel=3,
            )
            race = torch.where(torch.isfinite(log_weight), race + 1e4, race)  # those with a probability come first
        if excluded is not None:
            race[excluded] = -math.inf
    return torch.topk(race.flatten(), count, sorted=False).indices.sort().values


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
