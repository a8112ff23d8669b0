"""Intervals and tests for the numbers that a run ends with. What belongs to one prompt is drawn together."""

from __future__ import annotations

import math
from typing import Literal

import numpy

Verdict = Literal["better", "no evidence", "worse"]
Interval = tuple[float, float]

_Z = 1.959963984540054
DRAWS = 2000
FLIPS = 10_000


def wilson(successes: float, n: int) -> Interval:
    """Wilson's 95 % score interval of a share; ties may count half."""
    p, z2 = successes / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(values: numpy.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Percentile bootstrap 95 % interval of the mean of `values`, `[n]`."""
    return bootstrap_ratio(values, numpy.ones(len(values)), draws=draws, seed=seed)


def bootstrap_ratio(
    above: numpy.ndarray,
    below: numpy.ndarray,
    groups: numpy.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap 95 % interval of `above.sum() / below.sum()`, both `[n]`.

    `groups`, `[n]`, says which prompt each belongs to: prompts are drawn, with all that is theirs. Without it each is
    alone.
    """
    if groups is not None:
        above, below = group_sums(above, groups), group_sums(below, groups)
    rng = numpy.random.default_rng(seed)
    drawn = rng.integers(0, len(above), (draws, len(above)))
    low, high = numpy.percentile(above[drawn].sum(axis=1) / below[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def share_interval(values: numpy.ndarray, groups: numpy.ndarray) -> Interval:
    """95 % interval of the mean of `values`, `[n]`, between 0 and 1, by prompt.

    The bootstrap's, and Wilson's over the prompts where all are alike: drawing from equal values tells nothing.
    """
    found = bootstrap_ratio(values, numpy.ones(len(values)), groups)
    if found[0] < found[1]:
        return found
    prompts = len(numpy.unique(groups))
    return wilson(float(values.mean()) * prompts, prompts)


def sign_flip_test(differences: numpy.ndarray, groups: numpy.ndarray, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p value of paired `differences`, `[n]`, having a mean of 0: their signs are flipped by prompt.

    With up to 12 prompts every way of flipping is counted, else `flips` random ones and the one that was found.
    """
    sums = group_sums(differences, groups)
    count = len(sums)
    exact = count <= 12
    if exact:
        signs = 1 - 2 * (numpy.arange(2**count)[:, None] >> numpy.arange(count) & 1)
    else:
        signs = numpy.random.default_rng(seed).choice((-1, 1), (flips, count))
    # Summed in another order the same numbers differ by rounding.
    reach = abs(sums.sum()) - 1e-12 * numpy.abs(sums).sum()
    hits = int((numpy.abs(signs @ sums) >= reach).sum())
    return hits / len(signs) if exact else (hits + 1) / (flips + 1)


def group_sums(values: numpy.ndarray, groups: numpy.ndarray) -> numpy.ndarray:
    """The sum of `values` in each group, `[groups]`."""
    _, where = numpy.unique(groups, return_inverse=True)
    return numpy.bincount(where, weights=values)


def verdict(difference: Interval) -> Verdict:
    """What the interval of a difference, counted so that more is better, says."""
    low, high = difference
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no evidence"
