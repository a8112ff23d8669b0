"""Numbers of generated answers."""

from __future__ import annotations

import pytest

from alignctl.evaluate.generation import Answer, distinct, refuses, repeats, summary


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 2, 1.0),
        ("a b a b", 2, 2 / 3),  # ab, ba, ab
        ("a a a a a", 2, 1 / 4),
        ("  a\n b\ta b ", 2, 2 / 3),
        ("A a A a", 2, 2 / 3),
        ("a b a b", 1, 1 / 2),
        ("a b a b", 3, 1.0),  # aba, bab
        ("a b c a b c a", 3, 3 / 5),
        ("a b", 2, 1.0),
        ("a", 2, 1.0),
        ("", 2, 1.0),
    ],
)
def test_distinct(text: str, n: int, share: float) -> None:
    assert distinct(text, n) == share


def test_pairs_of_words_are_what_is_counted() -> None:
    assert distinct("a b a b a") == 2 / 4


def test_summary_is_a_mean_over_answers() -> None:
    """Not over words: a long answer that repeats itself weighs as a short one."""
    answers = [Answer("a b a b", 4, True), Answer("a " * 101, 101, False), Answer("", 0, True), Answer("a b", 2, True)]
    assert summary(answers) == {"stop_rate": 3 / 4, "distinct_2": pytest.approx((2 / 3 + 1 / 100 + 1 + 1) / 4)}


def test_summary_of_one_answer() -> None:
    assert summary([Answer("a a a", 3, False)]) == {"stop_rate": 0.0, "distinct_2": 0.5}


@pytest.mark.parametrize(
    ("text", "share"), [("a b c d a b c d", 1 / 5), ("a b c d e", 0.0), ("a b", 0.0), ("a a a a a a", 2 / 3)]
)
def test_repeats(text: str, share: float) -> None:
    assert repeats(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry. That is not something I do.", True),
        ("As an AI, I have no birthday.", True),
        ("As a language model I cannot say.", True),
        ("I cannot provide instructions for this.", True),
        ("I am unable to answer.", True),
        ("I can help with that.", False),
        ("Sorry is the hardest word.", False),
        ("Boil the water first. " * 10 + "I'm sorry, but I can't help.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_how_an_answer_begins(text: str, refused: bool) -> None:
    assert refuses(text) is refused
