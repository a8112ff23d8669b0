"""Scores of held-out rows, one number a row, before and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from alignctl import statistics


def right(margins: numpy.ndarray) -> numpy.ndarray:
    """1 where a margin of the chosen answer is positive, one half where it is 0, else 0."""
    return (margins > 0) + 0.5 * (margins == 0)


@dataclass(frozen=True)
class PairScores:
    """Held-out pairs under one model, each array `[n]`.

    For DPO a reward is `beta * (logp - reference logp)`; for ORPO it is `beta` times the mean token log-probability.
    """

    chosen_rewards: numpy.ndarray
    rejected_rewards: numpy.ndarray
    chosen_logps_per_token: numpy.ndarray
    rejected_logps_per_token: numpy.ndarray

    @property
    def margins(self) -> numpy.ndarray:
        return self.chosen_rewards - self.rejected_rewards

    @property
    def right(self) -> numpy.ndarray:
        return right(self.margins)

    def accuracy_interval(self, groups: numpy.ndarray) -> statistics.Interval:
        """95 % interval of the accuracy: Wilson's where each prompt stands once, else by prompt."""
        if len(numpy.unique(groups)) == len(groups):
            return statistics.wilson(float(self.right.sum()), len(groups))
        return statistics.share_interval(self.right, groups)

    def summary(self) -> dict[str, Any]:
        """Accuracy (a tie counts half) and margin with 95 % intervals, and mean log-probabilities a token."""
        n = len(self.margins)
        right = float(self.right.sum())
        return {
            "n": n,
            "reward_accuracy": right / n,
            "reward_accuracy_interval": statistics.wilson(right, n),
            "margin": float(self.margins.mean()),
            "margin_interval": statistics.bootstrap_mean(self.margins),
            "chosen_logps_per_token": float(self.chosen_logps_per_token.mean()),
            "rejected_logps_per_token": float(self.rejected_logps_per_token.mean()),
        }

    def as_lists(self) -> dict[str, list[float]]:
        return {name: [float(v) for v in values] for name, values in vars(self).items()}


@dataclass(frozen=True)
class RowScores:
    """Held-out rows of an SFT run under one model: mean negative log-likelihood of the supervised tokens, `[n]`."""

    nll: numpy.ndarray

    def summary(self) -> dict[str, Any]:
        """Mean over rows with a 95 % interval."""
        return {"n": len(self.nll), "nll": float(self.nll.mean()), "nll_interval": statistics.bootstrap_mean(self.nll)}

    def as_lists(self) -> dict[str, list[float]]:
        return {"nll": [float(v) for v in self.nll]}


def from_lists(values: dict[str, list[float]]) -> PairScores | RowScores:
    """Scores as they were written to the run folder."""
    arrays = {name: numpy.array(column) for name, column in values.items()}
    return RowScores(**arrays) if "nll" in arrays else PairScores(**arrays)


def verdict(
    before: PairScores | RowScores, after: PairScores | RowScores, groups: numpy.ndarray | None = None
) -> dict[str, Any]:
    """Whether training helped on the held-out rows, from the paired difference row by row.

    `groups`, `[n]`, says which prompt each row asks; without it each row is a prompt of its own.
    """
    if isinstance(before, RowScores) and isinstance(after, RowScores):
        gain, what = before.nll - after.nll, "fall of the negative log-likelihood a token"
    elif isinstance(before, PairScores) and isinstance(after, PairScores):
        gain, what = after.margins - before.margins, "rise of the reward margin"
    else:
        raise TypeError("before and after are of two kinds")
    prompts = numpy.arange(len(gain)) if groups is None else groups
    interval = statistics.bootstrap_ratio(gain, numpy.ones(len(gain)), prompts)
    found = statistics.verdict(interval)
    if isinstance(after, PairScores) and found == "better" and after.accuracy_interval(prompts)[0] <= 0.5:
        found = "no evidence"
    return {"verdict": found, "measure": what, "difference": float(gain.mean()), "difference_interval": interval}
