"""Numbers with intervals by prompt, against values derived by hand."""

from __future__ import annotations

import math

import numpy
import pytest

from alignctl import statistics
from alignctl.evaluate import numbers
from alignctl.evaluate.numbers import Estimate, Kind

SHARE = Kind("right", "right", "preferences", "share", "higher")
NATS = Kind("margin", "margin", "preferences", "nats", "higher")


def array(*values: float) -> numpy.ndarray:
    return numpy.array(values, dtype=float)


def alone(count: int) -> numpy.ndarray:
    return numpy.arange(count)


# --- statistics by prompt ------------------------------------------------------------------------------------------


def test_what_belongs_to_a_prompt_is_added() -> None:
    assert statistics.group_sums(array(1, 2, 3, 4), numpy.array([7, 9, 7, 9])).tolist() == [4, 6]


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """Four prompts with 25 equal rows each know as much as four rows, not as a hundred."""
    values, groups = numpy.repeat(array(0, 0, 1, 1), 25), numpy.repeat(alone(4), 25)
    by_prompt = statistics.bootstrap_ratio(values, numpy.ones(100), groups)
    assert by_prompt == statistics.bootstrap_ratio(array(0, 0, 1, 1), numpy.ones(4), alone(4)) == (0.0, 1.0)
    by_row = statistics.bootstrap_ratio(values, numpy.ones(100))
    assert 0.38 < by_row[0] < by_row[1] < 0.62


def test_a_ratio_of_equal_shares_has_no_spread() -> None:
    assert statistics.bootstrap_ratio(array(1, 2, 4), array(2, 4, 8)) == (0.5, 0.5)


def test_equal_shares_get_wilsons_interval_over_the_prompts() -> None:
    assert statistics.share_interval(numpy.ones(60), alone(60)) == statistics.wilson(60, 60)
    assert statistics.share_interval(numpy.ones(60), numpy.repeat(alone(10), 6)) == statistics.wilson(10, 10)
    mixed = array(*[1] * 30 + [0] * 30)
    assert statistics.share_interval(mixed, alone(60)) == statistics.bootstrap_ratio(mixed, numpy.ones(60))


@pytest.mark.parametrize(
    ("differences", "groups", "p"),
    [
        ((1, 1, 1), (0, 1, 2), 2 / 8),  # +++ and --- of eight
        ((3, -1, 1), (0, 1, 2), 6 / 8),  # the sum is 3; 5, 3, 3, 1 and their mirrors can be had
        ((1, 1, 1), (0, 0, 1), 2 / 4),  # two prompts: sums 2 and 1
        ((0, 0), (0, 1), 1.0),
    ],
)
def test_sign_flips_are_counted_one_by_one(differences: tuple[float, ...], groups: tuple[int, ...], p: float) -> None:
    assert statistics.sign_flip_test(array(*differences), numpy.array(groups)) == p


def test_many_prompts_are_flipped_at_random() -> None:
    assert statistics.sign_flip_test(numpy.ones(30), alone(30)) == 1 / 10_001
    noise = numpy.random.default_rng(0).normal(size=200)
    assert statistics.sign_flip_test(noise - noise.mean(), alone(200)) > 0.9


# --- numbers -------------------------------------------------------------------------------------------------------


def test_a_paired_number() -> None:
    found = numbers.paired(NATS, array(0, 1, 2), array(1, 2, 3), alone(3))
    assert found.reference is not None and found.tuned is not None and found.difference is not None
    assert (found.n, found.reference.value, found.tuned.value) == (3, 1.0, 2.0)
    assert (found.difference.value, found.difference.interval, found.difference.p) == (1.0, (1.0, 1.0), 0.25)
    low, high = found.tuned.interval
    assert 1 <= low < 2 < high <= 3


def test_a_number_of_one_model_has_no_difference() -> None:
    found = numbers.paired(NATS, None, array(1, 2), alone(2))
    assert found.reference is None and found.difference is None


def test_what_the_reference_has_by_definition_has_no_interval() -> None:
    found = numbers.against(SHARE, 0.5, array(1, 1, 1, 0), alone(4))
    assert found.reference == Estimate(0.5, (0.5, 0.5))
    assert found.difference is not None and found.difference.value == 0.25
    assert found.difference.p == 10 / 16  # sums of ±½ four times: ±1 in 8, ±2 in 2 of 16


def test_a_ratio_is_of_sums_not_of_shares() -> None:
    found = numbers.ratio(Kind("r", "r", "answers", "ratio"), array(10, 90), array(20, 30), alone(2))
    assert found.tuned is not None and found.tuned.value == 0.5


def test_perplexity_is_over_all_tokens() -> None:
    """Two texts of 1 and 3 tokens: (ln 2 + 3 ln 4) / 4 = 7/4 ln 2 nats a token before, and half of that after."""
    two = math.log(2)
    before, tokens = array(-two, -6 * two), array(1, 3)
    found = numbers.perplexity(NATS, before, before / 2, tokens, alone(2))
    assert found.reference is not None and found.tuned is not None and found.difference is not None
    assert found.reference.value == pytest.approx(2**1.75)
    assert found.tuned.value == pytest.approx(2**0.875)
    assert found.difference.value == pytest.approx(-0.875 * two)
    assert found.reference.interval == pytest.approx((2.0, 4.0))
