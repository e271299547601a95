"""Activations times a sparse-spectrum weight change, taken in the spectrum: the dense weight change is never made.

With x of shape (tokens, k), the product x @ delta.T is a transform of x along k, a sparse product with the
coefficients, and a transform back along d. It costs in proportion to tokens * (d + k) where the dense change costs in
proportion to d * k, forwards and backwards, and keeps nothing but x for the backward pass: the better way wherever a
large layer sees few tokens.

Pure functions of torch tensors; nothing here knows about models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .rearrange import Rearrangement
from .spectrum import Norm, half_plane, transform_scale


def prefers_spectrum(tokens: int, positions: int, shape: tuple[int, int], device: str = "cpu") -> bool:
    """Whether the product in the spectrum is expected to be faster than making a (d, k) weight change.

    Fitted to CPU times of layers of 64 to 1,280 rows with 16 to 4,096 tokens: forwards and backwards a token costs some
    15 ns for each row and column and an eighth of that for each position, the dense change 7 ns an element, and the
    calls 0.2 ms more. On a GPU, where calls are what small layers cost and products are fast, only the largest layers
    gain: a bound with room, from an H100's times before transforms had fewer operators.
    """
    d, k = shape
    if device == "cuda":
        return 5 * tokens * (d + k) + 15_000_000 < d * k
    return tokens * (d + k + positions / 8) + 15_000 < 0.45 * d * k


@dataclass(frozen=True)
class SparseFactor:
    """The coefficients as a sparse matrix, compressed by rows: `columns` (e,) and `offsets` (rows + 1,).

    Entry i is number `source[i]` of the flat coefficients as they are stored, times `factor[i]`.
    """

    columns: torch.Tensor
    offsets: torch.Tensor
    source: torch.Tensor
    factor: torch.Tensor

    def times(self, table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The sparse matrix of flat coefficients `numbers` times a dense `table`."""
        values = numbers.index_select(0, self.source) * self.factor.to(numbers.dtype)
        return F.embedding_bag(
            self.columns, table, self.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )


@dataclass(frozen=True)
class ProductIndex:
    """What `spectral_product` needs of positions, rearrangement and normalisation.

    With X the transform of the rearranged inputs, the outputs' transform is the sum of (a - ib) X over the
    coefficients (a, b). `forward` multiplies X and -iX, stacked, by a and b; `adjoint` the outputs' gradient G and iG.
    """

    shape: tuple[int, int]
    forward: SparseFactor
    adjoint: SparseFactor
    rearrangement: Rearrangement


def index_product(positions: torch.Tensor, rearrangement: Rearrangement, norm: Norm, *, real: bool) -> ProductIndex:
    """Prepare `positions` (m, 2) for `spectral_product`; `real` says of which kind the coefficients are."""
    d, k = shape = len(rearrangement.row_order), len(rearrangement.column_order)
    half = k // 2 + 1
    u, v, mirrored = half_plane(positions, shape)
    factor = torch.full((len(u), 1 if real else 2), transform_scale(shape, norm), device=u.device)
    factor[:, 1:] *= torch.where(mirrored, -1.0, 1.0)[:, None]
    # The inverse real transform counts every column twice but these.
    once = torch.where((v == 0) | (2 * v == k), 1.0, 0.5)[:, None]
    return ProductIndex(shape, _compress(u, v, d, half, factor), _compress(v, u, half, d, factor * once), rearrangement)


def _compress(rows: torch.Tensor, columns: torch.Tensor, height: int, width: int, factor: torch.Tensor) -> SparseFactor:
    order = torch.argsort(rows, stable=True)
    parts = factor.shape[1]
    part = torch.arange(parts, device=rows.device)
    ends = torch.bincount(rows, minlength=height).cumsum(0) * parts
    return SparseFactor(
        columns=(columns[order, None] + width * part).flatten(),
        offsets=torch.cat([ends.new_zeros(1), ends]),
        source=(order[:, None] * parts + part).flatten(),
        factor=factor[order].flatten(),
    )


class _SpectralProduct(torch.autograd.Function):
    """All in columns: one token is one column of every matrix."""

    @staticmethod
    def forward(ctx, x, coefficients, index: ProductIndex):
        ctx.save_for_backward(x, coefficients)
        ctx.index = index
        found = index.forward.times(_input_table(x, coefficients, index), coefficients.flatten())
        latent = torch.fft.fft(_as_complex(found), dim=0).real
        return index.rearrangement.scatter_rows(latent).contiguous().T

    @staticmethod
    def backward(ctx, grad):
        x, coefficients = ctx.saved_tensors
        index = ctx.index
        latent = index.rearrangement.gather_rows(grad.to(coefficients.dtype).T)
        transform = torch.fft.ifft(latent, dim=0, norm="forward")
        grad_x = grad_coefficients = None
        if ctx.needs_input_grad[0]:
            table = _as_real(transform if coefficients.ndim == 1 else torch.cat([transform, transform * 1j]))
            spectrum = _as_complex(index.adjoint.times(table, coefficients.flatten()))
            latent = torch.fft.irfft(spectrum, n=index.shape[1], dim=0, norm="forward")
            grad_x = index.rearrangement.scatter_columns(latent).T.to(x.dtype)
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                numbers = coefficients.detach().flatten().requires_grad_()
                output = index.forward.times(_input_table(x, coefficients, index), numbers)
            (found,) = torch.autograd.grad(output, numbers, _as_real(transform))
            grad_coefficients = found.view_as(coefficients)
        return grad_x, grad_coefficients, None


def _input_table(x: torch.Tensor, coefficients: torch.Tensor, index: ProductIndex) -> torch.Tensor:
    spectrum = torch.fft.rfft(index.rearrangement.gather_columns(x.to(coefficients.dtype).T), dim=0)
    return _as_real(spectrum if coefficients.ndim == 1 else torch.cat([spectrum, spectrum * -1j]))


def _as_real(spectrum: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(spectrum.resolve_conj()).flatten(1)


def _as_complex(table: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(table.view(len(table), -1, 2))


def spectral_product(x: torch.Tensor, coefficients: torch.Tensor, index: ProductIndex) -> torch.Tensor:
    """x @ delta_weight(coefficients, ...).T, differentiable in both; x is (..., k), the result (..., d).

    `coefficients` has shape (m,) or (m, 2), in float32 or float64, and the result has their type.
    """
    found = _SpectralProduct.apply(x.reshape(-1, x.shape[-1]), coefficients, index)
    return found.view(*x.shape[:-1], index.shape[0])
