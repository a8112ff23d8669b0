"""Scores of held-out rows, one number a row, before and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from alignctl.evaluate import statistics


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

    def summary(self) -> dict[str, Any]:
        """Accuracy (a tie counts half) and margin with 95 % intervals, and mean log-probabilities a token."""
        n = len(self.margins)
        right = float((self.margins > 0).sum() + 0.5 * (self.margins == 0).sum())
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


def verdict(before: PairScores | RowScores, after: PairScores | RowScores) -> dict[str, Any]:
    """Whether training helped on the held-out rows, from the paired difference row by row."""
    if isinstance(before, RowScores) and isinstance(after, RowScores):
        gain, what = before.nll - after.nll, "fall of the negative log-likelihood a token"
    elif isinstance(before, PairScores) and isinstance(after, PairScores):
        gain, what = after.margins - before.margins, "rise of the reward margin"
    else:
        raise TypeError("before and after are of two kinds")
    interval = statistics.bootstrap_mean(gain)
    found = statistics.verdict(interval)
    if isinstance(after, PairScores) and found == "better" and after.summary()["reward_accuracy_interval"][0] <= 0.5:
        found = "no evidence"
    return {"verdict": found, "measure": what, "difference": float(gain.mean()), "difference_interval": interval}
