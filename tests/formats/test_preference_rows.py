"""Preference rows as strings, conversations and transcripts, and the canonical rows that they become."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from alignctl import formats
from alignctl.formats import Canonical, Dropped
from alignctl.formats.preference import transcript


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def foreign(who: str, said: str) -> dict[str, str]:
    return {"from": who, "value": said}


def detected_and_read(row: dict[str, Any], name: str) -> Canonical:
    """`row` read by the format that it is detected as, which is the one called `name`."""
    shape = formats.detect([row], preference=True)
    assert shape.name == name
    return formats.read(shape, row)


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

STRINGS: dict[str, tuple[dict[str, Any], Canonical]] = {
    "strings": (plain, TEA),
    "a column that nobody reads": ({**plain, "source": "kitchen", "id": 7}, TEA),
    "a system column, as in truthy-dpo": ({"id": "1", "source": "", **plain, "system": "Be short."}, TEA_WITH_SYSTEM),
    "an empty system column": ({**plain, "system": ""}, TEA),
    "a null system column": ({**plain, "system": None}, TEA),
    "spacing is kept": (
        {"prompt": " Tea?\n", "chosen": "\n Leaves. ", "rejected": "  "},
        {"prompt": [user(" Tea?\n")], "chosen": [assistant("\n Leaves. ")], "rejected": [assistant("  ")]},
    ),
    "an answer that looks like a transcript": (
        {**plain, "rejected": "Human: tea?\n\nAssistant: a week."},
        {**TEA, "rejected": [assistant("Human: tea?\n\nAssistant: a week.")]},
    ),
}

CONVERSATIONS: dict[str, tuple[dict[str, Any], Canonical]] = {
    "explicit prompt": ({"prompt": [ask], "chosen": [good], "rejected": [bad]}, TEA),
    "explicit prompt with a system message": (
        {"prompt": [system("Be short."), ask], "chosen": [good], "rejected": [bad]},
        TEA_WITH_SYSTEM,
    ),
    "explicit prompt of three turns": (
        {"prompt": history, "chosen": [assistant("Five.")], "rejected": [assistant("None.")]},
        SECOND_CUP,
    ),
    "explicit prompt that the answers repeat": ({"prompt": [ask], "chosen": [ask, good], "rejected": [ask, bad]}, TEA),
    "explicit prompt of three turns that the answers repeat": (
        {"prompt": history, "chosen": [*history, assistant("Five.")], "rejected": [*history, assistant("None.")]},
        SECOND_CUP,
    ),
    "explicit prompt that begins the history": (
        {"prompt": [ask], "chosen": [*history, assistant("Five.")], "rejected": [*history, assistant("None.")]},
        SECOND_CUP,
    ),
    "explicit prompt that the answers go on from": (
        {"prompt": [system("Be short.")], "chosen": [ask, good], "rejected": [ask, bad]},
        TEA_WITH_SYSTEM,
    ),
    "explicit prompt of two turns that the answers go on from": (
        {
            "prompt": [ask, good],
            "chosen": [history[2], assistant("Five.")],
            "rejected": [history[2], assistant("None.")],
        },
        SECOND_CUP,
    ),
    "no prompt": ({"chosen": [ask, good], "rejected": [ask, bad]}, TEA),
    "null prompt": ({"prompt": None, "chosen": [ask, good], "rejected": [ask, bad]}, TEA),
    "no prompt, a system message": (
        {"chosen": [system("Be short."), ask, good], "rejected": [system("Be short."), ask, bad]},
        TEA_WITH_SYSTEM,
    ),
    "no prompt, three turns": (
        {"chosen": [*history, assistant("Five.")], "rejected": [*history, assistant("None.")]},
        SECOND_CUP,
    ),
    "string prompt that the answers repeat": ({**plain, "chosen": [ask, good], "rejected": [ask, bad]}, TEA),
    "string prompt, spaced otherwise": (
        {"prompt": " How long does\ntea draw? ", "chosen": [ask, good], "rejected": [ask, bad]},
        TEA,
    ),
    "string prompt, the first of three turns": (
        {**plain, "chosen": [*history, assistant("Five.")], "rejected": [*history, assistant("None.")]},
        SECOND_CUP,
    ),
    "string prompt, the last of three turns": (
        {
            "prompt": "And the second cup?",
            "chosen": [*history, assistant("Five.")],
            "rejected": [*history, assistant("None.")],
        },
        SECOND_CUP,
    ),
    "string prompt and bare answers": ({**plain, "chosen": [good], "rejected": [bad]}, TEA),
    "a system column": ({"system": "Be short.", "chosen": [ask, good], "rejected": [ask, bad]}, TEA_WITH_SYSTEM),
    "a system column, a string prompt and bare answers": (
        {**plain, "system": "Be short.", "chosen": [good], "rejected": [bad]},
        TEA_WITH_SYSTEM,
    ),
    "a system column beside a system message": (
        {"system": "Be long.", "chosen": [system("Be short."), ask, good], "rejected": [system("Be short."), ask, bad]},
        TEA_WITH_SYSTEM,
    ),
    "messages that carry further keys": (
        {"chosen": [{**ask, "id": 4}, good], "rejected": [{**ask, "id": 5}, bad]},
        TEA,
    ),
    "messages under from and value": (
        {
            "chosen": [foreign("human", ask["content"]), foreign("gpt", good["content"])],
            "rejected": [foreign("human", ask["content"]), foreign("gpt", bad["content"])],
        },
        TEA,
    ),
    "one side under other names": (
        {"chosen": [ask, good], "rejected": [foreign("human", ask["content"]), foreign("gpt", bad["content"])]},
        TEA,
    ),
    "a raw row of ultrafeedback_binarized": (
        {
            "prompt": "How long does tea draw?",
            "prompt_id": "9f6c",
            "chosen": [ask, good],
            "rejected": [ask, bad],
            "messages": [ask, good],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        TEA,
    ),
}

TWO_TURNS = "\n\nHuman: My tea is bitter.\n\nAssistant: How long did it draw?\n\nHuman: An hour."
HH: dict[str, tuple[dict[str, Any], Canonical]] = {
    "one turn": (
        {
            "chosen": "\n\nHuman: Is tea a herb?\n\nAssistant: I think it is a shrub.",
            "rejected": "\n\nHuman: Is tea a herb?\n\nAssistant: I think it is a fish.",
        },
        {
            "prompt": [user("Is tea a herb?")],
            "chosen": [assistant("I think it is a shrub.")],
            "rejected": [assistant("I think it is a fish.")],
        },
    ),
    "several turns, answers that begin alike": (
        {
            "chosen": f"{TWO_TURNS}\n\nAssistant: I think three minutes would do.",
            "rejected": f"{TWO_TURNS}\n\nAssistant: I think that is fine.\n\nDrink it.",
        },
        {
            "prompt": [user("My tea is bitter."), assistant("How long did it draw?"), user("An hour.")],
            "chosen": [assistant("I think three minutes would do.")],
            "rejected": [assistant("I think that is fine.\n\nDrink it.")],
        },
    ),
    "speakers inside a turn": (
        {
            "chosen": "Human: Who is Assistant: in this play?\nHuman: or who?\n\nAssistant: Nobody.",
            "rejected": "Human: Who is Assistant: in this play?\nHuman: or who?\n\nAssistant: A Human: all in all.",
        },
        {
            "prompt": [user("Who is Assistant: in this play?\nHuman: or who?")],
            "chosen": [assistant("Nobody.")],
            "rejected": [assistant("A Human: all in all.")],
        },
    ),
    "an answer that is empty": (
        {"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant:"},
        {"prompt": [user("Tea?")], "chosen": [assistant("Yes.")], "rejected": [assistant("")]},
    ),
    "a null prompt": (
        {"prompt": None, "chosen": "Human: Tea?\n\nAssistant: Yes.", "rejected": "Human: Tea?\n\nAssistant: No."},
        {"prompt": [user("Tea?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
    ),
    "a transcript as prompt": (
        {"prompt": f"{TWO_TURNS}\n\nAssistant:", "chosen": " I think less.", "rejected": " I think more."},
        {
            "prompt": [user("My tea is bitter."), assistant("How long did it draw?"), user("An hour.")],
            "chosen": [assistant("I think less.")],
            "rejected": [assistant("I think more.")],
        },
    ),
    "a transcript as prompt, up to the question": (
        {"prompt": "\n\nHuman: Is tea a herb?", "chosen": "A shrub.", "rejected": "A fish."},
        {
            "prompt": [user("Is tea a herb?")],
            "chosen": [assistant("A shrub.")],
            "rejected": [assistant("A fish.")],
        },
    ),
}


@pytest.mark.parametrize(("row", "expected"), STRINGS.values(), ids=STRINGS.keys())
def test_strings(row: dict[str, Any], expected: Canonical) -> None:
    assert detected_and_read(row, "prompt-chosen-rejected") == expected


@pytest.mark.parametrize(("row", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_conversations(row: dict[str, Any], expected: Canonical) -> None:
    assert detected_and_read(row, "conversational") == expected


@pytest.mark.parametrize(("row", "expected"), HH.values(), ids=HH.keys())
def test_transcripts(row: dict[str, Any], expected: Canonical) -> None:
    assert detected_and_read(row, "hh") == expected


def test_words_that_both_answers_begin_with_stay_in_them() -> None:
    row = detected_and_read(HH["several turns, answers that begin alike"][0], "hh")
    assert not any("I think" in message["content"] for message in row["prompt"])
    assert all(row[side][0]["content"].startswith("I think") for side in ("chosen", "rejected"))


def test_a_transcript_is_cut_before_speakers_only() -> None:
    assert transcript("\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman:\n\nAssistant:d", "it is") == [
        user("a\n\nb"),
        assistant("c"),
        user(""),
        assistant("d"),
    ]


@pytest.mark.parametrize("row", [row for row, _ in CONVERSATIONS.values()], ids=CONVERSATIONS.keys())
def test_reading_leaves_the_row_alone(row: dict[str, Any]) -> None:
    before = deepcopy(row)
    detected_and_read(row, "conversational")
    assert row == before


DROPPED: dict[str, tuple[dict[str, Any], str]] = {
    "another question": (
        {"chosen": [user("How long?"), good], "rejected": [ask, bad]},
        "chosen and rejected have different histories",
    ),
    "a longer history": (
        {"chosen": [*history, good], "rejected": [ask, bad]},
        "chosen and rejected have different histories",
    ),
    "another system message": (
        {"chosen": [system("Be short."), ask, good], "rejected": [ask, bad]},
        "chosen and rejected have different histories",
    ),
    "chosen ends with the user's turn": (
        {"chosen": [ask, good, ask], "rejected": [ask, bad]},
        "the last turn is not the assistant's",
    ),
    "rejected ends with the user's turn": (
        {"chosen": [ask, good], "rejected": [ask, bad, ask]},
        "the last turn is not the assistant's",
    ),
    "chosen ends with a system turn": (
        {"chosen": [ask, system("a")], "rejected": [ask, bad]},
        "the last turn is not the assistant's",
    ),
    "a string prompt that nobody says": (
        {"prompt": "What is coffee?", "chosen": [ask, good], "rejected": [ask, bad]},
        "prompt is not in the conversation",
    ),
    "transcripts with two histories": (
        {"chosen": "Human: Tea?\n\nAssistant: Yes.", "rejected": "Human: Cocoa?\n\nAssistant: No."},
        "chosen and rejected have different histories",
    ),
    "a transcript that ends with the question": (
        {"chosen": "Human: Tea?\n\nAssistant: Yes.", "rejected": "Human: Tea?\n\nAssistant: No.\n\nHuman: Why?"},
        "the last turn is not the assistant's",
    ),
    "a transcript in which nobody answers": (
        {"chosen": "\n\nHuman: Tea?", "rejected": "\n\nHuman: Tea?\n\nAssistant: No."},
        "the last turn is not the assistant's",
    ),
}


@pytest.mark.parametrize(("row", "reason"), DROPPED.values(), ids=DROPPED.keys())
def test_rows_that_break_a_rule_are_dropped(row: dict[str, Any], reason: str) -> None:
    shape = formats.detect([row], preference=True)
    with pytest.raises(Dropped) as dropped:
        formats.read(shape, row)
    assert dropped.value.reason == reason == str(dropped.value)


def test_the_chosen_answer_ends_the_dialogue() -> None:
    assert formats.chosen_dialogue(SECOND_CUP) == {"messages": [*history, assistant("Five.")]}
    assert formats.chosen_dialogue(TEA_WITH_SYSTEM) == {"messages": [system("Be short."), ask, good]}


WHOLE = {"chosen": "Human: Tea?\n\nAssistant: Yes.", "rejected": "Human: Tea?\n\nAssistant: No."}


@pytest.mark.parametrize("prompt", ["Human: Tea?\n\nAssistant:", "Tea?"], ids=["a transcript", "a string"])
def test_whole_transcripts_beside_a_prompt_do_not_become_answers(prompt: str) -> None:
    row = {"prompt": prompt, **WHOLE}
    try:
        read = formats.read(formats.detect([row], preference=True), row)
    except (formats.RowError, Dropped):
        return
    assert read == {"prompt": [user("Tea?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}


def test_a_prompt_that_begins_with_the_word_human_is_no_transcript() -> None:
    row = {"prompt": "Human: a word with what roots?", "chosen": "Latin.", "rejected": "Norse."}
    shape = formats.named("prompt-chosen-rejected")
    assert formats.read(shape, row)["prompt"] == [user("Human: a word with what roots?")]
