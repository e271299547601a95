"""One layer of an adapter as tensors in a file, and back: the layout that `file` reads and writes.

For a (d, k) layer with m positions, format version 3 has

    coefficients      (m, 2) complex or (m,) real; float32, float16, bfloat16, or int8 to be multiplied by ...
    coefficient_scale (1,) float32, beside int8 alone
    positions_low     the low bits and
    positions_high    the unary high parts of the sorted flat positions (`packing.pack_increasing`): for complex
                      coefficients u * (k // 2 + 1) + v in the half plane v <= k / 2, for real ones u * k + v
    row_order         the permutation's d entries, each in the bits that d - 1 needs (`packing.pack`)
    column_order      its k entries, likewise
    row_sign          d bits, 1 for -1
    column_sign       k bits

All but the coefficients are bytes (uint8). An order that changes nothing takes none, nor do signs without a -1.

Version 2, still read, had these in full. Version 1, still read, had the positions u * k + v as differences, the first
from 0, and orders, both as unsigned integers of the narrowest of 8, 16 and 32 bits.

Decoding is array operations alone, and checks whatever the tensors hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch

from ..tuner.rearrange import Rearrangement
from ..tuner.spectrum import CoefficientKind, half_plane, index_dtype
from . import packing

FORMAT_VERSION = 3
DTYPES = ("float32", "float16", "bfloat16", "int8")
PACKED_NAMES = ("positions_low", "positions_high", "row_order", "column_order", "row_sign", "column_sign")
VERSION_1_NAMES = ("coefficients", "positions", "row_order", "column_order", "row_sign", "column_sign")


class AdapterFileError(ValueError):
    """An adapter file that cannot be used: damaged, of another kind, or for another base model."""


@dataclass
class LayerWeights:
    """One layer's part of an adapter, as `SpectralDelta` holds it (there: shapes and types)."""

    shape: tuple[int, int]
    coefficients: torch.Tensor
    positions: torch.Tensor
    row_order: torch.Tensor
    column_order: torch.Tensor
    row_sign: torch.Tensor
    column_sign: torch.Tensor

    @property
    def rearrangement(self) -> Rearrangement:
        return Rearrangement(self.row_order.int(), self.column_order.int(), self.row_sign, self.column_sign)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in TENSOR_NAMES}


TENSOR_NAMES = tuple(f.name for f in fields(LayerWeights) if f.name != "shape")


def tensor_names(version: int, dtype: str | None = None) -> tuple[str, ...]:
    """A layer's tensors in a format version; from version 2 on they depend on the coefficients' type."""
    if version == 1:
        return VERSION_1_NAMES
    return ("coefficients", *(["coefficient_scale"] if dtype == "int8" else []), *PACKED_NAMES)


def encode_layer(layer: LayerWeights, dtype: str) -> dict[str, torch.Tensor]:
    """A layer's tensors in the file, by name.

    Raises ValueError for an unknown type, or for coefficients that are not finite in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
    coefficients = layer.coefficients.float()
    kind = "complex" if coefficients.ndim == 2 else "real"
    flat = layer.positions.long()
    if kind == "complex":
        u, v, mirrored = half_plane(layer.positions, layer.shape)
        flat = torch.stack([u, v], dim=1)
        coefficients = coefficients * torch.stack([torch.ones_like(u), torch.where(mirrored, -1, 1)], dim=1)
    flat, sequence = (flat[:, 0] * _columns(layer.shape, kind) + flat[:, 1]).sort()
    stored, scale = _store(coefficients[sequence], dtype)
    if not (torch.isfinite(stored).all() and torch.isfinite(coefficients).all()):
        raise ValueError(f"coefficients that are not finite in {dtype}")
    low, high = packing.pack_increasing(flat.numpy(), layer.shape[0] * _columns(layer.shape, kind))
    d, k = layer.shape
    packed = {
        "positions_low": low,
        "positions_high": high,
        "row_order": _pack_unless(layer.row_order.numpy(), np.arange(d), packing.bit_width(d)),
        "column_order": _pack_unless(layer.column_order.numpy(), np.arange(k), packing.bit_width(k)),
        "row_sign": _pack_unless(layer.row_sign.numpy() < 0, np.zeros(d), 1),
        "column_sign": _pack_unless(layer.column_sign.numpy() < 0, np.zeros(k), 1),
    }
    scaled = {"coefficient_scale": torch.tensor([scale])} if dtype == "int8" else {}
    return {"coefficients": stored, **scaled, **{key: torch.from_numpy(array) for key, array in packed.items()}}


def stored_coefficients(layer: LayerWeights, dtype: str) -> torch.Tensor:
    """A layer's coefficients as a reader will have them, float32."""
    stored, scale = _store(layer.coefficients.float(), dtype)
    return stored.float() * scale


def decode_layer(
    tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], kind: CoefficientKind, version: int
) -> LayerWeights:
    """The inverse of `encode_layer`, checked; coefficients keep a floating type.

    Raises AdapterFileError or ValueError for tensors that make no valid layer.
    """
    layer = _decode_1(tensors, shape) if version == 1 else _decode_packed(tensors, shape, kind)
    check_layer(layer, kind)
    return layer


def _store(coefficients: torch.Tensor, dtype: str) -> tuple[torch.Tensor, float]:
    """Coefficients as stored, and what they are then multiplied by."""
    if dtype != "int8":
        return coefficients.to(getattr(torch, dtype)), 1.0
    scale = float(coefficients.abs().max()) / 127 or 1.0
    return (coefficients / scale).round().to(torch.int8), scale


def _columns(shape: tuple[int, int], kind: CoefficientKind) -> int:
    return shape[1] // 2 + 1 if kind == "complex" else shape[1]


