"""The search for a learning rate: every method gets the same number of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping

STEP = math.sqrt(10)


def next_rate(start: float, tried: Mapping[float, float]) -> float:
    """Which rate to try after those tried (rate to loss).

    From the start up and down in steps of half a decade until the best rate has been passed on both sides; then halves
    of a step around the best one, halves of these, and so on. Where a rate did not train at all, its loss is inf.
    """
    if not tried:
        return start
    best = best_rate(tried)
    step = STEP
    while True:
        for candidate in (best / step, best * step):
            if not any(math.isclose(candidate, rate, rel_tol=(step - 1) / 10) for rate in tried):
                return candidate
        step = math.sqrt(step)


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the lowest loss; of equals the lowest, since what fails fails for rates that are too high."""
    return min(tried, key=lambda rate: (tried[rate], rate))
