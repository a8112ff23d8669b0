"""Shapes of rows: what each becomes, and what is said of a row that fits none."""

from __future__ import annotations

from typing import Any

import pytest

from alignctl import formats
from alignctl.formats import Canonical, RowError


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


STRINGS = "prompt, chosen and rejected as strings"
MESSAGES = "chosen and rejected as messages"

TEA: Canonical = {
    "prompt": [{"role": "user", "content": "How long does tea draw?"}],
    "chosen": [{"role": "assistant", "content": "Three minutes."}],
    "rejected": [{"role": "assistant", "content": "A week."}],
}
TEA_WITH_SYSTEM: Canonical = {**TEA, "prompt": [{"role": "system", "content": "Be short."}, *TEA["prompt"]]}
SECOND_CUP: Canonical = {
    "prompt": [
        {"role": "user", "content": "How long does tea draw?"},
        {"role": "assistant", "content": "Three minutes."},
        {"role": "user", "content": "And the second cup?"},
    ],
    "chosen": [{"role": "assistant", "content": "Five."}],
    "rejected": [{"role": "assistant", "content": "None."}],
}

ask, good, bad = user("How long does tea draw?"), assistant("Three minutes."), assistant("A week.")
history = [ask, good, user("And the second cup?")]
plain = {"prompt": "How long does tea draw?", "chosen": "Three minutes.", "rejected": "A week."}

PREFERENCE: dict[str, tuple[dict[str, Any], str, Canonical]] = {
    "strings": (plain, STRINGS, TEA),
    "strings and a column that nobody reads": ({**plain, "score": 7}, STRINGS, TEA),
    "strings with a system column": ({**plain, "system": "Be short."}, STRINGS, TEA_WITH_SYSTEM),
    "strings with an empty system column": ({**plain, "system": ""}, STRINGS, TEA),
    "strings with a null system column": ({**plain, "system": None}, STRINGS, TEA),
    "explicit prompt": ({"prompt": [ask], "chosen": [good], "rejected": [bad]}, MESSAGES, TEA),
    "explicit prompt with a system message": (
        {"prompt": [system("Be short."), ask], "chosen": [good], "rejected": [bad]},
        MESSAGES,
        TEA_WITH_SYSTEM,
    ),
    "explicit prompt of three turns": (
        {"prompt": history, "chosen": [assistant("Five.")], "rejected": [assistant("None.")]},
        MESSAGES,
        SECOND_CUP,
    ),
    "explicit prompt that the answers repeat": (
        {"prompt": [ask], "chosen": [ask, good], "rejected": [ask, bad]},
        MESSAGES,
        TEA,
    ),
    "explicit prompt that the answers go on from": (
        {"prompt": [system("Be short.")], "chosen": [ask, good], "rejected": [ask, bad]},
        MESSAGES,
        TEA_WITH_SYSTEM,
    ),
    "implicit prompt": ({"chosen": [ask, good], "rejected": [ask, bad]}, MESSAGES, TEA),
    "implicit prompt with a system message": (
        {"chosen": [system("Be short."), ask, good], "rejected": [system("Be short."), ask, bad]},
        MESSAGES,
        TEA_WITH_SYSTEM,
    ),
    "implicit prompt of three turns": (
        {"chosen": [*history, assistant("Five.")], "rejected": [*history, assistant("None.")]},
        MESSAGES,
        SECOND_CUP,
    ),
    "string prompt that the answers repeat": (
        {"prompt": "How long does tea draw?", "chosen": [ask, good], "rejected": [ask, bad]},
        MESSAGES,
        TEA,
    ),
    "string prompt and a longer history": (
        {
            "prompt": "How long does tea draw?",
            "chosen": [*history, assistant("Five.")],
            "rejected": [*history, assistant("None.")],
        },
        MESSAGES,
        SECOND_CUP,
    ),
    "string prompt and bare answers": (
        {"prompt": "How long does tea draw?", "chosen": [good], "rejected": [bad]},
        MESSAGES,
        TEA,
    ),
    "messages with a system column": (
        {"system": "Be short.", "chosen": [ask, good], "rejected": [ask, bad]},
        MESSAGES,
        TEA_WITH_SYSTEM,
    ),
    "messages with a system column and bare answers": (
        {"system": "Be short.", "prompt": "How long does tea draw?", "chosen": [good], "rejected": [bad]},
        MESSAGES,
        TEA_WITH_SYSTEM,
    ),
    "messages that begin with a system message, and a system column": (
        {
            "system": "Be long.",
            "chosen": [system("Be short."), ask, good],
            "rejected": [system("Be short."), ask, bad],
        },
        MESSAGES,
        TEA_WITH_SYSTEM,
    ),
    "messages that carry further keys": (
        {"chosen": [{**ask, "id": 4}, good], "rejected": [{**ask, "id": 5}, bad]},
        MESSAGES,
        TEA,
    ),
}

