"""Intervals and verdicts against numbers derived by hand."""

from __future__ import annotations

import numpy
import pytest

from alignctl import statistics
from alignctl.evaluate import scores


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(60, 60, (0.93982, 1.0)), (0, 10, (0.0, 0.27754)), (5, 10, (0.23659, 0.76341))],
)
def test_wilson(successes: float, n: int, expected: tuple[float, float]) -> None:
    """Five of ten: z² = 3.8415, centre 1/2, half-width z·sqrt(0.025 + z²/400)/(1 + z²/10) = 0.26341."""
    assert statistics.wilson(successes, n) == pytest.approx(expected, abs=1e-5)


def test_bootstrap_covers_the_mean_and_is_repeatable() -> None:
    values = numpy.random.default_rng(1).normal(3.0, 1.0, 400)
    low, high = statistics.bootstrap_mean(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert statistics.bootstrap_mean(values) == (low, high)


@pytest.mark.parametrize(
    ("interval", "said"), [((0.1, 0.3), "better"), ((-0.1, 0.3), "no evidence"), ((-0.3, -0.1), "worse")]
)
def test_verdict(interval: tuple[float, float], said: str) -> None:
    assert statistics.verdict(interval) == said


def pair_scores(margins: list[float]) -> scores.PairScores:
    chosen = numpy.array(margins)
    return scores.PairScores(chosen, numpy.zeros(len(margins)), chosen, chosen)


def test_a_tie_counts_half() -> None:
    assert pair_scores([1.0, 0.0, -1.0, 0.0]).summary()["reward_accuracy"] == 0.5


def test_better_needs_an_accuracy_above_one_half() -> None:
    """Margins that rise but stay on the wrong side are no evidence that preferences were learned."""
    before, after = pair_scores([-3.0] * 40), pair_scores([-1.0] * 40)
    assert scores.verdict(before, after)["verdict"] == "no evidence"
    assert scores.verdict(before, pair_scores([1.0] * 40))["verdict"] == "better"
    assert scores.verdict(after, before)["verdict"] == "worse"


def test_sft_is_better_when_likelihood_rises() -> None:
    before, after = scores.RowScores(numpy.full(30, 4.0)), scores.RowScores(numpy.full(30, 3.0))
    found = scores.verdict(before, after)
    assert (found["verdict"], found["difference"]) == ("better", 1.0)
    assert scores.verdict(after, before)["verdict"] == "worse"


def test_scores_survive_the_run_folder() -> None:
    for kept in (pair_scores([1.0, -2.0]), scores.RowScores(numpy.array([0.5]))):
        again = scores.from_lists(kept.as_lists())
        assert type(again) is type(kept) and again.as_lists() == kept.as_lists()


def test_two_kinds_are_not_compared() -> None:
    with pytest.raises(TypeError):
        scores.verdict(pair_scores([1.0]), scores.RowScores(numpy.array([1.0])))
