"""One row of every format through the real token code: what is asked, what is trained, and where an answer stops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from alignctl import formats
from alignctl.errors import DataError
from alignctl.formats import Canonical
from alignctl.formats.preference import best, by_prompt
from alignctl.recipe.schema import Data, Source
from alignctl.train import cache, encode, tokens
from alignctl.train.encode import EncodedSource
from alignctl.train.tokens import Encoded, Encoder, Limit

MakeEncoder = Callable[[str, str], Encoder]
LIMIT = Limit(4096)
END = "<|im_end|>"
ASSISTANT = "<|im_start|>assistant\n"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def foreign(who: str, said: str) -> dict[str, str]:
    return {"from": who, "value": said}


ask = user("Name a tea.")
ASKED = "<|im_start|>user\nName a tea.<|im_end|>\n<|im_start|>assistant\n"
SHORT = f"<|im_start|>system\nBe short.<|im_end|>\n{ASKED}"
GREETED = (
    "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nI think: good day.<|im_end|>\n"
    "<|im_start|>user\nName a tea.<|im_end|>\n<|im_start|>assistant\n"
)
FROM_HERE = "<|im_start|>user\nName a tea from here.\n\nFujian<|im_end|>\n<|im_start|>assistant\n"
TEXT = "I think oolong.", "I think beer."

answers = {"chosen": "I think oolong.", "rejected": "I think beer."}
good, bad = assistant("I think oolong."), assistant("I think beer.")
greeting = [user("Hello."), assistant("I think: good day.")]
spoken = "\n\nHuman: Hello.\n\nAssistant: I think: good day.\n\nHuman: Name a tea.\n\nAssistant:"
scored = [
    {"response": "Cocoa.", "fine-grained_score": 2.0, "overall_score": 4.0},
    {"response": "I think oolong.", "fine-grained_score": 4.5, "overall_score": 1.0},
    {"response": "I think beer.", "fine-grained_score": 1.0, "overall_score": 10.0},
]

PAIRS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "strings": ([{"prompt": "Name a tea.", **answers}], "prompt-chosen-rejected", ASKED),
    "strings, system": ([{"system": "Be short.", "prompt": "Name a tea.", **answers}], "prompt-chosen-rejected", SHORT),
    "conversational": ([{"prompt": [ask], "chosen": [good], "rejected": [bad]}], "conversational", ASKED),
    "conversational, string prompt": (
        [{"prompt": "Name a tea.", "chosen": [ask, good], "rejected": [ask, bad]}],
        "conversational",
        ASKED,
    ),
    "conversational, no prompt, several turns": (
        [{"chosen": [*greeting, ask, good], "rejected": [*greeting, ask, bad]}],
        "conversational",
        GREETED,
    ),
    "ultrafeedback_binarized": (
        [
            {
                "prompt": "Name a tea.",
                "prompt_id": "9f6c",
                "chosen": [ask, good],
                "rejected": [ask, bad],
                "messages": [ask, good],
                "score_chosen": 8.0,
                "score_rejected": 2.0,
            }
        ],
        "conversational",
        ASKED,
    ),
    "hh": ([{"chosen": f"{spoken} I think oolong.", "rejected": f"{spoken} I think beer."}], "hh", GREETED),
    "hh, prompt": ([{"prompt": spoken, "chosen": " I think oolong.", "rejected": " I think beer."}], "hh", GREETED),
    "orca": ([{"system": "Be short.", "question": "Name a tea.", **answers}], "orca", SHORT),
    "orca, distilabel's": ([{"system": "", "input": "Name a tea.", **answers, "rating": [9, 1]}], "orca", ASKED),
    "sharegpt-ranking": (
        [
            {
                "conversations": [
                    foreign("human", "Hello."),
                    foreign("gpt", "I think: good day."),
                    foreign("human", "Name a tea."),
                ],
                "chosen": foreign("gpt", "I think oolong."),
                "rejected": foreign("gpt", "I think beer."),
            }
        ],
        "sharegpt-ranking",
        GREETED,
    ),
    "alpaca-ranking": ([{"instruction": "Name a tea.", "input": "", **answers}], "alpaca-ranking", ASKED),
    "alpaca-ranking, input": (
        [{"instruction": "Name a tea from here.", "input": "Fujian", **answers}],
        "alpaca-ranking",
        FROM_HERE,
    ),
    "alpaca-ranking, history": (
        [{"history": [["Hello.", "I think: good day."]], "instruction": "Name a tea.", **answers}],
        "alpaca-ranking",
        GREETED,
    ),
    "alpaca-ranking, system": (
        [{"system": "Be short.", "instruction": "Name a tea.", **answers}],
        "alpaca-ranking",
        SHORT,
    ),
    "argilla": (
        [{"instruction": "Name a tea.", "chosen_response": TEXT[0], "rejected_response": TEXT[1]}],
        "argilla",
        ASKED,
    ),
    "argilla, input": (
        [{"input": "Name a tea.", "chosen_response": TEXT[0], "rejected_response": TEXT[1]}],
        "argilla",
        ASKED,
    ),
    "stackexchange": (
        [{"qid": 1, "question": "Name a tea.", "response_j": TEXT[0], "response_k": TEXT[1]}],
        "stackexchange",
        ASKED,
    ),
    "pku-saferlhf, 0": (
        [{"prompt": "Name a tea.", "response_0": TEXT[0], "response_1": TEXT[1], "better_response_id": 0}],
        "pku-saferlhf",
        ASKED,
    ),
    "pku-saferlhf, 1 from a CSV file": (
        [{"prompt": "Name a tea.", "response_0": TEXT[1], "response_1": TEXT[0], "better_response_id": "1"}],
        "pku-saferlhf",
        ASKED,
    ),
    "completions": ([{"instruction": "Name a tea.", "completions": scored}], "completions", ASKED),
    "scored": (
        [
            {"prompt": "Name a tea.", "response": "I think beer.", "helpfulness": 0},
            {"prompt": "Name a pot.", "response": "Clay.", "helpfulness": 3},
            {"prompt": "Name a tea.", "response": "I think oolong.", "helpfulness": 4},
            {"prompt": "Name a tea.", "response": "Cocoa.", "helpfulness": 2},
        ],
        "scored",
        ASKED,
    ),
}

DIALOGUES: dict[str, tuple[dict[str, Any], str, str, list[str]]] = {
    "messages": ({"messages": [ask, good]}, "messages", ASKED, [TEXT[0]]),
    "messages, several turns": (
        {"messages": [*greeting, ask, good]},
        "messages",
        GREETED,
        ["I think: good day.", TEXT[0]],
    ),
    "messages that end with a question": (
        {"messages": [ask, good, user("And a pot?")]},
        "messages",
        ASKED,
        [TEXT[0]],
    ),
    "prompt-completion": ({"prompt": "Name a tea.", "completion": TEXT[0]}, "prompt-completion", ASKED, [TEXT[0]]),
    "prompt-completion, lists": (
        {"system": "Be short.", "prompt": [ask], "completion": [good]},
        "prompt-completion",
        SHORT,
        [TEXT[0]],
    ),
    "alpaca": ({"instruction": "Name a tea.", "input": "", "output": TEXT[0]}, "alpaca", ASKED, [TEXT[0]]),
    "alpaca, input": (
        {"instruction": "Name a tea from here.", "input": "Fujian", "output": TEXT[0]},
        "alpaca",
        FROM_HERE,
        [TEXT[0]],
    ),
    "sharegpt": (
        {
            "conversations": [
                foreign("system", "Be short."),
                foreign("human", "Name a tea."),
                foreign("gpt", "I think oolong."),
            ]
        },
        "sharegpt",
        SHORT,
        [TEXT[0]],
    ),
}


@pytest.fixture
def encoder(make_encoder: MakeEncoder) -> Encoder:
    return make_encoder("qwen2", "chatml")


def decode(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def read(rows: list[dict[str, Any]], name: str) -> Canonical:
    """The first pair that `rows` hold, read as the format called `name`, which is the one detected."""
    shape = formats.detect(rows, preference=True)
    assert shape.name == name
    row = rows[0]
    if shape.per_answer:
        shape = formats.named("completions")
        row = dict(next(iter(by_prompt((str(i), values) for i, values in enumerate(rows))))[1])
    canonical = formats.read(shape, row)
    return best(canonical, "worst", 0, "1") if "answers" in canonical else canonical


def paired(encoder: Encoder, row: Canonical) -> dict[str, list[int]]:
    (found,) = tokens.encode_rows(encoder, [tokens.pair(encoder, row, LIMIT)])
    assert isinstance(found, Encoded)
    assert found.cut == ""
    return found.ids


def labelled(encoder: Encoder, row: Canonical) -> Encoded:
    (found,) = tokens.encode_rows(encoder, [tokens.dialogue(encoder, row, LIMIT)])
    assert isinstance(found, Encoded)
    return found


def trained(encoder: Encoder, encoded: Encoded) -> list[str]:
    """The stretches of text that carry loss; labels are the ids themselves or -100."""
    ids, labels = encoded.ids["input_ids"], encoded.ids["labels"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    groups = groupby(labels, key=lambda label: label != -100)
    return [decode(encoder, list(group)) for kept, group in groups if kept]


@pytest.mark.parametrize(("rows", "name", "asked"), PAIRS.values(), ids=PAIRS.keys())
def test_pairs(rows: list[dict[str, Any]], name: str, asked: str, encoder: Encoder) -> None:
    ids = paired(encoder, read(rows, name))
    assert decode(encoder, ids["prompt_ids"]) == asked
    assert asked.endswith(ASSISTANT)
    assert decode(encoder, ids["chosen_ids"]) == f"I think oolong.{END}"
    assert decode(encoder, ids["rejected_ids"]) == f"I think beer.{END}"
    for side in ("chosen_ids", "rejected_ids"):
        assert [token for token in ids[side] if token in encoder.stop_ids] == ids[side][-1:]


@pytest.mark.parametrize(("rows", "name", "asked"), PAIRS.values(), ids=PAIRS.keys())
def test_the_chosen_answers_of_pairs_as_dialogues(
    rows: list[dict[str, Any]], name: str, asked: str, encoder: Encoder
) -> None:
    encoded = labelled(encoder, formats.chosen_dialogue(read(rows, name)))
    earlier = [f"I think: good day.{END}"] if asked == GREETED else []
    assert decode(encoder, encoded.ids["input_ids"]) == f"{asked}I think oolong.{END}"
    assert trained(encoder, encoded) == [*earlier, f"I think oolong.{END}"]


@pytest.mark.parametrize(("row", "name", "asked", "answered"), DIALOGUES.values(), ids=DIALOGUES.keys())
def test_dialogues(row: dict[str, Any], name: str, asked: str, answered: list[str], encoder: Encoder) -> None:
    shape = formats.detect([row], preference=False)
    assert shape.name == name
    encoded = labelled(encoder, formats.read(shape, row))
    assert decode(encoder, encoded.ids["input_ids"]) == f"{asked}{answered[-1]}{END}"
    assert trained(encoder, encoded) == [f"{answer}{END}" for answer in answered]
    assert encoded.ids["labels"][-1] == encoder.stop_ids[0]
    assert encoded.cut == (tokens.UNANSWERED if row.get("messages", [good])[-1]["role"] == "user" else "")


def test_plain_text_is_trained_whole_and_ends_in_the_end_token(encoder: Encoder) -> None:
    row = {"text": " Tea draws\n\nthree minutes. "}
    shape = formats.detect([row], preference=False)
    encoded = labelled(encoder, formats.read(shape, row))
    assert decode(encoder, encoded.ids["input_ids"]) == f" Tea draws\n\nthree minutes. {encoder.tokenizer.eos_token}"
    assert encoded.ids["labels"] == encoded.ids["input_ids"]


def test_every_format_is_here() -> None:
    names = {name for _, name, _ in PAIRS.values()} | {name for _, name, _, _ in DIALOGUES.values()} | {"text"}
    assert names == {shape.name for shape in (*formats.PREFERENCE, *formats.SUPERVISED)}


@pytest.mark.parametrize("name", PAIRS)
def test_a_template_without_system_turns(name: str, make_encoder: MakeEncoder) -> None:
    rows, shape, asked = PAIRS[name]
    encoder = make_encoder("mistral", "mistral-instruct")
    ids = paired(encoder, read(rows, shape))
    questions = {
        ASKED: "<s>[INST] Name a tea. [/INST]",
        SHORT: "<s>[INST] Be short.\n\nName a tea. [/INST]",
        GREETED: "<s>[INST] Hello. [/INST] I think: good day.</s>[INST] Name a tea. [/INST]",
        FROM_HERE: "<s>[INST] Name a tea from here.\n\nFujian [/INST]",
    }
    assert decode(encoder, ids["prompt_ids"]) == questions[asked]
    assert decode(encoder, ids["chosen_ids"]) == " I think oolong.</s>"
    assert decode(encoder, ids["rejected_ids"]) == " I think beer.</s>"


def test_many_rows_at_once_are_what_each_is_alone(encoder: Encoder) -> None:
    rows = [read(given, name) for given, name, _ in PAIRS.values()]
    together = tokens.encode_rows(encoder, [tokens.pair(encoder, row, LIMIT) for row in rows])
    assert [found.ids for found in together if isinstance(found, Encoded)] == [paired(encoder, row) for row in rows]


@pytest.fixture
def encoded_file(
    encoder: Encoder, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., EncodedSource]:
    """Rows written to a file and encoded as one source of a run, with a cache of its own."""
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "cache")

    def run(rows: list[dict[str, Any]], method: str = "dpo", **source: Any) -> EncodedSource:
        given = Source(path=str(write_rows(rows)), **source)
        data = Data(train=[given], max_length=4096)
        return encode.encode(given, method, encoder, data, 0)

    return run


def test_a_set_that_begins_with_nulls(encoded_file: Callable[..., EncodedSource]) -> None:
    row = PAIRS["strings"][0][0]
    with pytest.raises(DataError, match=r"rows.jsonl:1: `prompt` is null, expected a value"):
        encoded_file([dict.fromkeys(row), row])


def test_a_second_shape_in_a_set_is_refused_and_both_are_named(encoded_file: Callable[..., EncodedSource]) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: ") as error:
        encoded_file([PAIRS["orca"][0][0], PAIRS["conversational"][0][0]])
    assert formats.named("conversational").what in str(error.value)
    assert formats.named("orca").what in str(error.value)


def test_a_set_that_fits_two_shapes_takes_the_one_that_the_recipe_names(
    encoded_file: Callable[..., EncodedSource], encoder: Encoder
) -> None:
    row = {"prompt": "x-17", **PAIRS["orca"][0][0]}
    with pytest.raises(DataError, match=r"`format: prompt-chosen-rejected`.*`format: orca`"):
        encoded_file([row])
    named = encoded_file([row], format="orca").table.to_pylist()
    renamed = encoded_file([row], columns={"prompt": "question"}).table.to_pylist()
    assert [decode(encoder, found[0]["prompt_ids"]) for found in (named, renamed)] == [SHORT, SHORT]


@pytest.mark.parametrize(
    ("columns", "chosen"), [({}, "I think oolong."), ({"score": "overall_score"}, "I think beer.")]
)
def test_a_score_inside_completions_that_the_recipe_names(
    columns: dict[str, str], chosen: str, encoded_file: Callable[..., EncodedSource], encoder: Encoder
) -> None:
    (row,) = encoded_file(PAIRS["completions"][0], columns=columns).table.to_pylist()
    assert decode(encoder, row["chosen_ids"]) == chosen + END


def test_scored_rows_become_pairs_and_the_ledger_adds_up(
    encoded_file: Callable[..., EncodedSource], encoder: Encoder
) -> None:
    found = encoded_file(PAIRS["scored"][0])
    (row,) = found.table.to_pylist()
    assert [decode(encoder, row[column]) for column in encode.PAIR_COLUMNS] == [ASKED, *(said + END for said in TEXT)]
    assert (found.shape.name, found.ledger.rows, found.ledger.kept) == ("scored", 4, 1)
    assert {reason: places.rows for reason, places in found.ledger.aside.items()} == {
        "tie": 1,
        "further answers to a prompt": 2,
    }


def test_a_preference_set_for_sft_trains_the_chosen_answer(
    encoded_file: Callable[..., EncodedSource], encoder: Encoder
) -> None:
    (row,) = encoded_file(PAIRS["hh"][0], "sft", answer="chosen").table.to_pylist()
    assert decode(encoder, row["input_ids"]) == f"{GREETED}I think oolong.{END}"
