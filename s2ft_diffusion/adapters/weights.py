"""One layer's part of an adapter apart from any model: `FreeWeights` and `GridWeights`, their checks and their changes.

Needs torch alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from ..tuner.grid import Grid, grid_delta, grid_factors
from ..tuner.integers import from_bytes, to_bytes
from ..tuner.rearrange import ORDERS, SIGNS, Rearrangement
from ..tuner.spectrum import Norm, delta_norm, delta_weight


class AdapterFileError(ValueError):
    """An adapter file that cannot be used: damaged, of another kind, or for another base model."""

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # a damaged file's words may be no text


@dataclass(kw_only=True)
class LayerWeights(ABC):
    """What both kinds hold, for a (d, k) layer: `coefficients`, floating; `row_order` (d,) and `column_order` (k,),
    int32; `row_sign` (d,) and `column_sign` (k,), int8."""

    shape: tuple[int, int]
    coefficients: torch.Tensor
    row_order: torch.Tensor
    column_order: torch.Tensor
    row_sign: torch.Tensor
    column_sign: torch.Tensor

    @property
    def rearrangement(self) -> Rearrangement:
        return Rearrangement(self.row_order, self.column_order, self.row_sign, self.column_sign)

    @abstractmethod
    def integers(self) -> dict[str, tuple[torch.Tensor, int]]:
        """What says where the coefficients sit: tensors and the bounds of their entries, by name."""

    @abstractmethod
    def delta(self) -> torch.Tensor:
        """The unscaled weight change (d, k), float32, dense."""

    @abstractmethod
    def change_norm(self, coefficients: torch.Tensor) -> float:
        """The Frobenius norm of the unscaled weight change that other coefficients would make here."""

    def state(self) -> dict[str, torch.Tensor]:
        """The state of the tuner's `LayerDelta` for this layer."""
        orders = {name: (getattr(self, name), bound) for name, bound in zip(ORDERS, self.shape, strict=True)}
        held = {name: to_bytes(values, bound) for name, (values, bound) in {**self.integers(), **orders}.items()}
        return {"coefficients": self.coefficients, **held, **{name: getattr(self, name) for name in SIGNS}}

    def check(self) -> None:
        """Raise AdapterFileError for tensors that make no valid layer; else bring integers to their types."""
        self._check_coefficients()
        if not torch.isfinite(self.coefficients).all():
            raise AdapterFileError("coefficients have NaN or infinite entries.")
        for key, length in zip(ORDERS, self.shape, strict=True):
            order = getattr(self, key).long()
            if order.shape != (length,) or not torch.equal(order.sort().values, torch.arange(length)):
                raise AdapterFileError(f"{key} is no permutation of 0..{length - 1}.")
            setattr(self, key, order.int())
        for key, length in zip(SIGNS, self.shape, strict=True):
            sign = getattr(self, key)
            if sign.shape != (length,) or not bool((sign.abs() == 1).all()):
                raise AdapterFileError(f"{key} must be {length} times +1 or -1.")
            setattr(self, key, sign.to(torch.int8))

    @abstractmethod
    def _check_coefficients(self) -> None: ...


@dataclass(kw_only=True)
class FreeWeights(LayerWeights):
    """Coefficients (m, 2) complex or (m,) real at free `positions` (m, 2), int32."""

    positions: torch.Tensor
    norm: Norm = "ortho"

    names: ClassVar[tuple[str, ...]] = ("positions",)

    @property
    def kind(self) -> str:
        return "complex" if self.coefficients.ndim == 2 else "real"

    def integers(self) -> dict[str, tuple[torch.Tensor, int]]:
        return {"positions": (self.positions, max(self.shape))}

    def delta(self) -> torch.Tensor:
        return delta_weight(self.coefficients.float(), self.positions, self.rearrangement, self.norm)

    def change_norm(self, coefficients: torch.Tensor) -> float:
        return delta_norm(coefficients, self.positions, self.shape, self.norm)

    def _check_coefficients(self) -> None:
        (d, k), count, kind = self.shape, len(self.positions), self.kind
        expected = (count, 2) if kind == "complex" else (count,)
        if count == 0 or self.positions.shape != (count, 2):
            raise AdapterFileError(f"positions have shape {tuple(self.positions.shape)}.")
        if tuple(self.coefficients.shape) != expected:
            raise AdapterFileError(
                f"{kind} coefficients have shape {tuple(self.coefficients.shape)}, {count} positions need {expected}."
            )
        u, v = self.positions.long().unbind(1)
        if bool(((u < 0) | (u >= d) | (v < 0) | (v >= k)).any()):
            raise AdapterFileError(f"positions lie outside the {d}x{k} spectrum.")
        flat = u * k + v
        if kind == "complex":
            flat = torch.minimum(flat, (-u % d) * k + (-v % k))
        if len(flat.unique()) != count:
            raise AdapterFileError("positions are repeated" + (" (a mirror counts)." if kind == "complex" else "."))
        self.positions = self.positions.int()


