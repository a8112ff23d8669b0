"""Rows for supervised fine-tuning, and the canonical rows that they become."""

from __future__ import annotations

from copy import deepcopy
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


def foreign(who: str, said: str) -> dict[str, str]:
    return {"from": who, "value": said}


ask, good = user("How long does tea draw?"), assistant("Three minutes.")
history = [ask, good, user("And the second cup?")]
plain = {"prompt": "How long does tea draw?", "completion": "Three minutes."}
task = {"instruction": "Mend the sentence.", "output": "Tea is hot."}

TEA: Canonical = {
    "messages": [
        {"role": "user", "content": "How long does tea draw?"},
        {"role": "assistant", "content": "Three minutes."},
    ]
}
TEA_WITH_SYSTEM: Canonical = {"messages": [{"role": "system", "content": "Be short."}, *TEA["messages"]]}
MENDED: Canonical = {
    "messages": [
        {"role": "user", "content": "Mend the sentence.\n\nTea are hot."},
        {"role": "assistant", "content": "Tea is hot."},
    ]
}

ROWS: dict[str, tuple[dict[str, Any], str, Canonical]] = {
    "messages": ({"messages": [ask, good]}, "messages", TEA),
    "messages with a system message": ({"messages": [system("Be short."), ask, good]}, "messages", TEA_WITH_SYSTEM),
    "messages with a system column": ({"system": "Be short.", "messages": [ask, good]}, "messages", TEA_WITH_SYSTEM),
    "messages with a system message and a system column": (
        {"system": "Be long.", "messages": [system("Be short."), ask, good]},
        "messages",
        TEA_WITH_SYSTEM,
    ),
    "messages under from and value": (
        {"messages": [foreign("human", ask["content"]), foreign("gpt", good["content"])]},
        "messages",
        TEA,
    ),
    "messages with further keys": ({"messages": [{**ask, "id": 1}, {**good, "tool_calls": None}]}, "messages", TEA),
    "messages beside a prompt": (
        {"prompt": "How long does tea draw?", "prompt_id": "9f6c", "messages": [ask, good]},
        "messages",
        TEA,
    ),
    "messages that end with a question": ({"messages": history}, "messages", {"messages": history}),
    "prompt and completion": (plain, "prompt-completion", TEA),
    "prompt and completion with a system column": (
        {"system": "Be short.", **plain},
        "prompt-completion",
        TEA_WITH_SYSTEM,
    ),
    "prompt and completion as messages": ({"prompt": [ask], "completion": [good]}, "prompt-completion", TEA),
    "prompt and completion as messages, a system message": (
        {"prompt": [system("Be short."), ask], "completion": [good]},
        "prompt-completion",
        TEA_WITH_SYSTEM,
    ),
    "prompt and completion as messages, a system column": (
        {"system": "Be short.", "prompt": [ask], "completion": [good]},
        "prompt-completion",
        TEA_WITH_SYSTEM,
    ),
    "prompt and completion as messages, several turns": (
        {"prompt": history, "completion": [assistant("Five.")]},
        "prompt-completion",
        {"messages": [ask, good, user("And the second cup?"), assistant("Five.")]},
    ),
    "alpaca": (
        task,
        "alpaca",
        {"messages": [user("Mend the sentence."), assistant("Tea is hot.")]},
    ),
    "alpaca, input": ({**task, "input": "Tea are hot."}, "alpaca", MENDED),
    "alpaca, input empty": (
        {**task, "input": ""},
        "alpaca",
        {"messages": [user("Mend the sentence."), assistant("Tea is hot.")]},
    ),
    "alpaca, system and history": (
        {**task, "input": "Tea are hot.", "system": "Be short.", "history": [["Hello.", "Good day."]]},
        "alpaca",
        {"messages": [system("Be short."), user("Hello."), assistant("Good day."), *MENDED["messages"]]},
    ),
    "sharegpt": (
        {"id": "a", "conversations": [foreign("human", ask["content"]), foreign("gpt", good["content"])]},
        "sharegpt",
        TEA,
    ),
    "sharegpt with a system turn": (
        {
            "conversations": [
                foreign("system", "Be short."),
                foreign("human", ask["content"]),
                foreign("gpt", good["content"]),
            ]
        },
        "sharegpt",
        TEA_WITH_SYSTEM,
    ),
    "sharegpt with a system column": (
        {"system": "Be short.", "conversations": [foreign("human", ask["content"]), foreign("gpt", good["content"])]},
        "sharegpt",
        TEA_WITH_SYSTEM,
    ),
    "text": ({"text": " Tea draws\n\nthree minutes. ", "url": "a"}, "text", {"text": " Tea draws\n\nthree minutes. "}),
}


