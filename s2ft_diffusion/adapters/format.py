"""One layer of an adapter as tensors in a file, and back: the layout that `file` writes and `reading` reads.

For a (d, k) layer on a grid, format version 4 has

    coefficients      (r1, r2), or (n,) of a sparse table; float32, float16, bfloat16, or int8
    grid              uint8: all integers in one stream of bytes, each item padded to whole bytes:
                      flags: 1 row order, 2 column order, 4 row signs, 8 column signs, 16 places, 32 scale, each set
                      where the item is there
                      for a sparse table: r1, r2 as two little-endian unsigned 32-bit integers
                      what int8 coefficients are multiplied by, float32
                      row_functions, column_functions, and places of a sparse table, increasing
                      (`packing.pack_increasing`: low bits, then unary high parts)
                      row_order, column_order: each entry in the bits that n - 1 needs (`packing.pack`)
                      row_sign, column_sign: n bits, 1 for -1

(One stream, because every tensor costs some 150 bytes in a safetensors header.) A layer at free positions, with m of
them, has since version 3

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
from typing import Literal

import numpy as np
import torch

from ..tuner.rearrange import ORDERS, SIGNS
from ..tuner.spectrum import CoefficientKind, Norm, half_plane
from . import packing
from .weights import AdapterFileError, FreeWeights, GridWeights, LayerWeights

FORMAT_VERSION = 4
DTYPES = ("float32", "float16", "bfloat16", "int8")
STORED_TYPES = (torch.float32, torch.float16, torch.bfloat16)
PACKED_NAMES = ("positions_low", "positions_high", "row_order", "column_order", "row_sign", "column_sign")
VERSION_1_NAMES = ("coefficients", "positions", "row_order", "column_order", "row_sign", "column_sign")

Positions = Literal["grid", "free"]


def tensor_names(version: int, dtype: str | None = None, positions: Positions = "free") -> tuple[str, ...]:
    """A layer's tensors in a format version; those of free positions depend on the coefficients' type from 2 on."""
    if positions == "grid":
        return ("coefficients", "grid")
    if version == 1:
        return VERSION_1_NAMES
    return ("coefficients", *(["coefficient_scale"] if dtype == "int8" else []), *PACKED_NAMES)


def encode_layer(layer: LayerWeights, dtype: str) -> dict[str, torch.Tensor]:
    """A layer's tensors in the file, by name.

    Raises ValueError for an unknown type, or for coefficients that are not finite in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
    stored, scale = _store(layer.coefficients.float(), dtype)
    if not (torch.isfinite(stored).all() and torch.isfinite(layer.coefficients).all()):
        raise ValueError(f"coefficients that are not finite in {dtype}")
    if isinstance(layer, GridWeights):
        return {
            "coefficients": stored,
            "grid": torch.from_numpy(_grid_stream(layer, scale if dtype == "int8" else None)),
        }
    return _encode_free(layer, dtype)


def stored_coefficients(layer: LayerWeights, dtype: str) -> torch.Tensor:
    """A layer's coefficients as a reader will have them, float32."""
    stored, scale = _store(layer.coefficients.float(), dtype)
    return stored.float() * scale


def decode_layer(
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    version: int,
    *,
    positions: Positions = "free",
    kind: CoefficientKind = "complex",
    norm: Norm = "ortho",
) -> LayerWeights:
    """The inverse of `encode_layer`, checked; coefficients keep a floating type.

    `positions`, `kind` and `norm` are the config's. Raises AdapterFileError or ValueError for tensors that make no
    valid layer.
    """
    if positions == "grid":
        layer: LayerWeights = _decode_grid(tensors, shape)
    elif version == 1:
        layer = _decode_1(tensors, shape, norm)
    else:
        layer = _decode_packed(tensors, shape, kind, norm)
    if isinstance(layer, FreeWeights) and layer.kind != kind:
        raise AdapterFileError(f"coefficients have shape {tuple(layer.coefficients.shape)} and should be {kind}.")
    layer.check()
    return layer


# On a grid -----------------------------------------------------------------------------------------------------------

_FLAGS = {"row_order": 1, "column_order": 2, "row_sign": 4, "column_sign": 8, "places": 16, "scale": 32}


def _grid_stream(layer: GridWeights, scale: float | None) -> np.ndarray:
    flags, parts = 0, []
    if layer.places is not None:
        flags |= _FLAGS["places"]
        size = (len(layer.row_functions), len(layer.column_functions))
        parts.append(np.array(size, dtype="<u4").view(np.uint8))
    if scale is not None:
        flags |= _FLAGS["scale"]
        parts.append(np.array([scale], dtype="<f4").view(np.uint8))
    for values, bound in layer.integers().values():
        parts += packing.pack_increasing(values.numpy().astype(np.int64), bound)
    for name, n in zip(ORDERS, layer.shape, strict=True):
        order = getattr(layer, name).numpy()
        if not np.array_equal(order, np.arange(n)):
            flags |= _FLAGS[name]
            parts.append(packing.pack(order, packing.bit_width(n)))
    for name in SIGNS:
        negative = getattr(layer, name).numpy() < 0
        if negative.any():
            flags |= _FLAGS[name]
            parts.append(np.packbits(negative))
    return np.concatenate([np.array([flags], dtype=np.uint8), *parts])


