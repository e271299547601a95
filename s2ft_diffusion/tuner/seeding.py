"""Random generators of their own for whatever must not depend on what else is drawn."""

from __future__ import annotations

import hashlib

import torch


def seeded(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`: a seed and the names and numbers that tell one draw from another."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
