"""Intervals for the numbers that a run ends with."""

from __future__ import annotations

import math
from typing import Literal

import numpy

Verdict = Literal["better", "no evidence", "worse"]
Interval = tuple[float, float]

_Z = 1.959963984540054


def wilson(successes: float, n: int) -> Interval:
    """Wilson's 95 % score interval of a share; ties may count half."""
    p, z2 = successes / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(values: numpy.ndarray, draws: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap 95 % interval of the mean of `values`, `[n]`."""
    rng = numpy.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    low, high = numpy.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def verdict(difference: Interval) -> Verdict:
    """What the interval of a difference, counted so that more is better, says."""
    low, high = difference
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no evidence"
