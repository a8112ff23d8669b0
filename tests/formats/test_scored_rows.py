"""Rows with scored answers: which two become a pair, what a tie is, and what is said of bad scores."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alignctl import formats
from alignctl.formats import Canonical, Dropped, Row, RowError
from alignctl.formats.preference import SCORES, best, by_prompt, score_gap


def scored(*answers: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"response": content, "score": score} for content, score in answers]


def said(row: Canonical) -> tuple[str, str]:
    """The two answers of a pair."""
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def answers(row: dict[str, Any]) -> Canonical:
    shape = formats.detect([row], preference=True)
    assert shape.name == "completions"
    return formats.read(shape, row)


ASK = [{"role": "user", "content": "Name a tea."}]
FOUR = scored(("Cocoa.", 2), ("Oolong.", 9), ("Mate.", 5), ("Beer.", 1))

# As UltraFeedback has them: the fine-grained score is the mean of the ratings, the overall one is a critic's.
CRITIC = [
    {"model": "a", "response": "Cocoa.", "fine-grained_score": 2.5, "overall_score": 10.0, "annotations": {"x": 1}},
    {"model": "b", "response": "Oolong.", "fine-grained_score": 4.75, "overall_score": 8.5, "annotations": {"x": 1}},
    {"model": "c", "response": "Beer.", "fine-grained_score": 1.0, "overall_score": 1.0, "annotations": {"x": 1}},
]
ULTRAFEEDBACK = {"source": "kitchen", "instruction": "Name a tea.", "models": ["a", "b", "c"], "completions": CRITIC}

ROWS: dict[str, tuple[dict[str, Any], Canonical]] = {
    "prompt": (
        {"prompt": "Name a tea.", "completions": scored(("Oolong.", 4), ("Cocoa.", 0.5))},
        {"prompt": ASK, "answers": [{"content": "Oolong.", "score": 4.0}, {"content": "Cocoa.", "score": 0.5}]},
    ),
    "ultrafeedback": (
        ULTRAFEEDBACK,
        {
            "prompt": ASK,
            "answers": [
                {"content": "Cocoa.", "score": 2.5},
                {"content": "Oolong.", "score": 4.75},
                {"content": "Beer.", "score": 1.0},
            ],
        },
    ),
    "system": (
        {"system": "Be short.", "prompt": "Name a tea.", "completions": scored(("Oolong.", 4))},
        {
            "prompt": [{"role": "system", "content": "Be short."}, *ASK],
            "answers": [{"content": "Oolong.", "score": 4.0}],
        },
    ),
    "conversation": (
        {
            "prompt": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yes?"}, *ASK],
            "completions": [{"text": "Oolong.", "rating": "3.5"}],
        },
        {
            "prompt": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, *ASK],
            "answers": [{"content": "Oolong.", "score": 3.5}],
        },
    ),
}


@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=ROWS.keys())
def test_scored_completions(row: dict[str, Any], expected: Canonical) -> None:
    assert answers(row) == expected


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("content", ["response", "content", "text", "answer"])
def test_names_of_answers_and_scores(content: str, score: str) -> None:
    row = {"prompt": "Name a tea.", "completions": [{content: "Oolong.", score: 4}]}
    assert answers(row)["answers"] == [{"content": "Oolong.", "score": 4.0}]


def test_best_against_worst() -> None:
    pair = best(answers({"prompt": "Name a tea.", "completions": FOUR}), "worst", 0, "1")
    assert pair == {
        "prompt": ASK,
        "chosen": [{"role": "assistant", "content": "Oolong."}],
        "rejected": [{"role": "assistant", "content": "Beer."}],
    }


def test_best_against_a_random_one_that_the_seed_decides() -> None:
    row = answers({"prompt": "Name a tea.", "completions": FOUR})
    drawn = [said(best(row, "random", 0, str(seed))) for seed in range(40)]
    assert drawn == [said(best(row, "random", 0, str(seed))) for seed in range(40)]
    assert {chosen for chosen, _ in drawn} == {"Oolong."}
    assert {rejected for _, rejected in drawn} == {"Cocoa.", "Mate.", "Beer."}


def test_a_random_one_is_worse_by_more_than_the_margin() -> None:
    row = answers({"prompt": "Name a tea.", "completions": FOUR})
    drawn = {said(best(row, "random", 5, str(seed)))[1] for seed in range(40)}
    assert drawn == {"Cocoa.", "Beer."}


TIES: dict[str, tuple[list[tuple[str, float]], float, bool]] = {
    "equal": ([("a", 3), ("b", 3)], 0, True),
    "one answer": ([("a", 3)], 0, True),
    "no answer": ([], 0, True),
    "all within the margin": ([("a", 3), ("b", 2.5), ("c", 2)], 1, True),
    "exactly the margin": ([("a", 3), ("b", 2)], 1, True),
    "more than the margin": ([("a", 3), ("b", 1.5)], 1, False),
    "two best ones and a worse": ([("a", 3), ("b", 3), ("c", 1)], 0, False),
    "negative": ([("a", -1), ("b", -2)], 0, False),
}


@pytest.mark.parametrize("rejected", ["worst", "random"])
@pytest.mark.parametrize(("given", "margin", "tie"), TIES.values(), ids=TIES.keys())
def test_ties(given: list[tuple[str, float]], margin: float, tie: bool, rejected: str) -> None:
    row = answers({"prompt": "Name a tea.", "completions": scored(*given)})
    if tie:
        with pytest.raises(Dropped) as dropped:
            best(row, rejected, margin, "1")
        assert dropped.value.reason == "tie"
    else:
        assert said(best(row, rejected, margin, "1")) == ("a", given[-1][0])


def test_the_fine_grained_score_decides_and_columns_may_name_another() -> None:
    assert said(best(answers(ULTRAFEEDBACK), "worst", 0, "1")) == ("Oolong.", "Beer.")
    other = formats.renamed(ULTRAFEEDBACK, {"score": "overall_score"})
    assert said(best(answers(dict(other)), "worst", 0, "1")) == ("Cocoa.", "Beer.")


def test_rows_of_one_answer_are_brought_together_by_prompt() -> None:
    given = [
        {"prompt": "Name a tea.", "response": "Cocoa.", "helpfulness": 1, "verbosity": 4},
        {"prompt": "Name a pot.", "response": "Clay.", "helpfulness": 3, "verbosity": 1},
        {"prompt": "Name a tea.", "response": "Oolong.", "helpfulness": 4, "verbosity": 0},
        {"prompt": "Name a pot.", "response": "Paper.", "helpfulness": 0, "verbosity": 1},
        {"prompt": "Name a tea.", "response": "Mate.", "helpfulness": 2, "verbosity": 2},
        {"prompt": "Name a cup.", "response": "Tin.", "helpfulness": 2, "verbosity": 2},
    ]
    shape = formats.detect(given, preference=True)
    assert (shape.name, shape.per_answer) == ("scored", True)
    together = list(by_prompt((f"tea.csv:{i}", row) for i, row in enumerate(given)))
    assert [place for place, _ in together] == ["tea.csv:0", "tea.csv:1", "tea.csv:5"]
    rows = [formats.read(formats.named("completions"), row) for _, row in together]
    assert [said(best(row, "worst", 0, "1")) for row in rows[:2]] == [("Oolong.", "Cocoa."), ("Clay.", "Paper.")]
    assert rows[0]["prompt"] == ASK
    with pytest.raises(Dropped, match="tie"):
        best(rows[2], "worst", 0, "1")


def test_scored_rows_keep_their_system_message_and_may_ask_with_messages() -> None:
    given = [
        {"system": "Be short.", "prompt": [*ASK], "response": "Cocoa.", "score": "1"},
        {"system": "Be short.", "prompt": [*ASK], "response": "Oolong.", "score": "4.5"},
    ]
    ((_, row),) = by_prompt((str(i), row) for i, row in enumerate(given))
    assert formats.read(formats.named("completions"), row) == {
        "prompt": [{"role": "system", "content": "Be short."}, *ASK],
        "answers": [{"content": "Cocoa.", "score": 1.0}, {"content": "Oolong.", "score": 4.5}],
    }


def grouped(*rows: Row) -> list[tuple[str, Row]]:
    return list(by_prompt((str(i), row) for i, row in enumerate(rows)))


GOOD = {"prompt": "Name a tea.", "response": "Oolong.", "score": 4}
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no response": ({"prompt": "a", "score": 1}, "`response` is missing, expected a string"),
    "null response": ({**GOOD, "response": None}, "`response` is null, expected a string"),
    "no score": ({"prompt": "a", "response": "b"}, "`score` is null, expected a number"),
    "null score": ({**GOOD, "score": None}, "`score` is null, expected a number"),
    "score in words": ({**GOOD, "score": "high"}, "`score` is 'high', expected a number"),
    "NaN": ({**GOOD, "score": math.nan}, "`score` is nan, expected a number"),
    "infinite": ({**GOOD, "score": -math.inf}, "`score` is -inf, expected a number"),
    "NaN in words": ({**GOOD, "score": "NaN"}, "`score` is 'NaN', expected a number"),
    "true": ({**GOOD, "score": True}, "`score` is true/false, expected a number"),
    "list": ({**GOOD, "score": [4]}, "`score` is a list of a number, expected a number"),
    "another column": (
        {"prompt": "a", "response": "b", "helpfulness": 2},
        "`score` is null, expected a number",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_scored_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        grouped(GOOD, row)
    assert str(error.value) == message


BAD_ITEMS: dict[str, tuple[Any, str]] = {
    "string": ("Oolong.", "`completions[1]` is a string, expected an answer with its score"),
    "null": (None, "`completions[1]` is null, expected an answer with its score"),
    "list": ([["a"]], "`completions[1]` is a list of a list of a string, expected an answer with its score"),
    "no answer": ({"score": 1}, "`completions[1]` has no answer, expected one of response, content, text, answer"),
    "no score": (
        {"response": "a"},
        "`completions[1]` has no score, expected one of score, fine-grained_score, overall_score, rating, helpfulness",
    ),
    "null answer": ({"response": None, "score": 1}, "`completions[1]` has response that is null, expected a string"),
    "null score": ({"text": "a", "rating": None}, "`completions[1]` has rating that is null, expected a number"),
    "NaN": ({"text": "a", "score": math.nan}, "`completions[1]` has score that is nan, expected a number"),
    "infinite": ({"text": "a", "score": math.inf}, "`completions[1]` has score that is inf, expected a number"),
    "score in words": ({"text": "a", "score": "N/A"}, "`completions[1]` has score that is 'N/A', expected a number"),
}


@pytest.mark.parametrize(("item", "message"), BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_bad_completions(item: Any, message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.read(formats.named("completions"), {"prompt": "a", "completions": [*scored(("a", 1)), item]})
    assert str(error.value) == message


GAPS: dict[str, tuple[dict[str, Any], float | None]] = {
    "ultrafeedback_binarized": ({"score_chosen": 8.5, "score_rejected": 3.0}, 5.5),
    "other order": ({"chosen_score": "4", "rejected_score": "4"}, 0.0),
    "argilla": ({"chosen_rating": 4, "rejected_rating": 5}, -1.0),
    "argilla, averages": ({"chosen_avg_rating": 4.5, "rejected_avg_rating": 4.25}, 0.25),
    "one score": ({"score_chosen": 8.5}, None),
    "a null": ({"score_chosen": 8.5, "score_rejected": None}, None),
    "none": ({"rating": [9.0, 2.0]}, None),
}


@pytest.mark.parametrize(("row", "gap"), GAPS.values(), ids=GAPS.keys())
def test_score_gap(row: dict[str, Any], gap: float | None) -> None:
    assert score_gap(row) == gap


@pytest.mark.parametrize("value", [math.nan, "high", [1], True], ids=str)
def test_a_given_score_that_is_no_number(value: Any) -> None:
    with pytest.raises(RowError, match=r"`score_rejected` is .*, expected a number"):
        score_gap({"score_chosen": 8.5, "score_rejected": value})


def test_a_score_beyond_any_float() -> None:
    with pytest.raises(RowError, match="expected a number"):
        score_gap({"score_chosen": 10**400, "score_rejected": 1})


def test_completions_that_are_no_list() -> None:
    with pytest.raises(RowError, match="`completions` is a number, expected a list"):
        formats.read(formats.named("completions"), {"prompt": "a", "completions": 4})


def test_the_score_that_has_a_value_counts() -> None:
    # One Arrow struct for all answers has every key in each of them, null where an answer had none.
    item = {"response": None, "text": "Oolong.", "score": None, "rating": 4}
    assert answers({"prompt": "a", "completions": [item]})["answers"] == [{"content": "Oolong.", "score": 4.0}]


def test_answers_under_different_system_messages_are_no_pair() -> None:
    found = grouped({**GOOD, "system": "Be short."}, {**GOOD, "system": "Be long.", "score": 1})
    assert [row["system"] for _, row in found] == ["Be short.", "Be long."]


def test_a_scored_row_without_a_prompt() -> None:
    ((_, row),) = grouped({**GOOD, "prompt": None})
    with pytest.raises(RowError, match="`prompt` is null"):
        formats.read(formats.named("completions"), row)