def _pack_unless(values: np.ndarray, default: np.ndarray, width: int) -> np.ndarray:
    """Packed integers; no bytes where they are the default."""
    return np.empty(0, dtype=np.uint8) if np.array_equal(values, default) else packing.pack(values, width)


def _decode_packed(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], kind: CoefficientKind) -> LayerWeights:
    d, k = shape
    coefficients = tensors["coefficients"]
    stored_types = [torch.float32, torch.float16, torch.bfloat16]
    if "coefficient_scale" in tensors:
        scale = tensors["coefficient_scale"]
        if coefficients.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != (1,):
            raise AdapterFileError(f"coefficients have type {coefficients.dtype} beside a scale {scale.dtype}.")
        coefficients = coefficients.float() * scale
    elif coefficients.dtype not in stored_types:
        raise AdapterFileError(f"coefficients have type {coefficients.dtype}.")
    arrays = {}
    for key in PACKED_NAMES:
        if tensors[key].dtype != torch.uint8:
            raise AdapterFileError(f"{key} has type {tensors[key].dtype}.")
        arrays[key] = tensors[key].numpy()
    count, columns = coefficients.shape[0] if coefficients.ndim else 0, _columns(shape, kind)

    def unpacked(key: str, default: np.ndarray, width: int) -> torch.Tensor:
        if arrays[key].shape == (0,):
            return torch.from_numpy(default)
        try:
            return torch.from_numpy(packing.unpack(arrays[key], width, len(default)))
        except ValueError as error:
            raise AdapterFileError(f"{key}: {error}.") from None

    try:
        flat = packing.unpack_increasing(arrays["positions_low"], arrays["positions_high"], d * columns, count)
    except ValueError as error:
        raise AdapterFileError(f"positions: {error}.") from None
    return LayerWeights(
        shape,
        coefficients=coefficients,
        positions=torch.from_numpy(np.stack([flat // columns, flat % columns], axis=1)),
        row_order=unpacked("row_order", np.arange(d), packing.bit_width(d)),
        column_order=unpacked("column_order", np.arange(k), packing.bit_width(k)),
        row_sign=1 - 2 * unpacked("row_sign", np.zeros(d, dtype=np.int64), 1),
        column_sign=1 - 2 * unpacked("column_sign", np.zeros(k, dtype=np.int64), 1),
    )


def _decode_1(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> LayerWeights:
    d, k = shape
    for key, tensor in tensors.items():
        floats, unsigned = (torch.float32, torch.float16), (torch.uint8, torch.uint16, torch.uint32)
        if tensor.dtype not in (floats if key == "coefficients" else unsigned):
            raise AdapterFileError(f"{key} has type {tensor.dtype}.")
        if key != "coefficients" and tensor.ndim != 1:
            raise AdapterFileError(f"{key} has shape {tuple(tensor.shape)}.")
    flat = tensors["positions"].long().cumsum(0)
    signs = {}
    for key, length in {"row_sign": d, "column_sign": k}.items():
        try:
            signs[key] = 1 - 2 * torch.from_numpy(packing.unpack(tensors[key].numpy(), 1, length))
        except ValueError as error:
            raise AdapterFileError(f"{key}: {error}.") from None
    return LayerWeights(
        shape,
        coefficients=tensors["coefficients"],
        positions=torch.stack([flat // k, flat % k], dim=1),
        row_order=tensors["row_order"].long(),
        column_order=tensors["column_order"].long(),
        **signs,
    )


def check_layer(layer: LayerWeights, kind: str) -> None:
    """Raise AdapterFileError for tensors that make no valid layer; else bring integers to `SpectralDelta`'s types."""
    d, k = layer.shape
    count = len(layer.positions)
    expected = (count, 2) if kind == "complex" else (count,)
    if count == 0 or layer.positions.shape != (count, 2):
        raise AdapterFileError(f"positions have shape {tuple(layer.positions.shape)}.")
    if tuple(layer.coefficients.shape) != expected:
        raise AdapterFileError(
            f"{kind} coefficients have shape {tuple(layer.coefficients.shape)}, {count} positions need {expected}."
        )
    if not torch.isfinite(layer.coefficients).all():
        raise AdapterFileError("coefficients have NaN or infinite entries.")
    u, v = layer.positions.long().unbind(1)
    if bool(((u < 0) | (u >= d) | (v < 0) | (v >= k)).any()):
        raise AdapterFileError(f"positions lie outside the {d}x{k} spectrum.")
    flat = u * k + v
    if kind == "complex":
        flat = torch.minimum(flat, (-u % d) * k + (-v % k))
    if len(flat.unique()) != count:
        raise AdapterFileError("positions are repeated" + (" (a mirror counts)." if kind == "complex" else "."))
    for key, length in {"row_order": d, "column_order": k}.items():
        order = getattr(layer, key).long()
        if order.shape != (length,) or not torch.equal(order.sort().values, torch.arange(length)):
            raise AdapterFileError(f"{key} is no permutation of 0..{length - 1}.")
    for key, length in {"row_sign": d, "column_sign": k}.items():
        sign = getattr(layer, key)
        if sign.shape != (length,) or not bool((sign.abs() == 1).all()):
            raise AdapterFileError(f"{key} must be {length} times +1 or -1.")
    dtype = index_dtype(layer.shape)
    layer.positions = layer.positions.to(dtype)
    layer.row_order, layer.column_order = layer.row_order.to(dtype), layer.column_order.to(dtype)
    layer.row_sign, layer.column_sign = layer.row_sign.to(torch.int8), layer.column_sign.to(torch.int8)
