"""A short path through the rows of a large matrix, without a table of their distances.

Rows are sketched: projected onto the few directions that hold most of them, found from a random projection (Halko,
Martinsson and Tropp, 2011, "Finding Structure with Randomness"). Every row's nearest others come from products of
blocks of sketches. The shortest of these steps make fragments of a path (greedy edges), fragments are joined by a walk
to the nearest end, and 2-opt shortens the path with steps to near rows alone (Bentley, 1992, "Fast Algorithms for
Geometric Traveling Salesman Problems"). Products are made where the matrix lies, the rest on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

SKETCH_WIDTH = 64
NEIGHBORS = 8
BLOCK_ROWS, PIECE_COLUMNS = 256, 1024  # of a product: few enough for a cache, enough to be fast
GROUP = 32
PAIRS = 2**16  # that are looked at at a time
MAX_ROUNDS = 60


def sketch_rows_and_columns(
    matrix: torch.Tensor, *, cosine: bool, signs: bool, generator: torch.Generator | None
) -> tuple[Sketch, Sketch]:
    """Sketches of the rows and of the columns of a float32 matrix; `generator`, of the CPU, draws the projection."""
    width = min(SKETCH_WIDTH, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    of_columns = matrix.T @ torch.linalg.qr(matrix @ start).Q
    of_rows = matrix @ torch.linalg.qr(of_columns).Q
    row_norm = torch.linalg.vector_norm(matrix, dim=1)
    # Along columns the library's norm takes as long as all products here.
    column_norm = sum(block.square().sum(0) for block in matrix.split(BLOCK_ROWS)).sqrt_()
    return Sketch.of(of_rows, row_norm, cosine, signs), Sketch.of(of_columns, column_norm, cosine, signs)


@dataclass(frozen=True)
class Sketch:
    """Points (n, m), float32, whose inner products stand for those of n rows.

    `half_square` (n,) is half of every row's squared length, None for the cosine distance, for which points come from
    rows of length one. With `signs`, rows are as near as they or their negatives are.
    """

    points: torch.Tensor
    half_square: torch.Tensor | None
    signs: bool

    @classmethod
    def of(cls, projected: torch.Tensor, norm: torch.Tensor, cosine: bool, signs: bool) -> Sketch:
        """Of rows of length `norm` (n,) that have been projected to (n, m)."""
        if cosine:
            projected = projected * torch.where(norm > 0, 1 / norm, 0.0)[:, None]
        return cls(projected, None if cosine else norm.square().div_(2), signs)

    def __len__(self) -> int:
        return len(self.points)

    def nearest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest others (n, count) of every row, nearest first, and their distances."""
        n, device = len(self), self.points.device
        count, pieces = min(count, n - 1), -(-n // PIECE_COLUMNS)
        groups = -(-n // (pieces * GROUP))  # in a piece
        width = groups * GROUP
        padding = pieces * width - n
        pad = torch.nn.functional.pad
        others = pad(self.points, (0, 0, 0, padding)).view(pieces, width, -1)
        penalty = self.half_square
        if penalty is not None:
            penalty = pad(penalty, (0, padding)).view(pieces, width)
        found = []
        for first in range(0, n, BLOCK_ROWS):
            rows = self.points[first : first + BLOCK_ROWS]
            here = torch.arange(len(rows), device=device)[:, None]
            score = rows.new_empty(pieces, len(rows), width)
            largest = rows.new_empty(len(rows), pieces, groups)
            for number, piece in enumerate(score):
                torch.mm(rows, others[number].T, out=piece)
                if self.signs:
                    piece.abs_()
                if penalty is not None:
                    piece -= penalty[number]
                piece[:, max(0, n - number * width) :] = -torch.inf
                own = max(first, number * width), min(first + len(rows), (number + 1) * width)
                if own[0] < own[1]:
                    x, y = (slice(own[0] - begin, own[1] - begin) for begin in (first, number * width))
                    piece[x, y].fill_diagonal_(-torch.inf)
                # A group is of entries that are `groups` apart, so that maxima are taken along whole vectors.
                torch.amax(piece.view(-1, GROUP, groups), 1, out=largest[:, number])
            # The largest lie in the groups with the largest maxima, which are far fewer to sort.
            best = largest.flatten(1).topk(min(count, pieces * groups), dim=1).indices
            number, group = best // groups, best % groups
            best = score.view(pieces, len(rows), GROUP, groups)[number, here, :, group].flatten(1)
            place = best.topk(count, dim=1).indices
            of = place // GROUP
            found.append((number.gather(1, of) * width + place % GROUP * groups + group.gather(1, of)).cpu())
        near = torch.cat(found).numpy()
        return near, self.distance(np.arange(n).repeat(count), near.ravel()).reshape(n, count)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Points and halves of squared lengths in NumPy, for the parts that look at few rows at a time."""
        half_square = None if self.half_square is None else self.half_square.cpu().numpy()
        return self.points.cpu().numpy(), half_square

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Signed inner products of pairs of rows (m,)."""
        points, _ = self.arrays
        found = np.empty(len(a), dtype=points.dtype)
        for first in range(0, len(a), PAIRS):
            here = slice(first, first + PAIRS)
            np.einsum("ij,ij->i", points[a[here]], points[b[here]], out=found[here])
        return found

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distances of pairs of rows (m,)."""
        _, half_square = self.arrays
        product = self.similarity(a, b)
        if self.signs:
            product = np.abs(product)
        if half_square is None:
            return 1.0 - product
        return np.sqrt(np.maximum(2.0 * (half_square[a] + half_square[b] - product), 0.0))


def short_path(sketch: Sketch, start: int) -> np.ndarray:
    """An order (n,) of the rows with short steps between neighbours."""
    neighbors, distances = sketch.nearest(NEIGHBORS)
    fragments = greedy_fragments(neighbors, distances)
    return shorten(sketch, walk(sketch, fragments, start % len(fragments)), neighbors, distances)


def nearest_walk(sketch: Sketch, start: int) -> np.ndarray:
    """The order (n,) of Alg. 1: from row `start` always on to the nearest unvisited one."""
    return walk(sketch, list(np.arange(len(sketch))[:, None]), start)


def greedy_fragments(neighbors: np.ndarray, distances: np.ndarray) -> list[np.ndarray]:
    """Fragments of a path from the shortest steps: each is taken whose ends have a side free and are not joined yet."""
    n, count = neighbors.shape
    a = np.repeat(np.arange(n), count)
    b = neighbors.ravel().astype(np.int64)
    shortest = np.argsort(distances.ravel(), kind="stable")
    free, other_end = [2] * n, list(range(n))
    joined: list[list[int]] = [[] for _ in range(n)]
    for x, y in zip(a[shortest].tolist(), b[shortest].tolist(), strict=True):
        if free[x] and free[y] and other_end[x] != y:
            free[x] -= 1
            free[y] -= 1
            joined[x].append(y)
            joined[y].append(x)
            ends = other_end[x], other_end[y]
            other_end[ends[0]], other_end[ends[1]] = ends[1], ends[0]
    fragments, seen = [], [False] * n
    for end in range(n):
        if free[end] and not seen[end]:
            fragment, last, here = [end], -1, end
            seen[end] = True
            while onward := [x for x in joined[here] if x != last]:
                last, here = here, onward[0]
                seen[here] = True
                fragment.append(here)
            fragments.append(np.array(fragment))
    return fragments


def walk(sketch: Sketch, fragments: list[np.ndarray], start: int) -> np.ndarray:
    """The order (n,) that begins with fragment `start` and always goes on to the nearest free end of another."""
    heads, tails = (np.array([fragment[end] for fragment in fragments]) for end in (0, -1))
    count = len(fragments)
    single = bool((heads == tails).all())
    ends = heads if single else np.concatenate([heads, tails])
    owner = np.tile(np.arange(count), len(ends) // count)
    backward = np.arange(len(ends)) >= count
    free = np.ones(len(ends), dtype=bool)
    points, half_square = sketch.arrays
    vectors = points[ends]
    penalty = np.zeros(len(ends), np.float32) if half_square is None else half_square[ends]
    order, current, reverse = [], start, False
    for left in range(count - 1, -1, -1):
        order.append(fragments[current][::-1] if reverse else fragments[current])
        if not left:
            break
        used = np.flatnonzero(owner == current)
        penalty[used], free[used] = np.inf, False
        if 2 * left * (1 if single else 2) < len(ends):  # half of them are used: leave those out from now on
            ends, owner, backward, vectors, penalty = (x[free] for x in (ends, owner, backward, vectors, penalty))
            free = free[free]
        score = vectors @ points[order[-1][-1]]
        if sketch.signs:
            np.abs(score, out=score)
        score -= penalty
        best = int(score.argmax())
        current, reverse = int(owner[best]), bool(backward[best])
    return np.concatenate(order)


def shorten(sketch: Sketch, order: np.ndarray, neighbors: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """2-opt over steps to near rows, in rounds: all gains at once, then the best of them one after the other."""
    n = len(order)
    order = order.copy()
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    active = np.arange(n)
    for _ in range(MAX_ROUNDS):
        step = sketch.distance(order[:-1], order[1:])
        tolerance = 1e-6 * max(1.0, float(step.max()))
        moves = [_gains(sketch, order, place, step, active, neighbors, distances, side) for side in (1, -1)]
        gain, a, a_next, b, b_next = (np.concatenate(parts) for parts in zip(*moves, strict=True))
        better = np.flatnonzero(gain > tolerance)
        if not len(better):
            break
        better = better[np.argsort(-gain[better], kind="stable")]
        touched = []
        for x, x_next, y, y_next in np.stack([a, a_next, b, b_next], 1)[better].tolist():
            side = place[x_next] - place[x]
            if side not in (1, -1) or place[y_next] - place[y] != side:
                touched.append(x)  # another move was here first
                continue
            # Steps (x, x_next) and (y, y_next) become (x, y) and (x_next, y_next), what lies between is reversed.
            low, high = sorted((int(place[x]), int(place[y])))
            first, last = (low + 1, high + 1) if side == 1 else (low, high)
            order[first:last] = order[first:last][::-1].copy()
            place[order[first:last]] = np.arange(first, last)
            touched += [x, x_next, y, y_next]
        active = np.unique(touched)
    return order


def _gains(sketch, order, place, step, active, neighbors, distances, side):
    """What replacing (a, next a) and (b, next b) by (a, b) and (next a, next b) gains, for b near to a."""
    n = len(order)
    at = place[active]
    here = active[(at + side >= 0) & (at + side < n)]
    at = place[here]
    own = step[at] if side == 1 else step[at - 1]
    row, column = np.nonzero(distances[here] < own[:, None])
    a, b = here[row], neighbors[here[row], column]
    to = place[b]
    inside = (to + side >= 0) & (to + side < n)
    row, column, a, b, to = row[inside], column[inside], a[inside], b[inside], to[inside]
    a_next, b_next = order[place[a] + side], order[to + side]
    gain = own[row] + (step[to] if side == 1 else step[to - 1]) - distances[a, column]
    gain -= sketch.distance(a_next, b_next)
    return gain, a, a_next, b, b_next
