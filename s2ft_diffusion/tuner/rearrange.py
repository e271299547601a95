"""The rearrangement: an order and signs of rows and columns under which a weight change is smooth (S2FT, Sec. 3.2.2).

Pure functions of torch tensors; nothing here knows about models.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from .long_path import nearest_walk, short_path, sketch_rows_and_columns

Distance = Literal["euclidean", "cosine"]

ORDERS = ("row_order", "column_order")
SIGNS = ("row_sign", "column_sign")

MAX_2OPT_SWEEPS = 8
# Above, paths come from sketches (`long_path`): tables of all distances would take too long, or too much memory. The
# walk alone takes less, and the widest models in the paper have 4,096 rows.
EXACT_ROWS, EXACT_WALK_ROWS = 2048, 4096


@dataclass(frozen=True)
class Rearrangement:
    """The invertible transformation T of Eq. 3, between a latent matrix and a weight change of shape (d, k).

    `row_order` (d,) and `column_order` (k,) are permutations, `row_sign` (d,) and `column_sign` (k,) hold +1 or -1:

        weight[row_order, :][:, column_order] == row_sign[row_order][:, None] * column_sign[column_order] * latent

    The paper has all signs +1.
    """

    row_order: torch.Tensor
    column_order: torch.Tensor
    row_sign: torch.Tensor
    column_sign: torch.Tensor

    @classmethod
    def identity(cls, rows: int, columns: int, device: torch.device | str | None = None) -> Rearrangement:
        """The transformation that changes nothing."""
        return cls(
            torch.arange(rows, device=device, dtype=torch.int32),
            torch.arange(columns, device=device, dtype=torch.int32),
            torch.ones(rows, device=device, dtype=torch.int8),
            torch.ones(columns, device=device, dtype=torch.int8),
        )

    def apply(self, latent: torch.Tensor) -> torch.Tensor:
        """T: a latent matrix (d, k) to the weight change (d, k). Where nothing is moved, the very tensor."""
        return self.apply_columns(self.scatter_rows(latent))

    def invert(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of T: a weight change (d, k) to the latent matrix (d, k). Exact: values are moved and negated."""
        return self.gather_rows(self.invert_columns(weight))

    # Half of it, along the last dimension.

    def apply_columns(self, latent: torch.Tensor) -> torch.Tensor:
        """The columns of a matrix (n, k) from the latent order to the weight's."""
        return self._columns().to_weight(latent, 1)

    def invert_columns(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse, and adjoint, of `apply_columns`."""
        return self._columns().to_latent(weight, 1)

    # And along the first.

    def gather_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows of a matrix (d, n) from the weight's order to the latent one."""
        return self._rows().to_latent(weight, 0)

    def scatter_rows(self, latent: torch.Tensor) -> torch.Tensor:
        """The inverse, and adjoint, of `gather_rows`."""
        return self._rows().to_weight(latent, 0)

    # A cached property cannot be traced, its function can.

    def _rows(self) -> _Axis:
        return self._find_rows() if torch.compiler.is_compiling() else self._known_rows

    def _columns(self) -> _Axis:
        return self._find_columns() if torch.compiler.is_compiling() else self._known_columns

    def _find_rows(self) -> _Axis:
        return _Axis.of(self.row_order, self.row_sign)

    def _find_columns(self) -> _Axis:
        return _Axis.of(self.column_order, self.column_sign)

    _known_rows = cached_property(_find_rows)
    _known_columns = cached_property(_find_columns)


@dataclass(frozen=True)
class _Axis:
    """One dimension's order and signs in the forms that moving takes: a training step moves every layer's four times.

    `order` and `place` (n,) are the permutation and its inverse, `weight_sign` and `latent_sign` (n,) the signs of what
    arrives in either order. None where there is nothing to do.
    """

    order: torch.Tensor | None
    place: torch.Tensor | None
    weight_sign: torch.Tensor | None
    latent_sign: torch.Tensor | None

    @classmethod
    def of(cls, order: torch.Tensor, sign: torch.Tensor) -> _Axis:
        order, sign = order.long(), sign.clone()  # their own memory, wherever a module's buffers are moved meanwhile
        place = torch.argsort(order)
        latent_sign = sign[order]
        if not torch.compiler.is_compiling():  # what a traced graph does cannot depend on data
            if torch.equal(place, torch.arange(len(place), device=place.device)):
                order = place = None
            if not bool((sign < 0).any()):
                sign = latent_sign = None
        return cls(order, place, sign, latent_sign)

    def to_weight(self, matrix: torch.Tensor, dim: int) -> torch.Tensor:
        return _move(matrix, self.place, self.weight_sign, dim)

    def to_latent(self, matrix: torch.Tensor, dim: int) -> torch.Tensor:
        return _move(matrix, self.order, self.latent_sign, dim)


def _move(matrix: torch.Tensor, order: torch.Tensor | None, sign: torch.Tensor | None, dim: int) -> torch.Tensor:
    """A matrix with its rows (dim 0) or columns (dim 1) reordered, then negated; itself where there is neither."""
    if order is not None:
        # Along the last dimension `gather` does what index_select does in two thirds of its time on a CPU.
        moved = matrix.index_select(0, order) if dim == 0 else matrix.gather(1, order.expand(len(matrix), -1))
    else:
        moved = matrix
    if sign is None:
        return moved
    sign = sign if dim == 1 else sign[:, None]
    return moved * sign if moved is matrix else moved.mul_(sign)


def find_rearrangement(
    prior: torch.Tensor,
    *,
    distance: Distance = "euclidean",
    signs: bool = False,
    refine: Literal["2opt"] | None = None,
    columns: bool = True,
    generator: torch.Generator | None = None,
) -> Rearrangement:
    """Search the row and the column order of a prior (d, k), each by itself (Alg. 1).

    Without `columns`, columns stay as they are. A column distance does not change when rows are permuted or negated, so
    the two searches are independent. Up to `EXACT_ROWS` rows the search knows all distances; above, those of sketches
    (`long_path`), whose products are made on the prior's device.
    `generator` (a CPU generator) draws the two starting points. Raises ValueError for a prior that is not finite.
    """
    if prior.ndim != 2:
        raise ValueError(f"A prior must be a matrix, got shape {tuple(prior.shape)}.")
    if not all(map(math.isfinite, torch.aminmax(prior))):  # in one pass, without a matrix of booleans
        raise ValueError("The prior has NaN or infinite entries.")
    prior = prior.detach().float()
    found, sketches = [], None
    for axis in range(2 if columns else 1):
        count = prior.shape[axis]
        start = int(torch.randint(count, (), generator=generator))
        if count <= (EXACT_ROWS if refine == "2opt" else EXACT_WALK_ROWS):
            matrix = prior.cpu()
            similarity = pairwise_inner_products(matrix if axis == 0 else matrix.T, distance)
            table = distance_table(similarity, distance, signs)
            order = nearest_neighbor_order(table, start)
            if refine == "2opt":
                order = two_opt(table, order)
            sign = chain_signs(similarity[order[:-1], order[1:]], order) if signs else np.ones(count, dtype=np.int8)
        else:
            if sketches is None:
                sketches = sketch_rows_and_columns(prior, cosine=distance == "cosine", signs=signs, generator=generator)
            sketch = sketches[axis]
            order = short_path(sketch, start) if refine == "2opt" else nearest_walk(sketch, start)
            steps = sketch.similarity(order[:-1], order[1:])
            sign = chain_signs(steps, order) if signs else np.ones(count, dtype=np.int8)
        found.append((torch.from_numpy(order.astype(np.int32)), torch.from_numpy(sign)))
    if not columns:
        identity = Rearrangement.identity(*prior.shape)
        found.append((identity.column_order, identity.column_sign))
    (row_order, row_sign), (column_order, column_sign) = found
    return Rearrangement(row_order, column_order, row_sign, column_sign)


def pairwise_inner_products(matrix: torch.Tensor, distance: Distance) -> np.ndarray:
    """Inner products of all pairs of rows (n, n); of rows scaled to length one for the cosine distance."""
    if distance == "cosine":
        norm = matrix.norm(dim=1, keepdim=True)
        matrix = torch.where(norm > 0, matrix / norm.clamp_min(torch.finfo(matrix.dtype).tiny), matrix)
    return (matrix @ matrix.T).numpy()


def distance_table(similarity: np.ndarray, distance: Distance, signs: bool) -> np.ndarray:
    """Distances beta_ij of Eq. 5 from inner products (n, n); with `signs`, the nearer of row j and its negative."""
    if signs:
        similarity = np.abs(similarity)
    if distance == "cosine":
        return 1.0 - similarity
    squared = np.diag(similarity)
    return np.sqrt(np.maximum(squared[:, None] + squared[None, :] - 2.0 * similarity, 0.0))


def nearest_neighbor_order(table: np.ndarray, start: int) -> np.ndarray:
    """The greedy walk of Alg. 1 over a table of distances (n, n): always on to the nearest unvisited index."""
    count = len(table)
    order = np.empty(count, dtype=np.int64)
    unvisited = np.zeros(count)
    current = start
    for position in range(count):
        order[position] = current
        unvisited[current] = np.inf
        if position + 1 < count:
            current = int(np.argmin(table[current] + unvisited))
    return order


def two_opt(table: np.ndarray, order: np.ndarray, max_sweeps: int = MAX_2OPT_SWEEPS) -> np.ndarray:
    """Shorten an open path by reversing segments until no reversal helps, or for `max_sweeps` sweeps (Croes, 1958).

    The path's length never grows. `table` is a symmetric table of distances (n, n). The path is closed by a point that
    is at no distance from all others, so that its ends are steps like any other. A sweep looks at every step, and
    again at those that a reversal has made.
    """
    count = len(order)
    if count < 3:
        return order.copy()
    closed = np.zeros((count + 1, count + 1), dtype=table.dtype)
    closed[1:, 1:] = table
    tolerance = 16 * np.finfo(table.dtype).eps * max(1.0, float(table.max()))
    tour = np.concatenate([[0], order + 1]).astype(np.intp)
    following = np.roll(tour, -1)
    place = np.argsort(tour)
    step = closed[tour, following]
    for _ in range(max_sweeps):
        improved = False
        pending = deque(tour.tolist())
        while pending:
            i = int(place[pending.popleft()])
            # Steps (i, i + 1) and (j, j + 1) become (i, j) and (i + 1, j + 1), with what lies between reversed.
            gain = step - closed[tour[i]].take(tour)
            gain -= closed[following[i]].take(following)
            gain[i] = -np.inf
            j = int(gain.argmax())
            if gain[j] + step[i] <= tolerance:
                continue
            i, j = min(i, j), max(i, j)
            tour[i + 1 : j + 1] = tour[i + 1 : j + 1][::-1].copy()
            following[i:j] = tour[i + 1 : j + 1]
            following[j] = tour[(j + 1) % len(tour)]
            place[tour[i + 1 : j + 1]] = np.arange(i + 1, j + 1)
            step[i + 1 : j] = step[i + 1 : j][::-1].copy()
            step[i], step[j] = closed[tour[i], following[i]], closed[tour[j], following[j]]
            pending.extend((int(tour[i - 1]), int(tour[i]), int(tour[j - 1]), int(tour[j])))
            improved = True
        if not improved:
            break
    return tour[1:] - 1


def chain_signs(steps: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Signs (n,) that turn every row towards the one before it on the path, the first row keeping its own; `steps`
    (n - 1,) are the inner products of rows that are neighbours on it."""
    sign = np.ones(len(order), dtype=np.int8)
    sign[order[1:]] = np.cumprod(np.where(steps < 0, -1, 1))
    return sign


def path_length(matrix: torch.Tensor, *, squared: bool = False) -> float:
    """The objective of Eq. 5 of a matrix in its present order: the sum of distances between adjacent rows.

    With `squared`, the sum of squared distances, which is the form that Proposition 1 holds for.
    """
    steps = (matrix[1:] - matrix[:-1]).double().norm(dim=1)
    return float((steps.square() if squared else steps).sum())
