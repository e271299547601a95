"""Packed integers: exact, as small as promised, and refused when they are anything else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ft_diffusion.adapters.packing import bit_width, pack, pack_increasing, unpack, unpack_increasing


@given(st.integers(1, 2000), st.data())
def test_integers_of_equal_width(bound, data) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, bound - 1), max_size=40)), dtype=np.int64)
    width = bit_width(bound)
    packed = pack(values, width)
    assert packed.nbytes == math.ceil(len(values) * width / 8)
    assert np.array_equal(unpack(packed, width, len(values)), values)


@given(st.sets(st.integers(0, 499)), st.sampled_from([500, 512, 10_000, 2**40]))
def test_increasing_integers(values, bound) -> None:
    values = np.array(sorted(values), dtype=np.int64)
    low, high = pack_increasing(values, bound)
    assert np.array_equal(unpack_increasing(low, high, bound, len(values)), values)


def test_nearly_as_small_as_can_be() -> None:
    bound, count = 1280 * 641, 4000
    values = np.sort(np.random.default_rng(0).choice(bound, count, replace=False))
    entropy = (math.lgamma(bound + 1) - math.lgamma(count + 1) - math.lgamma(bound - count + 1)) / math.log(2) / 8
    assert sum(part.nbytes for part in pack_increasing(values, bound)) < 1.07 * entropy


def test_refuses_what_packing_would_not_make() -> None:
    low, high = pack_increasing(np.array([3, 70, 71, 200]), 300)
    with pytest.raises(ValueError, match="integers where there should be 4"):
        unpack_increasing(low, np.zeros_like(high), 300, 4)
    with pytest.raises(ValueError, match="out of order"):
        unpack_increasing(low[::-1].copy(), high, 300, 4)
    with pytest.raises(ValueError, match="bits should be"):
        unpack_increasing(low, high, 3000, 4)
    with pytest.raises(ValueError, match="not below 200"):  # the same layout, a smaller bound
        unpack_increasing(*pack_increasing(np.array([3, 70, 71, 200]), 201), 200, 4)
    with pytest.raises(ValueError, match="past the last"):
        unpack(np.array([255], dtype=np.uint8), 3, 2)
