"""Means over trainings with their standard errors, and differences between methods on the same subjects."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 9999


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """`mean` and its standard error, `stderr` (None for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error}


def paired_difference(first: Mapping[tuple[str, int], float], second: Mapping[tuple[str, int], float]) -> dict:
    """How much the first method is above the second, on the (subject, seed) pairs that both have.

    `mean`, and `low` and `high`, the bounds of a 95 % bootstrap interval (bias-corrected and accelerated; Efron, 1987),
    None for fewer than two subjects. Resampled are subjects, since seeds of a subject are not independent. `n` pairs.
    """
    by_subject: dict[str, list[float]] = {}
    for subject, seed in sorted(first.keys() & second.keys()):
        by_subject.setdefault(subject, []).append(first[subject, seed] - second[subject, seed])
    means = np.array([statistics.fmean(found) for found in by_subject.values()])
    low = high = None
    if len(means) > 1:
        low = high = float(means[0])
        if np.ptp(means) > 0:
            low, high = map(
                float, bootstrap((means,), np.mean, n_resamples=RESAMPLES, rng=0, method="BCa").confidence_interval
            )
    return {
        "mean": float(means.mean()) if len(means) else None,
        "low": low,
        "high": high,
        "n": sum(map(len, by_subject.values())),
    }
