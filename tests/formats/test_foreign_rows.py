"""Preference rows in the shapes of other projects: Orca, ShareGPT, Alpaca, argilla, StackExchange, PKU-SafeRLHF."""

from __future__ import annotations

from typing import Any

import pytest

from alignctl import formats
from alignctl.formats import Canonical, Dropped, RowError


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def foreign(who: str, said: str) -> dict[str, str]:
    return {"from": who, "value": said}


def pair(*prompt: dict[str, str]) -> Canonical:
    """What the answers of this file become behind `prompt`."""
    return {
        "prompt": list(prompt),
        "chosen": [{"role": "assistant", "content": "Oolong."}],
        "rejected": [{"role": "assistant", "content": "Cocoa."}],
    }


answers = {"chosen": "Oolong.", "rejected": "Cocoa."}
objects = {"chosen": foreign("gpt", "Oolong."), "rejected": foreign("gpt", "Cocoa.")}
responses = {"chosen_response": "Oolong.", "rejected_response": "Cocoa."}
safer = {"prompt": "Name a tea.", "response_0": "Cocoa.", "response_1": "Oolong."}
name_a_tea = user("Name a tea.")

ROWS: dict[str, tuple[dict[str, Any], str, Canonical]] = {
    "orca": (
        {"system": "Be short.", "question": "Name a tea.", **answers},
        "orca",
        pair(system("Be short."), name_a_tea),
    ),
    "orca, system empty": ({"system": "", "question": "Name a tea.", **answers}, "orca", pair(name_a_tea)),
    "orca, system null": ({"system": None, "question": "Name a tea.", **answers}, "orca", pair(name_a_tea)),
    "orca, distilabel's": (
        {
            "system": "Be short.",
            "input": "Name a tea.",
            **answers,
            "generations": ["Oolong.", "Cocoa."],
            "order": ["chosen", "rejected"],
            "rating": [9.0, 2.0],
            "status": "unchanged",
        },
        "orca",
        pair(system("Be short."), name_a_tea),
    ),
    "orca, question before input": (
        {"question": "Name a tea.", "input": "Something else.", **answers},
        "orca",
        pair(name_a_tea),
    ),
    "orca, question null": ({"question": None, "input": "Name a tea.", **answers}, "orca", pair(name_a_tea)),
    "sharegpt": ({"conversations": [foreign("human", "Name a tea.")], **objects}, "sharegpt-ranking", pair(name_a_tea)),
    "sharegpt, several turns with a system turn": (
        {
            "conversations": [
                foreign("system", "Be short."),
                foreign("human", "Hello."),
                foreign("gpt", "Good day."),
                foreign("human", "Name a tea."),
            ],
            **objects,
        },
        "sharegpt-ranking",
        pair(system("Be short."), user("Hello."), assistant("Good day."), name_a_tea),
    ),
    "sharegpt, a system column": (
        {"system": "Be short.", "conversations": [foreign("human", "Name a tea.")], **objects},
        "sharegpt-ranking",
        pair(system("Be short."), name_a_tea),
    ),
    "sharegpt under role and content": (
        {"conversations": [name_a_tea], "chosen": assistant("Oolong."), "rejected": assistant("Cocoa.")},
        "sharegpt-ranking",
        pair(name_a_tea),
    ),
    "alpaca": ({"instruction": "Name a tea.", **answers}, "alpaca-ranking", pair(name_a_tea)),
    "alpaca, input": (
        {"instruction": "Name a tea from here.", "input": "Fujian", **answers},
        "alpaca-ranking",
        pair(user("Name a tea from here.\n\nFujian")),
    ),
    "alpaca, input empty": ({"instruction": "Name a tea.", "input": "", **answers}, "alpaca-ranking", pair(name_a_tea)),
    "alpaca, input null": (
        {"instruction": "Name a tea.", "input": None, **answers},
        "alpaca-ranking",
        pair(name_a_tea),
    ),
    "alpaca, everything": (
        {
            "system": "Be short.",
            "history": [["Hello.", "Good day."], ["You there?", "Yes."]],
            "instruction": "Name a tea.",
            "input": "Fujian",
            **answers,
        },
        "alpaca-ranking",
        pair(
            system("Be short."),
            user("Hello."),
            assistant("Good day."),
            user("You there?"),
            assistant("Yes."),
            user("Name a tea.\n\nFujian"),
        ),
    ),
    "alpaca, history empty": (
        {"instruction": "Name a tea.", "history": [], **answers},
        "alpaca-ranking",
        pair(name_a_tea),
    ),
    "argilla, instruction": (
        {"instruction": "Name a tea.", **responses, "chosen_rating": 5.0, "rejected_rating": 1.0},
        "argilla",
        pair(name_a_tea),
    ),
    "argilla, input": ({"input": "Name a tea.", **responses}, "argilla", pair(name_a_tea)),
    "argilla, input and system": (
        {"system": "Be short.", "input": "Name a tea.", **responses},
        "argilla",
        pair(system("Be short."), name_a_tea),
    ),
    "argilla, instruction and input": (
        {"instruction": "Name a tea from here.", "input": "Fujian", **responses},
        "argilla",
        pair(user("Name a tea from here.\n\nFujian")),
    ),
    "stackexchange": (
        {
            "qid": 4,
            "question": "Name a tea.",
            "date": "2001/01/01",
            "metadata": ["a"],
            "response_j": "Oolong.",
            "response_k": "Cocoa.",
        },
        "stackexchange",
        pair(name_a_tea),
    ),
    "saferlhf, the second is better": ({**safer, "better_response_id": 1}, "pku-saferlhf", pair(name_a_tea)),
    "saferlhf, the first is better": (
        {"prompt": "Name a tea.", "response_0": "Oolong.", "response_1": "Cocoa.", "better_response_id": 0},
        "pku-saferlhf",
        pair(name_a_tea),
    ),
    "saferlhf, from a CSV file": ({**safer, "better_response_id": "1"}, "pku-saferlhf", pair(name_a_tea)),
    "saferlhf, from a CSV file, the first": (
        {"prompt": "Name a tea.", "response_0": "Oolong.", "response_1": "Cocoa.", "better_response_id": "0"},
        "pku-saferlhf",
        pair(name_a_tea),
    ),
    "saferlhf, the safer id is not looked at": (
        {**safer, "better_response_id": 1, "safer_response_id": 0, "is_response_0_safe": True},
        "pku-saferlhf",
        pair(name_a_tea),
    ),
}