SFT: dict[str, tuple[dict[str, Any], str, Canonical]] = {
    "messages": (
        {"messages": [system("Be short."), ask, good]},
        "messages",
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "How long does tea draw?"},
                {"role": "assistant", "content": "Three minutes."},
            ]
        },
    ),
    "messages win over prompt and completion": (
        {"prompt": "x", "completion": "y", "messages": [ask, good]},
        "messages",
        {"messages": [ask, good]},
    ),
    "prompt and completion": (
        {"prompt": "How long does tea draw?", "completion": "Three minutes."},
        "prompt and completion",
        {"messages": [ask, good]},
    ),
    "prompt and completion as messages": (
        {"prompt": [system("Be short."), ask], "completion": [good]},
        "prompt and completion",
        {"messages": [system("Be short."), ask, good]},
    ),
    "prompt and completion as messages, several turns": (
        {"prompt": history, "completion": [assistant("Five.")]},
        "prompt and completion",
        {"messages": [ask, good, user("And the second cup?"), assistant("Five.")]},
    ),
    "messages with a system column": (
        {"system": "Be short.", "messages": [ask, good]},
        "messages",
        {"messages": [system("Be short."), ask, good]},
    ),
    "messages that begin with a system message, and a system column": (
        {"system": "Be long.", "messages": [system("Be short."), ask, good]},
        "messages",
        {"messages": [system("Be short."), ask, good]},
    ),
    "prompt and completion with a system column": (
        {"system": "Be short.", "prompt": "How long does tea draw?", "completion": "Three minutes."},
        "prompt and completion",
        {"messages": [system("Be short."), ask, good]},
    ),
    "prompt and completion as messages, with a system column": (
        {"system": "Be short.", "prompt": [ask], "completion": [good]},
        "prompt and completion",
        {"messages": [system("Be short."), ask, good]},
    ),
}


@pytest.mark.parametrize(("row", "name", "expected"), PREFERENCE.values(), ids=PREFERENCE.keys())
def test_preference_rows(row: dict[str, Any], name: str, expected: Canonical) -> None:
    found = formats.detect(row, preference=True)
    assert found.name == name
    assert found.read(row) == expected


@pytest.mark.parametrize(("row", "name", "expected"), SFT.values(), ids=SFT.keys())
def test_rows_for_sft(row: dict[str, Any], name: str, expected: Canonical) -> None:
    found = formats.detect(row, preference=False)
    assert found.name == name
    assert found.read(row) == expected


def test_reading_leaves_the_row_alone() -> None:
    row = {"prompt": [ask], "chosen": [{**ask, "id": 4}, good], "rejected": [ask, bad]}
    formats.detect(row, preference=True).read(row)
    assert row == {"prompt": [ask], "chosen": [{**ask, "id": 4}, good], "rejected": [ask, bad]}


def test_the_chosen_answer_ends_the_dialogue() -> None:
    assert formats.chosen_dialogue(SECOND_CUP) == {"messages": [*history, assistant("Five.")]}


KINDS: dict[str, tuple[Any, str]] = {
    "null": (None, "missing"),
    "number": (3, "a number"),
    "fraction": (0.5, "a number"),
    "truth": (True, "true/false"),
    "object": ({"text": "a"}, "an object"),
    "empty list": ([], "an empty list"),
    "list": (["a"], "a list of a string"),
    "list of objects": ([ask], "a list of an object"),
}