@pytest.mark.parametrize(("row", "name", "expected"), ROWS.values(), ids=ROWS.keys())
def test_rows_for_sft(row: dict[str, Any], name: str, expected: Canonical) -> None:
    before = deepcopy(row)
    shape = formats.detect([row], preference=False)
    assert shape.name == name
    assert formats.read(shape, row) == expected
    assert row == before


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("system", "system"),
        ("user", "user"),
        ("human", "user"),
        ("prompter", "user"),
        ("assistant", "assistant"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("Human", "user"),
        ("GPT", "assistant"),
    ],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")], ids=" ".join)
def test_roles_and_their_other_names(keys: tuple[str, str], role: str, expected: str) -> None:
    row = {"messages": [dict(zip(keys, (role, "Tea?"), strict=True))]}
    assert formats.read(formats.named("messages"), row) == {"messages": [{"role": expected, "content": "Tea?"}]}


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "messages a string": ("messages", {"messages": "a"}, "`messages` is a string, expected a list of messages"),
    "messages empty": ("messages", {"messages": []}, "`messages` is an empty list, expected a list of messages"),
    "messages null": ("messages", {"messages": None}, "`messages` is null, expected a value"),
    "messages an object": ("messages", {"messages": ask}, "`messages` is an object, expected a list of messages"),
    "messages of lists": (
        "messages",
        {"messages": [[ask, good]]},
        "`messages[0]` is a list of an object, expected {role, content} or {from, value}",
    ),
    "a tool's turn": (
        "messages",
        {"messages": [ask, {"role": "tool", "content": "a"}]},
        "`messages[1]` has role 'tool', expected one of system, user, human, prompter, assistant, gpt, chatgpt, "
        "model, bot",
    ),
    "a number as completion": (
        "prompt-completion",
        {"prompt": "a", "completion": 3},
        "`completion` is a number, expected a string",
    ),
    "a null prompt": ("prompt-completion", {"prompt": None, "completion": "a"}, "`prompt` is null, expected a value"),
    "no completion": (
        "prompt-completion",
        {"prompt": "a"},
        "`completion` is missing; columns are `prompt` (a string)",
    ),
    "messages after a string": (
        "prompt-completion",
        {"prompt": "a", "completion": [good]},
        "`completion` is a list of an object, expected a string",
    ),
    "a string after messages": (
        "prompt-completion",
        {"prompt": [ask], "completion": "a"},
        "`completion` is a string, expected a list of messages",
    ),
    "an empty prompt list": (
        "prompt-completion",
        {"prompt": [], "completion": [good]},
        "`prompt` is an empty list, expected a list of messages",
    ),
    "a system column that is a list": (
        "prompt-completion",
        {"system": ["a"], **plain},
        "`system` is a list of a string, expected a string",
    ),
    "output null": ("alpaca", {"instruction": "a", "output": None}, "`output` is null, expected a value"),
    "output a list": (
        "alpaca",
        {"instruction": "a", "output": ["b"]},
        "`output` is a list of a string, expected a string",
    ),
    "instruction a number": (
        "alpaca",
        {"instruction": 4, "output": "b"},
        "`instruction` is a number, expected a string",
    ),
    "conversations a string": (
        "sharegpt",
        {"conversations": "a"},
        "`conversations` is a string, expected a list of messages",
    ),
    "conversations without value": (
        "sharegpt",
        {"conversations": [{"from": "human"}]},
        "`conversations[0]` has value that is null, expected a string",
    ),
    "text a list": ("text", {"text": ["a"]}, "`text` is a list of a string, expected a string"),
    "text null": ("text", {"text": None}, "`text` is null, expected a value"),
}


@pytest.mark.parametrize(("name", "row", "message"), BAD.values(), ids=BAD.keys())
def test_rows_that_cannot_be_read(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.read(formats.named(name), row)
    assert str(error.value) == message
