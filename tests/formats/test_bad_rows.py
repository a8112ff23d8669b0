"""Preference rows that cannot be read: the message names the column, what was found and what was expected."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alignctl import formats
from alignctl.formats import RowError
from alignctl.formats.preference import transcript
from alignctl.formats.rows import kind, number

ask, good, bad = ({"role": role, "content": "a"} for role in ("user", "assistant", "assistant"))
plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
ROLES = "system, user, human, prompter, assistant, gpt, chatgpt, model, bot"
HALF = "a\ud83cb"  # half of a surrogate pair: JSON may say it, UTF-8 may not


def message_of(name: str, row: dict[str, Any]) -> str:
    """What is said of `row`, read as `name`."""
    with pytest.raises(RowError) as error:
        formats.read(formats.named(name), row)
    return str(error.value)


KINDS: dict[str, tuple[Any, str]] = {
    "null": (None, "null"),
    "string": ("a", "a string"),
    "number": (3, "a number"),
    "fraction": (0.5, "a number"),
    "truth": (True, "true/false"),
    "object": ({"text": "a"}, "an object"),
    "empty list": ([], "an empty list"),
    "list": (["a"], "a list of a string"),
    "list of objects": ([ask], "a list of an object"),
    "list of nulls": ([None], "a list of null"),
    "list of lists": ([[1]], "a list of a list of a number"),
    "list of empty lists": ([[]], "a list of an empty list"),
    "bytes": (b"a", "an object"),
}
NO_STRINGS = {name: (value, found) for name, (value, found) in KINDS.items() if name not in ("null", "string")}


@pytest.mark.parametrize(("value", "found"), KINDS.values(), ids=KINDS.keys())
def test_kinds_in_words(value: Any, found: str) -> None:
    assert kind(value) == found


@pytest.mark.parametrize(("value", "found"), NO_STRINGS.values(), ids=NO_STRINGS.keys())
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected", "system"])
def test_a_column_that_is_no_string(column: str, value: Any, found: str) -> None:
    if column == "system" and not value:  # an empty system column is none
        return
    said = message_of("prompt-chosen-rejected", {**plain, column: value})
    assert said == f"`{column}` is {found}, expected a string"


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_column_that_is_null(column: str) -> None:
    assert message_of("prompt-chosen-rejected", {**plain, column: None}) == f"`{column}` is null, expected a value"


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_column_that_is_not_there(column: str) -> None:
    row = {name: value for name, value in plain.items() if name != column}
    columns = ", ".join(f"`{name}` (a string)" for name in row)
    assert message_of("prompt-chosen-rejected", row) == f"`{column}` is missing; columns are {columns}"


LISTS: dict[str, tuple[Any, str]] = {
    "null": (None, "`chosen` is null, expected a value"),
    "string": ("Three.", "`chosen` is a string, expected a list of messages"),
    "empty list": ([], "`chosen` is an empty list, expected a list of messages"),
    "object": (ask, "`chosen` is an object, expected a list of messages"),
    "strings": ([ask, "Three."], "`chosen[1]` is a string, expected {role, content} or {from, value}"),
    "nulls": ([ask, None], "`chosen[1]` is null, expected {role, content} or {from, value}"),
    "lists": ([[ask, good]], "`chosen[0]` is a list of an object, expected {role, content} or {from, value}"),
    "numbers": ([1, 2], "`chosen[0]` is a number, expected {role, content} or {from, value}"),
    "unknown role": ([ask, {"role": "tool", "content": "a"}], f"`chosen[1]` has role 'tool', expected one of {ROLES}"),
    "null role": ([{"role": None, "content": "a"}], f"`chosen[0]` has role None, expected one of {ROLES}"),
    "role a number": ([{"role": 1, "content": "a"}], f"`chosen[0]` has role 1, expected one of {ROLES}"),
    "unknown speaker": ([{"from": "tool", "value": "a"}], f"`chosen[0]` has role 'tool', expected one of {ROLES}"),
    "no role": ([{"content": "a"}], "`chosen[0]` is an object, expected {role, content} or {from, value}"),
    "empty object": ([{}], "`chosen[0]` is an object, expected {role, content} or {from, value}"),
    "no content": ([{"role": "user"}], "`chosen[0]` has content that is null, expected a string"),
    "no value": ([{"from": "human"}], "`chosen[0]` has value that is null, expected a string"),
    "content a number": (
        [{"role": "user", "content": 4}],
        "`chosen[0]` has content that is a number, expected a string",
    ),
    "content in parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "`chosen[0]` has content that is a list of an object, expected a string",
    ),
    "half a character": (
        [{"role": "user", "content": HALF}],
        "`chosen[0]` has content that is no text: character 2 is half of a surrogate pair",
    ),
}


@pytest.mark.parametrize(("chosen", "message"), LISTS.values(), ids=LISTS.keys())
def test_answers_that_are_no_good_messages(chosen: Any, message: str) -> None:
    assert message_of("conversational", {"chosen": chosen, "rejected": [ask, bad]}) == message


def test_a_long_role_is_cut_short() -> None:
    said = message_of("conversational", {"chosen": [{"role": "x" * 500, "content": "a"}], "rejected": [ask, bad]})
    assert said == f"`chosen[0]` has role '{'x' * 39}, expected one of {ROLES}"


def test_rejected_is_looked_at_too() -> None:
    said = message_of("conversational", {"chosen": [ask, good], "rejected": [ask, {"role": "assistant", "content": 1}]})
    assert said == "`rejected[1]` has content that is a number, expected a string"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "`prompt` is missing, expected a string"),
        ({"prompt": None}, "`prompt` is null, expected a string"),
        ({"prompt": 3}, "`prompt` is a number, expected a string or a list of messages"),
        ({"prompt": []}, "`prompt` is an empty list, expected a list of messages"),
        ({"prompt": ["a"]}, "`prompt[0]` is a string, expected {role, content} or {from, value}"),
    ],
    ids=str,
)
def test_bare_answers_need_a_prompt(prompt: dict[str, Any], message: str) -> None:
    assert message_of("conversational", {"chosen": [good], "rejected": [bad], **prompt}) == message


@pytest.mark.parametrize("prompt", [3, {"role": "user", "content": "a"}, True], ids=["number", "object", "true"])
def test_a_broken_prompt_beside_whole_conversations(prompt: Any) -> None:
    said = message_of("conversational", {"prompt": prompt, "chosen": [ask, good], "rejected": [ask, bad]})
    assert said.startswith("`prompt` is ")


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected", "system"])
def test_half_of_a_surrogate_pair(column: str) -> None:
    said = message_of("prompt-chosen-rejected", {**plain, column: HALF})
    assert said == f"`{column}` is no text: character 2 is half of a surrogate pair"


def test_a_whole_surrogate_pair_is_text() -> None:
    row = formats.read(formats.named("prompt-chosen-rejected"), {**plain, "prompt": "a\U0001f33fb"})
    assert row["prompt"][0]["content"] == "a🌿b"


@pytest.mark.parametrize("text", ["", "   ", "Hello.", "Hello.\n\nHuman: a\n\nAssistant: b", "human: a", "Humans: a"])
def test_text_that_is_no_transcript(text: str) -> None:
    with pytest.raises(RowError) as error:
        transcript(text, "`chosen` is")
    assert str(error.value) == "`chosen` is not a transcript, expected text that begins with “Human:”"


TRANSCRIPTS: dict[str, tuple[dict[str, Any], str]] = {
    "one side is none": (
        {"chosen": "Human: a\n\nAssistant: b", "rejected": "c"},
        "`rejected` is not a transcript, expected text that begins with “Human:”",
    ),
    "one side is a list": (
        {"chosen": "Human: a\n\nAssistant: b", "rejected": [ask, bad]},
        "`rejected` is a list of an object, expected a string",
    ),
    "one side is null": (
        {"chosen": "Human: a\n\nAssistant: b", "rejected": None},
        "`rejected` is null, expected a value",
    ),
    "answers in lists": (
        {"prompt": "Human: a\n\nAssistant:", "chosen": ["b"], "rejected": "c"},
        "`chosen` is a list of a string, expected a string",
    ),
    "half a character": (
        {"chosen": f"Human: {HALF}\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"},
        "`chosen` is no text: character 9 is half of a surrogate pair",
    ),
}


@pytest.mark.parametrize(("row", "message"), TRANSCRIPTS.values(), ids=TRANSCRIPTS.keys())
def test_bad_transcripts(row: dict[str, Any], message: str) -> None:
    assert message_of("hh", row) == message


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3.0), (0.25, 0.25), (-1, -1.0), ("4.5", 4.5), (" 7 ", 7.0), ("-1e-3", -0.001), (0, 0.0)]
)
def test_numbers(value: Any, expected: float) -> None:
    assert number(value, "it is") == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("nan", "'nan'"),
        ("Infinity", "'Infinity'"),
        ("1e999", "'1e999'"),
        ("", "''"),
        ("4,5", "'4,5'"),
        ("five", "'five'"),
        ("x" * 99, "'" + "x" * 39),
        (None, "null"),
        (True, "true/false"),
        ([3], "a list of a number"),
        ({"score": 3}, "an object"),
    ],
    ids=repr,
)
def test_what_is_no_number(value: Any, shown: str) -> None:
    with pytest.raises(RowError) as error:
        number(value, "`score` is")
    assert str(error.value) == f"`score` is {shown}, expected a number"
