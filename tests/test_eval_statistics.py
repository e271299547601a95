"""The search for a rate, means and intervals."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("open_clip")

from eval.rates import STEP, best_rate, next_rate
from eval.statistics import mean_and_error, paired_difference


def search(loss, start: float, trials: int) -> dict[float, float]:
    tried: dict[float, float] = {}
    for _ in range(trials):
        rate = next_rate(start, tried)
        tried[rate] = loss(rate)
    return tried


@pytest.mark.parametrize("optimum", [1e-4, 1e-3, 2e-3, 1e-2])
def test_the_search_for_a_rate_passes_the_optimum(optimum) -> None:
    tried = search(lambda rate: abs(math.log(rate / optimum)), 1e-3, 5)
    assert len(tried) == 5
    best = best_rate(tried)
    assert abs(math.log10(best / optimum)) <= 0.25 + 1e-6
    assert min(tried) < optimum * 1.01
    assert max(tried) > optimum * 0.99


def test_a_rate_that_fails_is_gone_away_from() -> None:
    tried = search(lambda rate: math.inf if rate > 2e-3 else 1 - rate, 1e-2, 3)
    assert best_rate(tried) == pytest.approx(1e-2 / STEP / STEP)


def test_means_and_paired_differences() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == {"mean": 2.0, "stderr": pytest.approx(1 / 3**0.5)}
    assert mean_and_error([1.0]) == {"mean": 1.0, "stderr": None}
    first = {(s, n): 0.5 + 0.1 * i + 0.01 * n for i, s in enumerate("abcdef") for n in (0, 1)}
    second = {key: value - 0.2 - (0.02 if key[0] < "d" else 0.0) for key, value in first.items()}
    found = paired_difference(first, {**second, ("elsewhere", 0): 9.0})
    assert found["n"] == 12
    assert found["mean"] == pytest.approx(0.21)
    assert 0.2 <= found["low"] < 0.21 < found["high"] <= 0.22
    same = paired_difference(first, {key: value - 0.1 for key, value in first.items()})
    assert same["low"] == pytest.approx(0.1)
    alone = paired_difference({("a", 0): 1.0}, {("a", 0): 0.5})
    assert (alone["mean"], alone["low"], alone["high"], alone["n"]) == (0.5, None, None, 1)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(60):
        values = 1.0 + torch.randn(12, generator=generator)
        subjects = [(str(i), 0) for i in range(12)]
        found = paired_difference(dict(zip(subjects, values.tolist(), strict=True)), dict.fromkeys(subjects, 0.0))
        held += found["low"] <= 1.0 <= found["high"]
    assert 50 <= held <= 60


def test_there_is_always_another_rate_to_try() -> None:
    tried: dict[float, float] = {}
    for _ in range(15):
        rate = next_rate(1e-2, tried)
        assert rate not in tried
        tried[rate] = abs(math.log(rate / 1e-2))
    assert best_rate(tried) == 1e-2