@pytest.mark.parametrize(("row", "name", "expected"), ROWS.values(), ids=ROWS.keys())
def test_rows_of_other_projects(row: dict[str, Any], name: str, expected: Canonical) -> None:
    shape = formats.detect([row], preference=True)
    assert shape.name == name
    assert formats.read(shape, row) == expected


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "orca without question": ("orca", answers, "`question` is missing, expected a string"),
    "orca, question a list": (
        "orca",
        {"question": ["a"], **answers},
        "`question` is a list of a string, expected a string",
    ),
    "orca, input an object": ("orca", {"input": {"a": 1}, **answers}, "`input` is an object, expected a string"),
    "sharegpt, a string for turns": (
        "sharegpt-ranking",
        {"conversations": "Name a tea.", **objects},
        "`conversations` is a string, expected a list of messages",
    ),
    "sharegpt, no turns": (
        "sharegpt-ranking",
        {"conversations": [], **objects},
        "`conversations` is an empty list, expected a list of messages",
    ),
    "sharegpt, an unknown speaker": (
        "sharegpt-ranking",
        {"conversations": [foreign("observation", "a")], **objects},
        "`conversations[0]` has role 'observation', expected one of system, user, human,",
    ),
    "sharegpt, an answer without text": (
        "sharegpt-ranking",
        {"conversations": [name_a_tea], "chosen": {"from": "gpt"}, "rejected": objects["rejected"]},
        "`chosen` has value that is null, expected a string",
    ),
    "sharegpt, an answer without a speaker": (
        "sharegpt-ranking",
        {"conversations": [name_a_tea], "chosen": objects["chosen"], "rejected": {"value": "a"}},
        "`rejected` is an object, expected {role, content} or {from, value}",
    ),
    "alpaca, history of strings": (
        "alpaca-ranking",
        {"instruction": "a", "history": ["a"], **answers},
        "`history[0]` is a string, expected [question, answer]",
    ),
    "alpaca, history of single turns": (
        "alpaca-ranking",
        {"instruction": "a", "history": [["a", "b"], ["c"]], **answers},
        "`history[1]` is a list of a string, expected [question, answer]",
    ),
    "alpaca, history with a null": (
        "alpaca-ranking",
        {"instruction": "a", "history": [["a", None]], **answers},
        "`history[0]` holds null, expected a string",
    ),
    "alpaca, input a number": (
        "alpaca-ranking",
        {"instruction": "a", "input": 4, **answers},
        "`input` is a number, expected a string",
    ),
    "argilla, a response null": (
        "argilla",
        {"instruction": "a", "chosen_response": "a", "rejected_response": None},
        "`rejected_response` is null, expected a value",
    ),
    "argilla, a response that is a list": (
        "argilla",
        {"instruction": "a", "chosen_response": ["a"], "rejected_response": "a"},
        "`chosen_response` is a list of a string, expected a string",
    ),
    "stackexchange, no second response": (
        "stackexchange",
        {"question": "a", "response_j": "b"},
        "`response_k` is missing; columns are `question` (a string), `response_j` (a string)",
    ),
    "saferlhf, no id": (
        "pku-saferlhf",
        safer,
        "`better_response_id` is missing; columns are `prompt` (a string), `response_0` (a string), "
        "`response_1` (a string)",
    ),
    **{
        f"saferlhf, {value!r} as id": (
            "pku-saferlhf",
            {**safer, "better_response_id": value},
            f"`better_response_id` is {value!r}, expected 0 or 1",
        )
        for value in (2, -1, 0.5, "2", "one", "", True, False, [1])
    },
}


@pytest.mark.parametrize(("name", "row", "message"), BAD.values(), ids=BAD.keys())
def test_rows_that_cannot_be_read(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.read(formats.named(name), row)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_that_the_user_gives_is_dropped(side: str) -> None:
    row = {"conversations": [foreign("human", "Name a tea.")], **objects, side: foreign("human", "Mate?")}
    with pytest.raises(Dropped) as dropped:
        formats.read(formats.detect([row], preference=True), row)
    assert dropped.value.reason == "the last turn is not the assistant's"


@pytest.mark.parametrize("history", [4, True], ids=["a number", "true"])
def test_a_history_that_is_no_list(history: Any) -> None:
    with pytest.raises(RowError, match="`history` is "):
        formats.read(formats.named("alpaca-ranking"), {"instruction": "a", "history": history, **answers})
