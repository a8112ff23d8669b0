"""The recipe's `columns`: columns under other names, and a score that stands inside `completions`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from alignctl import formats
from alignctl.formats import RowError

ROWS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "nothing": ({"prompt": "a", "b": 1}, {}, {"prompt": "a", "b": 1}),
    "one": ({"query": "a", "chosen": "b"}, {"prompt": "query"}, {"chosen": "b", "prompt": "a"}),
    "three": (
        {"query": "a", "good": "b", "bad": "c", "id": 4},
        {"prompt": "query", "chosen": "good", "rejected": "bad"},
        {"id": 4, "prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "to its own name": ({"prompt": "a"}, {"prompt": "prompt"}, {"prompt": "a"}),
    "to a name that exists": ({"prompt": "an id", "query": "a"}, {"prompt": "query"}, {"prompt": "a"}),
    "two that swap": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": "rejected", "rejected": "chosen"},
        {"prompt": "a", "chosen": "c", "rejected": "b"},
    ),
    "a chain": (
        {"prompt": "p", "question": "q"},
        {"prompt": "question", "text": "prompt"},
        {"prompt": "q", "text": "p"},
    ),
    "one column under two names": ({"a": "x"}, {"prompt": "a", "text": "a"}, {"prompt": "x", "text": "x"}),
    "a null stays": ({"a": None}, {"prompt": "a"}, {"prompt": None}),
    "a score of the row": (
        {"prompt": "a", "response": "b", "quality": 3},
        {"score": "quality"},
        {"prompt": "a", "response": "b", "score": 3},
    ),
    "a score inside completions": (
        {"instruction": "a", "completions": [{"response": "b", "overall_score": 3, "rating": 1, "model": "m"}]},
        {"score": "overall_score"},
        {"instruction": "a", "completions": [{"response": "b", "model": "m", "score": 3}]},
    ),
    "a score inside completions under another name": (
        {
            "q": "a",
            "outputs": [{"response": "b", "quality": 3, "score": 9}, {"response": "c", "quality": 1, "score": 8}],
        },
        {"prompt": "q", "completions": "outputs", "score": "quality"},
        {
            "prompt": "a",
            "completions": [{"response": "b", "quality": 3, "score": 3}, {"response": "c", "quality": 1, "score": 1}],
        },
    ),
}


@pytest.mark.parametrize(("row", "columns", "expected"), ROWS.values(), ids=ROWS.keys())
def test_renamed(row: dict[str, Any], columns: dict[str, str], expected: dict[str, Any]) -> None:
    before = deepcopy(row)
    assert formats.renamed(row, columns) == expected
    assert row == before


MISSING: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "a column": ({"a": "x", "b": "y"}, {"prompt": "query"}, "`columns` names `query`, but the columns are a, b"),
    "the first of two": (
        {"a": "x"},
        {"prompt": "query", "chosen": "good"},
        "`columns` names `query`, but the columns are a",
    ),
    "one of two": ({"a": "x"}, {"prompt": "a", "chosen": "good"}, "`columns` names `good`, but the columns are a"),
    "a score of the row": (
        {"prompt": "a", "response": "b"},
        {"score": "quality"},
        "`columns` names `quality`, but the columns are prompt, response",
    ),
    "a column beside completions": (
        {"completions": [{"response": "b", "score": 1}]},
        {"prompt": "query"},
        "`columns` names `query`, but the columns are completions",
    ),
    "a column and a score inside": (
        {"completions": [{"response": "b", "quality": 1}]},
        {"prompt": "query", "score": "quality"},
        "`columns` names `query`, but the columns are completions",
    ),
    "a score inside": (
        {"completions": [{"response": "b", "quality": 1}, {"response": "c"}]},
        {"score": "quality"},
        "`completions[1]` is without `quality`, which `columns` names",
    ),
    "a score inside a string": (
        {"completions": ["b"]},
        {"score": "quality"},
        "`completions[0]` is without `quality`, which `columns` names",
    ),
}


@pytest.mark.parametrize(("row", "columns", "message"), MISSING.values(), ids=MISSING.keys())
def test_columns_that_are_not_there(row: dict[str, Any], columns: dict[str, str], message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.renamed(row, columns)
    assert str(error.value) == message


def test_renaming_resolves_what_two_shapes_fit() -> None:
    row = {"prompt": "an id", "question": "Tea?", "chosen": "b", "rejected": "c"}
    with pytest.raises(RowError, match="say which in the recipe"):
        formats.detect([row], preference=True)
    mine = formats.renamed(row, {"prompt": "question"})
    shape = formats.detect([mine], preference=True)
    assert formats.read(shape, mine)["prompt"] == [{"role": "user", "content": "Tea?"}]


def test_renaming_finds_the_shape_that_was_hinted_at() -> None:
    row = {"query": "Tea?", "chosen": "b", "rejected": "c"}
    mine = formats.renamed(row, {"prompt": "query"})
    assert formats.detect([mine], preference=True).name == "prompt-chosen-rejected"
