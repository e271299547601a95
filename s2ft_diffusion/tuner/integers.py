"""Integers as bytes: how a layer keeps orders, positions and places.

There may be a hundred adapters in memory, so an integer takes two bytes where it can. Process groups and some backends
know no two-byte integers, but all know bytes; so that is the one type in which they are held.
"""

from __future__ import annotations

import torch


def byte_width(bound: int) -> int:
    """Bytes that an integer in 0..bound - 1 is held in: 2 or 4."""
    return 2 if bound <= 1 << 16 else 4


def to_bytes(values: torch.Tensor, bound: int) -> torch.Tensor:
    """Integers (...) in 0..bound - 1 as bytes (..., 2 or 4), uint8."""
    kind = torch.int16 if byte_width(bound) == 2 else torch.int32
    return values.to(torch.int32).to(kind).unsqueeze(-1).contiguous().view(torch.uint8)


def from_bytes(held: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_bytes`, int32."""
    if held.shape[-1] == 2:
        return held.view(torch.int16).squeeze(-1).to(torch.int32) & 0xFFFF
    return held.view(torch.int32).squeeze(-1)
