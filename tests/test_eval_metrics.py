"""Metrics against known answers."""

from __future__ import annotations

import pytest
import torch

from eval import metrics

EAST, NORTH, BETWEEN = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]


def test_mean_pairwise_cosine() -> None:
    generated, real = torch.tensor([EAST, BETWEEN]), torch.tensor([EAST, NORTH, NORTH])
    assert metrics.mean_pairwise_cosine(generated, real) == pytest.approx((1 + 0 + 0 + 0.6 + 0.8 + 0.8) / 6)


def test_mean_among_leaves_out_an_image_with_itself() -> None:
    assert metrics.mean_cosine_among(torch.tensor([EAST, NORTH, BETWEEN])) == pytest.approx((0 + 0.6 + 0.8) / 3)
    assert metrics.mean_among(torch.tensor([[0.0, 0.3], [0.3, 0.0]])) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="At least two"):
        metrics.mean_among(torch.zeros(1, 1))


def test_mean_matched_cosine_takes_each_image_with_its_own_prompt() -> None:
    assert metrics.mean_matched_cosine(torch.tensor([EAST, BETWEEN]), torch.tensor([EAST, NORTH])) == pytest.approx(0.9)


def test_shift_is_zero_for_what_has_not_moved() -> None:
    before = torch.tensor([EAST, NORTH])
    assert metrics.mean_shift(before, before) == 0.0
    assert metrics.mean_shift(before, torch.tensor([NORTH, NORTH])) == pytest.approx(0.5)
