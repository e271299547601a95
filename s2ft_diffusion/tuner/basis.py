"""The frequency functions of a grid: the real, orthonormal Fourier basis of n points.

Pure functions of torch tensors; nothing here knows about models. Function 0 is the constant, 2u - 1 the cosine and 2u
the sine of frequency u (cycles per n points), and for even n function n - 1 is the Nyquist frequency's alternation.
"""

from __future__ import annotations

import math

import torch


def fourier_functions(
    n: int, functions: torch.Tensor, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> torch.Tensor:
    """The functions with numbers `functions` (r,) at all n points: (n, r), with orthonormal columns.

    Computed in float64 (float32 on devices without it) from a table of one period, so that equal functions are equal to
    the bit wherever they are made.
    """
    device = functions.device if device is None else torch.device(device)
    exact = torch.float32 if device.type == "mps" else torch.float64
    functions = functions.to(device, torch.int64)
    frequency = (functions + 1) // 2
    angle = torch.arange(n, device=device, dtype=exact) * (2 * math.pi / n)
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    period = torch.cat([torch.cos(angle), torch.sin(angle)]).to(wide)
    # An integer phase is exact, where a large angle itself would be rounded.
    phase = (torch.arange(n, device=device)[:, None] * frequency).remainder_(n)
    phase += n * ((functions > 0) & (functions % 2 == 0))
    single = (functions == 0) | (2 * frequency == n)  # the constant and the alternation
    norm = torch.full(single.shape, math.sqrt(2 / n), dtype=exact, device=device)
    norm = norm.masked_fill_(single, math.sqrt(1 / n)).to(wide)
    return period.index_select(0, phase.flatten()).view(phase.shape).mul_(norm).to(dtype)


def fourier_transform(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """The coefficients of a real matrix's lines along `dim` in the basis: same shape and dtype."""
    n = matrix.shape[dim]
    lines = matrix.movedim(dim, -1)
    half = torch.fft.rfft(lines, norm="ortho")
    result = torch.empty_like(lines, memory_format=torch.contiguous_format)
    result[..., 0] = half[..., 0].real
    pairs = (n - 1) // 2
    result[..., 1 : 2 * pairs : 2] = half[..., 1 : pairs + 1].real * math.sqrt(2)
    result[..., 2 : 2 * pairs + 1 : 2] = half[..., 1 : pairs + 1].imag * -math.sqrt(2)
    if n % 2 == 0:
        result[..., n - 1] = half[..., n // 2].real
    return result.movedim(-1, dim)