class _Stream:
    """Items taken one after the other from bytes; AdapterFileError where they end too early."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0

    def take(self, count: int, what: str) -> np.ndarray:
        if self.at + count > len(self.data):
            raise AdapterFileError(f"the grid's bytes end before its {what}.")
        self.at += count
        return self.data[self.at - count : self.at]

    def increasing(self, count: int, bound: int, what: str) -> torch.Tensor:
        if not 0 < count <= bound:
            raise AdapterFileError(f"{count} {what} of {bound}.")
        low, high = packing.increasing_bytes(bound, count)
        try:
            values = packing.unpack_increasing(self.take(low, what), self.take(high, what), bound, count)
        except ValueError as error:
            raise AdapterFileError(f"{what}: {error}.") from None
        return torch.from_numpy(values)

    def packed(self, count: int, width: int, what: str) -> torch.Tensor:
        try:
            return torch.from_numpy(packing.unpack(self.take(-(-count * width // 8), what), width, count))
        except ValueError as error:
            raise AdapterFileError(f"{what}: {error}.") from None


def _decode_grid(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> GridWeights:
    coefficients, held = tensors["coefficients"], tensors["grid"]
    if held.dtype != torch.uint8 or held.ndim != 1:
        raise AdapterFileError(f"grid has type {held.dtype} and shape {tuple(held.shape)}.")
    stream = _Stream(held.numpy())
    flags = int(stream.take(1, "flags")[0])
    if flags >= 64:
        raise AdapterFileError(f"the grid has unknown flags {flags:#x}.")
    if sparse := bool(flags & _FLAGS["places"]):
        rows, columns = (int(n) for n in stream.take(8, "size").view("<u4"))
        wanted = 1
    else:
        rows, columns = coefficients.shape if coefficients.ndim == 2 else (0, 0)
        wanted = 2
    if coefficients.ndim != wanted or not (0 < rows <= shape[0] and 0 < columns <= shape[1]):
        found = tuple(coefficients.shape)
        raise AdapterFileError(
            f"coefficients have shape {found} in a table of {rows}x{columns} of a {shape[0]}x{shape[1]} layer."
        )
    if flags & _FLAGS["scale"]:
        if coefficients.dtype != torch.int8:
            raise AdapterFileError(f"coefficients have type {coefficients.dtype} beside a scale.")
        coefficients = coefficients.float() * float(stream.take(4, "scale").view("<f4")[0])
    elif coefficients.dtype not in STORED_TYPES:
        raise AdapterFileError(f"coefficients have type {coefficients.dtype}.")
    found = {
        "row_functions": stream.increasing(rows, shape[0], "row_functions"),
        "column_functions": stream.increasing(columns, shape[1], "column_functions"),
    }
    if sparse:
        found["places"] = stream.increasing(len(coefficients), rows * columns, "places")
    for name, n in zip(ORDERS, shape, strict=True):
        there = flags & _FLAGS[name]
        found[name] = stream.packed(n, packing.bit_width(n), name) if there else torch.arange(n)
    for name, n in zip(SIGNS, shape, strict=True):
        found[name] = 1 - 2 * stream.packed(n, 1, name) if flags & _FLAGS[name] else torch.ones(n, dtype=torch.int8)
    if stream.at != len(stream.data):
        raise AdapterFileError(f"the grid has {len(stream.data) - stream.at} bytes too many.")
    return GridWeights(shape=shape, coefficients=coefficients, **found)


# At free positions ---------------------------------------------------------------------------------------------------


def _encode_free(layer: FreeWeights, dtype: str) -> dict[str, torch.Tensor]:
    coefficients, kind = layer.coefficients.float(), layer.kind
    flat = layer.positions.long()
    if kind == "complex":
        u, v, mirrored = half_plane(layer.positions, layer.shape)
        flat = torch.stack([u, v], dim=1)
        coefficients = coefficients * torch.stack([torch.ones_like(u), torch.where(mirrored, -1, 1)], dim=1)
    flat, sequence = (flat[:, 0] * _columns(layer.shape, kind) + flat[:, 1]).sort()
    stored, scale = _store(coefficients[sequence], dtype)
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


def _decode_packed(
    tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], kind: CoefficientKind, norm: Norm
) -> FreeWeights:
    d, k = shape
    coefficients = tensors["coefficients"]
    if "coefficient_scale" in tensors:
        scale = tensors["coefficient_scale"]
        if coefficients.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != (1,):
            raise AdapterFileError(f"coefficients have type {coefficients.dtype} beside a scale {scale.dtype}.")
        coefficients = coefficients.float() * scale
    elif coefficients.dtype not in STORED_TYPES:
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
    return FreeWeights(
        shape=shape,
        norm=norm,
        coefficients=coefficients,
        positions=torch.from_numpy(np.stack([flat // columns, flat % columns], axis=1)),
        row_order=unpacked("row_order", np.arange(d), packing.bit_width(d)),
        column_order=unpacked("column_order", np.arange(k), packing.bit_width(k)),
        row_sign=1 - 2 * unpacked("row_sign", np.zeros(d, dtype=np.int64), 1),
        column_sign=1 - 2 * unpacked("column_sign", np.zeros(k, dtype=np.int64), 1),
    )


def _decode_1(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], norm: Norm) -> FreeWeights:
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
    return FreeWeights(
        shape=shape,
        norm=norm,
        coefficients=tensors["coefficients"],
        positions=torch.stack([flat // k, flat % k], dim=1),
        row_order=tensors["row_order"].long(),
        column_order=tensors["column_order"].long(),
        **signs,
    )