@dataclass(kw_only=True)
class GridWeights(LayerWeights):
    """Coefficients (r1, r2), or (n,) at flat `places` (n,) of an r1 x r2 table, between `row_functions` (r1,) and
    `column_functions` (r2,); int32, increasing."""

    row_functions: torch.Tensor
    column_functions: torch.Tensor
    places: torch.Tensor | None = None

    names: ClassVar[tuple[str, ...]] = ("row_functions", "column_functions", "places")

    @property
    def grid(self) -> Grid:
        return Grid(self.row_functions, self.column_functions, self.places)

    @property
    def rank(self) -> int:
        return min(len(self.row_functions), len(self.column_functions))

    def integers(self) -> dict[str, tuple[torch.Tensor, int]]:
        bounds = (*self.shape, len(self.row_functions) * len(self.column_functions))
        return {n: (t, b) for n, b in zip(self.names, bounds, strict=True) if (t := getattr(self, n)) is not None}

    def delta(self) -> torch.Tensor:
        return grid_delta(self.coefficients, self.grid, self.rearrangement)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B (d, r) and A (r, k), float32, with B @ A the unscaled weight change, exactly; r = `rank`."""
        return grid_factors(self.coefficients, self.grid, self.rearrangement)

    def change_norm(self, coefficients: torch.Tensor) -> float:
        return float(coefficients.double().norm())  # the functions are orthonormal

    def _check_coefficients(self) -> None:
        for key, bound in zip(("row_functions", "column_functions"), self.shape, strict=True):
            setattr(self, key, _increasing(key, getattr(self, key), bound))
        size = (len(self.row_functions), len(self.column_functions))
        if self.places is not None:
            self.places = _increasing("places", self.places, size[0] * size[1])
        expected = size if self.places is None else (len(self.places),)
        if tuple(self.coefficients.shape) != expected:
            found = tuple(self.coefficients.shape)
            raise AdapterFileError(f"coefficients have shape {found}, the table needs {expected}.")


def _increasing(key: str, values: torch.Tensor, bound: int) -> torch.Tensor:
    """Integers as int32; AdapterFileError unless there are some, they increase, and all are in 0..bound - 1."""
    if values.ndim != 1 or not len(values):
        raise AdapterFileError(f"{key} have shape {tuple(values.shape)}.")
    values = values.long()
    if bool((values.diff() <= 0).any()) or int(values[0]) < 0 or int(values[-1]) >= bound:
        raise AdapterFileError(f"{key} are repeated or out of order, or not in 0..{bound - 1}.")
    return values.int()


def weights_from_state(state: Mapping[str, torch.Tensor], norm: Norm, *, check: bool = True) -> LayerWeights:
    """The inverse of `LayerWeights.state`, checked unless it is a model's own.

    Integers may also be there as such, as earlier releases had them.
    Raises AdapterFileError for missing, unknown or scalar tensors, and as `LayerWeights.check` does.
    """
    kind = GridWeights if "row_functions" in state else FreeWeights
    names = {f.name for f in fields(kind)} - {"shape", "norm"}
    needed = names - {"places"}
    if wrong := sorted((needed - set(state)) | (set(state) - names)):
        raise AdapterFileError(f"{wrong[0]!r} is {'missing' if wrong[0] in needed else 'unknown'}.")
    values = {}
    for name, tensor in state.items():
        if tensor.ndim == 0:
            raise AdapterFileError(f"{name} is a single number.")
        if name in (*ORDERS, *kind.names) and tensor.dtype == torch.uint8:
            if tensor.shape[-1] not in (2, 4):
                raise AdapterFileError(f"{name} has shape {tuple(tensor.shape)}.")
            tensor = from_bytes(tensor.contiguous())
        values[name] = tensor
    shape = (len(values["row_order"]), len(values["column_order"]))
    layer = kind(shape=shape, **values, **({"norm": norm} if kind is FreeWeights else {}))
    if check:
        layer.check()
    return layer
