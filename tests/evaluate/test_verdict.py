"""One word for a run, from answers and from voices."""

from __future__ import annotations

import pytest

from alignctl.evaluate import verdict
from alignctl.evaluate.generation import Answer
from alignctl.evaluate.verdict import Voice

FRESH, REPEATS = "one two three four five six", "again and again and again and again and again"


def answers(text: str, ending: int, of: int = 4) -> list[Answer]:
    return [Answer(text, 6, i < ending) for i in range(of)]


def test_answers_that_repeat_themselves_have_collapsed() -> None:
    said = verdict.collapsed(answers(FRESH, 4), answers(REPEATS, 4))
    assert said == "answers repeat themselves: 25% of their word pairs are new, 100% before"


def test_answers_that_always_repeated_themselves_have_not() -> None:
    assert verdict.collapsed(answers(REPEATS, 4), answers(REPEATS, 4)) == ""


@pytest.mark.parametrize(("ending", "said"), [(2, "answers no longer end: 50% do, 100% did before"), (3, "")])
def test_answers_that_no_longer_end_have_collapsed(ending: int, said: str) -> None:
    assert verdict.collapsed(answers(FRESH, 4), answers(FRESH, ending)) == said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no evidence"),
        (["no evidence", "no evidence"], "no evidence"),
        (["no evidence", "better"], "better"),
        (["better", "worse"], "worse"),
    ],
)
def test_one_voice_for_worse_outweighs_those_for_better(words: list[verdict.Word], expected: str) -> None:
    found = verdict.conclude([], [Voice(word, f"said {word}") for word in words])
    assert found.word == expected
    assert found.reason == (
        "; ".join(f"said {w}" for w in words if w == expected) or "nothing was measured that could tell"
    )


def test_what_is_broken_is_not_better() -> None:
    found = verdict.conclude(["answers no longer end"], [Voice("better", "rise of the reward margin")])
    assert (found.word, found.reason) == ("broken", "answers no longer end")
