"""Positions on a grid: some row and some column frequency functions, and a table of numbers between them.

A weight change is, in its rearranged order,

    latent (d, k) = Phi_d[:, rows] @ table (r1, r2) @ Phi_k[:, columns].T

with the orthonormal functions of `basis`. It is Eq. 3 with positions at (+-u, +-v) for the frequencies u of the rows
and v of the columns: with the cosine and the sine of both, four numbers of the table are the two complex coefficients
at (u, v) and (-u, v). So nothing of size d x k is ever made, and it is exactly a low-rank change.

Pure functions of torch tensors; nothing here knows about models.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .basis import fourier_functions, fourier_transform
from .rearrange import Rearrangement
from .spectrum import Sampling, count_numbers, draw_places

MAX_ALTERNATIONS = 8


class GridSize(NamedTuple):
    """Row functions r1, column functions r2, and how many of the table's r1 * r2 places are trained."""

    rows: int
    columns: int
    numbers: int

    @property
    def dense(self) -> bool:
        return self.numbers == self.rows * self.columns


@dataclass(frozen=True)
class Grid:
    """A layer's functions: `row_functions` (r1,) and `column_functions` (r2,), sorted int32; `places` (n,), the sorted
    flat places of the table that are trained, or None for all of them."""

    row_functions: torch.Tensor
    column_functions: torch.Tensor
    places: torch.Tensor | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name; without places where there are none."""
        found = {"row_functions": self.row_functions, "column_functions": self.column_functions}
        return found if self.places is None else {**found, "places": self.places}


def grid_size(n_frequency: int | float, shape: tuple[int, int], oversampling: int) -> GridSize:
    """The grid that a budget of `n_frequency` trainable numbers buys in a (d, k) layer.

    Without oversampling (1) all places of the largest nearly square table of at most that many are trained. Above, the
    table has `oversampling` times as many places as there are numbers (or all d * k). Raises ValueError when the budget
    buys nothing or is more than d * k.
    """
    d, k = shape
    numbers = count_numbers(n_frequency, shape)
    if oversampling == 1:
        rows = min(d, math.isqrt(numbers))
        columns = min(k, numbers // rows)
        rows = min(d, numbers // columns)
        return GridSize(rows, columns, rows * columns)
    places = min(numbers * oversampling, d * k)
    rows = min(d, max(1, round(math.sqrt(places))))
    columns = min(k, -(-places // rows))
    rows = min(d, -(-places // columns))
    return GridSize(rows, columns, numbers)


def choose_grid(
    size: GridSize,
    shape: tuple[int, int],
    *,
    sampling: Sampling,
    gamma: float,
    latent: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    name: str = "the layer",
) -> Grid:
    """Choose functions and places for a (d, k) layer.

    With `latent`, the rearranged prior (d, k), and sampling "power" or "top": the rows and columns of its spectrum that
    hold the most power together (each in turn, given the others, until nothing changes); places are drawn in proportion
    to amplitude^gamma (Eq. 7) for "power", the largest for "top". "low_frequency" takes the lowest frequencies, and
    places at random; "random" draws both uniformly.

    Warns, and takes low frequencies, for a prior of zeros. Raises ValueError for one that is not finite.
    """
    d, k = shape
    if sampling == "random":
        rows = torch.randperm(d, generator=generator)[: size.rows].sort().values
        columns = torch.randperm(k, generator=generator)[: size.columns].sort().values
    else:
        rows, columns = torch.arange(size.rows), torch.arange(size.columns)
    amplitude = torch.ones(size.rows, size.columns)
    if sampling in ("power", "top"):
        if latent is None:
            raise ValueError(f'sampling="{sampling}" needs the rearranged prior.')
        power = fourier_transform(fourier_transform(latent.detach().float(), 1), 0).square_().cpu()
        largest = float(power.max())
        if not math.isfinite(largest):
            raise ValueError(f"The prior of {name} has NaN or infinite entries.")
        if largest > 0:
            power.div_(largest)
            rows, columns = _strongest(power, size)
            amplitude = power[rows][:, columns].sqrt_()
        else:
            warnings.warn(f"The prior of {name} is zero: low frequencies are taken.", stacklevel=2)
    places = None
    if not size.dense:
        log_weight = amplitude.log_().mul_(gamma) if gamma else torch.where(amplitude > 0, 0.0, -math.inf)
        places = draw_places(log_weight.flatten(), size.numbers, sampling == "top", generator, name).int()
    return Grid(rows.int(), columns.int(), places)


def _strongest(power: torch.Tensor, size: GridSize) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and column numbers, sorted, of a sub-table of much power, by alternation from the strongest rows."""
    rows = power.sum(1).topk(size.rows).indices.sort().values
    columns = torch.empty(0, dtype=torch.long)
    for _ in range(MAX_ALTERNATIONS):
        before = rows, columns
        columns = power[rows].sum(0).topk(size.columns).indices.sort().values
        rows = power[:, columns].sum(1).topk(size.rows).indices.sort().values
        if torch.equal(rows, before[0]) and torch.equal(columns, before[1]):
            break
    return rows, columns


def row_matrix(
    functions: torch.Tensor, order: torch.Tensor, sign: torch.Tensor, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Functions (r,) in the weight's order and signs: (n, r), so that latent functions @ x become weight rows @ x."""
    values = fourier_functions(len(order), functions, dtype=dtype)
    return torch.empty_like(values).index_copy_(0, order.long(), values).mul_(sign.to(dtype)[:, None])


def full_table(coefficients: torch.Tensor, places: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor:
    """The table (rows, columns) of coefficients (rows, columns), or (n,) at flat `places` (n,); differentiable."""
    if places is None:
        return coefficients
    return coefficients.new_zeros(rows * columns).index_copy(0, places.long(), coefficients).view(rows, columns)


def as_lora(up: torch.Tensor, table: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B (d, r) and A (r, k) with B @ A = up (d, r1) @ table (r1, r2) @ down (r2, k); r = min(r1, r2)."""
    if len(table) < len(down):
        return up, table @ down
    return up @ table, down.contiguous()


def grid_factors(
    coefficients: torch.Tensor, grid: Grid, rearrangement: Rearrangement, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (d, r) and A (r, k) with B @ A the unscaled weight change, r = min(r1, r2): the change as a LoRA, exactly."""
    up = row_matrix(grid.row_functions, rearrangement.row_order, rearrangement.row_sign, dtype=dtype)
    down = row_matrix(grid.column_functions, rearrangement.column_order, rearrangement.column_sign, dtype=dtype).T
    table = full_table(coefficients.to(dtype), grid.places, len(grid.row_functions), len(grid.column_functions))
    return as_lora(up, table, down)


def grid_delta(
    coefficients: torch.Tensor, grid: Grid, rearrangement: Rearrangement, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The unscaled weight change (d, k), dense."""
    b, a = grid_factors(coefficients, grid, rearrangement, dtype)
    return b @ a
