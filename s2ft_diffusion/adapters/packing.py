"""Integers in few bits, by array operations alone: what the adapter file stores positions and orders in.

Pure functions of numpy arrays; nothing here knows about adapters. Bits go from the highest to the lowest, into bytes
padded with zeros; unpacking refuses anything that packing would not have made.
"""

from __future__ import annotations

import numpy as np


def bit_width(bound: int) -> int:
    """Bits that integers in 0..bound - 1 need."""
    return max(0, int(bound - 1).bit_length())


def pack(values: np.ndarray, width: int) -> np.ndarray:
    """Integers (n,) of `width` bits each as bytes (ceil(n * width / 8),)."""
    shifts = np.arange(width - 1, -1, -1)
    return np.packbits((values.astype(np.int64)[:, None] >> shifts) & 1)


def unpack(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The inverse of `pack`, int64; raises ValueError for bytes that are not `count` integers of `width` bits."""
    bits = _bits(packed, width * count).reshape(count, width)
    return bits @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))


def pack_increasing(values: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Strictly increasing integers (n,) in 0..bound - 1 as two arrays of bytes (Elias, 1974; Fano, 1971).

    The low bits of each stand as they are; the rest, whose differences are small, in unary: about 2 + log2(bound / n)
    bits each, within half a bit of what any code needs for a random set.
    """
    width = _low_width(bound, len(values))
    high = np.zeros(_unary_length(bound, len(values), width), dtype=np.uint8)
    high[(values >> width) + np.arange(len(values))] = 1
    return pack(values & ((1 << width) - 1), width), np.packbits(high)


def unpack_increasing(low: np.ndarray, high: np.ndarray, bound: int, count: int) -> np.ndarray:
    """The inverse of `pack_increasing`, int64.

    Raises ValueError unless it is `count` strictly increasing integers in 0..bound - 1.
    """
    width = _low_width(bound, count)
    ones = np.flatnonzero(_bits(high, _unary_length(bound, count, width)))
    if len(ones) != count:
        raise ValueError(f"{len(ones)} integers where there should be {count}")
    values = ((ones - np.arange(count)) << width) | unpack(low, width, count)
    if count and (bool((np.diff(values) <= 0).any()) or values[-1] >= bound):
        raise ValueError(f"integers that are repeated or out of order, or not below {bound}")
    return values


def increasing_bytes(bound: int, count: int) -> tuple[int, int]:
    """The lengths of `pack_increasing`'s two arrays for `count` integers below `bound`."""
    width = _low_width(bound, count)
    return -(-count * width // 8), -(-_unary_length(bound, count, width) // 8)


def _low_width(bound: int, count: int) -> int:
    return max(0, (bound // max(count, 1)).bit_length() - 1)


def _unary_length(bound: int, count: int, width: int) -> int:
    return count + ((bound - 1) >> width) + 1


def _bits(packed: np.ndarray, count: int) -> np.ndarray:
    if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(f"{packed.dtype} of shape {packed.shape} where {count} bits should be")
    bits = np.unpackbits(packed)
    if bits[count:].any():
        raise ValueError(f"bits set past the last of {count}")
    return bits[:count]