@pytest.mark.parametrize(("value", "kind"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_column_that_is_no_string(column: str, value: Any, kind: str) -> None:
    with pytest.raises(RowError) as error:
        formats.PREFERENCE[0].read({**plain, column: value})
    assert str(error.value) == f"`{column}` is {kind}, expected a string"


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(RowError) as error:
        formats.PREFERENCE[0].read({"prompt": "a", "chosen": "b"})
    assert str(error.value) == "`rejected` is missing, expected a string"


@pytest.mark.parametrize(("value", "kind"), [(3, "a number"), (["a"], "a list of a string"), (True, "true/false")])
def test_a_system_column_that_is_no_string(value: Any, kind: str) -> None:
    with pytest.raises(RowError) as error:
        formats.PREFERENCE[0].read({**plain, "system": value})
    assert str(error.value) == f"`system` is {kind}, expected a string"


LISTS: dict[str, tuple[Any, str]] = {
    "null": (None, "`chosen` is missing, expected a list of messages"),
    "string": ("Three.", "`chosen` is a string, expected a list of messages"),
    "empty list": ([], "`chosen` is an empty list, expected a list of messages"),
    "object": (ask, "`chosen` is an object, expected a list of messages"),
    "strings": ([ask, "Three."], "`chosen[1]` is a string, expected {role, content}"),
    "nulls": ([ask, None], "`chosen[1]` is missing, expected {role, content}"),
    "bad role": (
        [ask, {"role": "gpt", "content": "a"}],
        "`chosen[1]` has role 'gpt', expected one of system, user, assistant",
    ),
    "no role": ([{"content": "a"}], "`chosen[0]` has role None, expected one of system, user, assistant"),
    "foreign keys": (
        [{"from": "human", "value": "a"}],
        "`chosen[0]` has role None, expected one of system, user, assistant",
    ),
    "no content": ([{"role": "user"}], "`chosen[0]` has content that is missing, expected a string"),
    "content in parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "`chosen[0]` has content that is a list of an object, expected a string",
    ),
    "ends with a user turn": ([ask, good, ask], "`chosen` ends with the role user, expected assistant"),
    "ends with a system turn": ([ask, system("a")], "`chosen` ends with the role system, expected assistant"),
    "another history": (
        [user("How long?"), good],
        "`chosen` and `rejected` differ before their last message, expected one common history",
    ),
    "a longer history": (
        [*history, good],
        "`chosen` and `rejected` differ before their last message, expected one common history",
    ),
}


@pytest.mark.parametrize(("chosen", "message"), LISTS.values(), ids=LISTS.keys())
def test_answers_that_are_no_good_messages(chosen: Any, message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.PREFERENCE[1].read({"chosen": chosen, "rejected": [ask, bad]})
    assert str(error.value) == message


def test_rejected_is_looked_at_too() -> None:
    with pytest.raises(RowError) as error:
        formats.PREFERENCE[1].read({"chosen": [ask, good], "rejected": [ask, bad, ask]})
    assert str(error.value) == "`rejected` ends with the role user, expected assistant"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "`prompt` is missing, expected a string"),
        ({"prompt": 3}, "`prompt` is a number, expected a string"),
        ({"prompt": []}, "`prompt` is an empty list, expected a list of messages"),
        ({"prompt": ["a"]}, "`prompt[0]` is a string, expected {role, content}"),
    ],
)
def test_bare_answers_need_a_prompt(prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.PREFERENCE[1].read({"chosen": [good], "rejected": [bad], **prompt})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "a"}, "`messages` is a string, expected a list of messages"),
        ({"messages": []}, "`messages` is an empty list, expected a list of messages"),
        ({"messages": None}, "`messages` is missing, expected a list of messages"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "`messages[0]` has role 'tool', expected one of system, user, assistant",
        ),
        ({"prompt": "a", "completion": 3}, "`completion` is a number, expected a string"),
        ({"prompt": None, "completion": "a"}, "`prompt` is missing, expected a string"),
        ({"prompt": "a", "completion": [good]}, "`completion` is a list of an object, expected a string"),
        ({"prompt": [ask], "completion": "a"}, "`completion` is a string, expected a list of messages"),
    ],
)
def test_faults_in_rows_for_sft(row: dict[str, Any], message: str) -> None:
    found = formats.detect(row, preference=False)
    with pytest.raises(RowError) as error:
        found.read(row)
    assert str(error.value) == message


PAIR_FORMATS = f"expected “{STRINGS}” or “{MESSAGES}”"
SFT_FORMATS = "expected “messages” or “prompt and completion”"


@pytest.mark.parametrize(
    ("row", "preference", "message"),
    [
        (
            {"question": "a", "answer": 3},
            True,
            f"columns are `question` (a string), `answer` (a number), {PAIR_FORMATS}",
        ),
        ({"prompt": "a", "chosen": "b"}, True, f"columns are `prompt` (a string), `chosen` (a string), {PAIR_FORMATS}"),
        ({"chosen": [ask, good]}, True, f"columns are `chosen` (a list of an object), {PAIR_FORMATS}"),
        ({"messages": [ask, good]}, True, f"columns are `messages` (a list of an object), {PAIR_FORMATS}"),
        ({}, True, f"columns are none, {PAIR_FORMATS}"),
        (
            plain,
            False,
            f"columns are `prompt` (a string), `chosen` (a string), `rejected` (a string), {SFT_FORMATS}",
        ),
        ({"text": "a"}, False, f"columns are `text` (a string), {SFT_FORMATS}"),
        ({}, False, f"columns are none, {SFT_FORMATS}"),
    ],
)
def test_columns_that_no_format_has(row: dict[str, Any], preference: bool, message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.detect(row, preference=preference)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"chosen": "Question: a Answer: b", "rejected": "Question: a Answer: c"}, "a string"),
        ({**plain, "chosen": None}, "missing"),
        ({**plain, "chosen": 3}, "a number"),
    ],
    ids=["strings without a prompt", "null", "number"],
)
def test_right_columns_of_the_wrong_kind_are_named_by_their_kind(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(RowError) as error:
        formats.detect(row, preference=True)
    assert kind in str(error.value)
