"""A measured number with its interval, under the reference and under the tuned model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy

from alignctl import statistics
from alignctl.statistics import Interval

Better = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Difference(Estimate):
    """Tuned less reference, pair by pair, and the p value of its being nothing."""

    p: float


@dataclass(frozen=True)
class Number:
    """One row of an evaluation. `better` says which way is good; None where neither is."""

    name: str
    label: str
    group: str
    unit: str
    n: int
    better: Better
    reference: Estimate | None
    tuned: Estimate | None
    difference: Difference | None


@dataclass(frozen=True)
class Kind:
    """What a number is called and how it is read."""

    name: str
    label: str
    group: str
    unit: str = ""
    better: Better = None


def paired(kind: Kind, reference: numpy.ndarray | None, tuned: numpy.ndarray, groups: numpy.ndarray) -> Number:
    """A number that every item has, `[n]`, under both models; `groups`, `[n]`, are the prompts that they belong to."""
    difference = None
    if reference is not None:
        gap = tuned - reference
        interval = statistics.bootstrap_ratio(gap, numpy.ones(len(gap)), groups)
        difference = Difference(float(gap.mean()), interval, statistics.sign_flip_test(gap, groups))
    return Number(
        **vars(kind),
        n=len(tuned),
        reference=None if reference is None else _mean(kind, reference, groups),
        tuned=_mean(kind, tuned, groups),
        difference=difference,
    )


def _mean(kind: Kind, values: numpy.ndarray, groups: numpy.ndarray) -> Estimate:
    if kind.unit == "share":
        interval = statistics.share_interval(values, groups)
    else:
        interval = statistics.bootstrap_ratio(values, numpy.ones(len(values)), groups)
    return Estimate(float(values.mean()), interval)


def ratio(kind: Kind, reference: numpy.ndarray, tuned: numpy.ndarray, groups: numpy.ndarray) -> Number:
    """The sum of `tuned` over the sum of `reference`, both `[n]`."""
    interval = statistics.bootstrap_ratio(tuned, reference, groups)
    found = Estimate(float(tuned.sum() / reference.sum()), interval)
    return Number(**vars(kind), n=len(tuned), reference=None, tuned=found, difference=None)


def against(kind: Kind, known: float, tuned: numpy.ndarray, groups: numpy.ndarray) -> Number:
    """A number, `[n]`, that the reference has by definition: `known`, for every item."""
    found = paired(kind, numpy.full(len(tuned), known), tuned, groups)
    return replace(found, reference=Estimate(known, (known, known)))


def perplexity(
    kind: Kind, reference: numpy.ndarray, tuned: numpy.ndarray, tokens: numpy.ndarray, groups: numpy.ndarray
) -> Number:
    """Exp of minus the mean log-probability a token, from the sums of each text, `[n]`; the difference is in nats.

    Negative log-likelihood a token is `-sum / tokens` over all texts; texts are drawn whole.
    """
    estimates = []
    for sums in (reference, tuned):
        low, high = statistics.bootstrap_ratio(-sums, tokens, groups)
        value = float(-sums.sum() / tokens.sum())
        estimates.append(Estimate(_exp(value), (_exp(low), _exp(high))))
    gap = reference - tuned
    interval = statistics.bootstrap_ratio(gap, tokens, groups)
    difference = Difference(float(gap.sum() / tokens.sum()), interval, statistics.sign_flip_test(gap, groups))
    return Number(**vars(kind), n=len(tokens), reference=estimates[0], tuned=estimates[1], difference=difference)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
