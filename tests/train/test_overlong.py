"""Rows beyond `max_length`: dropped, cut as the recipe says, or an error, and never cut behind its back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alignctl.errors import DataError
from alignctl.formats import Dropped, Message
from alignctl.formats.rows import assistant, user
from alignctl.recipe import catalog
from alignctl.recipe.schema import Recipe
from alignctl.train import data, encode, tokens
from alignctl.train.tokens import Encoded, Encoder, Ids, Limit

MakeEncoder = Callable[[str, str], Encoder]
MakeRecipe = Callable[..., Recipe]
WriteRows = Callable[..., Path]
Row = dict[str, Any]

ENOUGH = 10**6
TOO_LONG = "longer than max_length"
PROMPT_CUT = "oldest turns of the prompt left out"
ANSWER_CUT = "answer cut, without its end token"
TURNS_CUT = "last turns left out"
TEMPLATES = ("alpaca", "chatml", "instruct", "mistral-instruct", "zephyr")
SYSTEM = {"role": "system", "content": "Be short."}
PROMPT = [
    user("What is tea, and where does it come from?"),
    assistant("Leaves in water."),
    user("And coffee?"),
    assistant("Beans in water."),
    user("And milk?"),
]


def pair_row(prompt: list[Message], chosen: str = "From cows.", rejected: str = "From stones, or so.") -> Row:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def encoded(encoder: Encoder, row: Row, max_length: int, overlong: str = "drop") -> Encoded:
    rule = tokens.pair if "prompt" in row else tokens.dialogue
    found = tokens.encode_rows(encoder, [rule(encoder, row, Limit(max_length, overlong))])[0]
    if isinstance(found, Dropped):
        raise found
    return found


def whole(encoder: Encoder, row: Row) -> dict[str, Ids]:
    """The ids of a row that may be of any length."""
    found = encoded(encoder, row, ENOUGH)
    assert found.cut == ""
    return found.ids


def length(ids: dict[str, Ids]) -> int:
    """Tokens of the only sequence, or of the prompt and the longer answer."""
    if "labels" in ids:
        return len(ids["input_ids"])
    return len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))


def reason(encoder: Encoder, row: Row, max_length: int, overlong: str) -> str:
    with pytest.raises(Dropped) as dropped:
        encoded(encoder, row, max_length, overlong)
    return dropped.value.reason


# --- drop ---

ROWS: dict[str, Row] = {
    "longer chosen": pair_row(PROMPT, "From cows. " * 9, "No."),
    "longer rejected": pair_row(PROMPT, "No.", "From cows. " * 9),
    "dialogue": {"messages": [*PROMPT, assistant("From cows.")]},
    "text": {"text": "Tea is leaves in water."},
}


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate_completion", "error"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_row_that_fits_is_never_cut(encoder: Encoder, row: Row, overlong: str) -> None:
    ids = whole(encoder, row)
    assert encoded(encoder, row, length(ids), overlong) == Encoded(ids)


@pytest.mark.parametrize("overlong", ["drop", "error"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_one_token_too_many(encoder: Encoder, row: Row, overlong: str) -> None:
    assert reason(encoder, row, length(whole(encoder, row)) - 1, overlong) == TOO_LONG


# --- truncate_prompt ---


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system", "system"])
@pytest.mark.parametrize("left_out", [1, 2])
def test_whole_oldest_turns_are_left_out(
    make_encoder: MakeEncoder, template: str, system: list[Message], left_out: int
) -> None:
    """Where the template folds the system message into the first turn, it goes into the first that is left."""
    encoder = make_encoder("mistral", template)
    shorter = [pair_row([*system, *PROMPT[2 * n :]]) for n in range(3)]
    lengths = [length(whole(encoder, row)) for row in shorter]
    for max_length in (lengths[left_out], lengths[left_out - 1] - 1):
        found = encoded(encoder, shorter[0], max_length, "truncate_prompt")
        assert found == Encoded(whole(encoder, shorter[left_out]), PROMPT_CUT)
    assert found.ids["prompt_ids"] == encoder.prompt_ids([*system, *PROMPT[2 * left_out :]])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system", "system"])
def test_the_oldest_turns_of_a_dialogue(make_encoder: MakeEncoder, template: str, system: list[Message]) -> None:
    encoder = make_encoder("mistral", template)
    turns = [*PROMPT, assistant("From cows.")]
    shorter = [{"messages": [*system, *turns[2 * n :]]} for n in range(3)]
    for longer, row in pairwise(shorter):
        found = encoded(encoder, shorter[0], length(whole(encoder, longer)) - 1, "truncate_prompt")
        assert found == Encoded(whole(encoder, row), PROMPT_CUT)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[-1:], [SYSTEM, *PROMPT]])
def test_one_question_that_is_too_long_is_dropped(encoder: Encoder, prompt: list[Message]) -> None:
    last = [m for m in prompt if m["role"] == "system"] + PROMPT[-1:]
    least = length(whole(encoder, pair_row(last))) - 1
    assert reason(encoder, pair_row(prompt), least, "truncate_prompt") == TOO_LONG
    dialogue = {"messages": [*last, assistant("From cows.")]}
    row = {"messages": [*prompt, assistant("From cows.")]}
    assert reason(encoder, row, length(whole(encoder, dialogue)) - 1, "truncate_prompt") == TOO_LONG


def test_plain_text_has_no_oldest_turns(encoder: Encoder) -> None:
    assert reason(encoder, ROWS["text"], length(whole(encoder, ROWS["text"])) - 1, "truncate_prompt") == TOO_LONG


def test_a_question_without_an_answer_is_left_out_before_the_oldest_turns(encoder: Encoder) -> None:
    turns = PROMPT[:4]
    limit = length(whole(encoder, {"messages": turns}))
    found = encoded(encoder, {"messages": PROMPT}, limit, "truncate_prompt")
    assert found.ids == whole(encoder, {"messages": turns})
    assert found.cut == "last question left out: it has no answer"


def test_a_long_answer_before_an_unanswered_question_is_too_long(encoder: Encoder) -> None:
    turns = [*PROMPT[:2], user("And coffee?")]
    least = length(whole(encoder, {"messages": turns[:2]})) - 1
    assert reason(encoder, {"messages": turns}, least, "truncate_prompt") == TOO_LONG


# --- truncate_completion ---


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_cut_to_the_limit(make_encoder: MakeEncoder, template: str) -> None:
    """A side that fits keeps its end."""
    encoder = make_encoder("mistral", template)
    row = pair_row(PROMPT, "From cows.", "From stones. " * 9)
    ids = whole(encoder, row)
    n = len(ids["prompt_ids"])
    for room in (len(ids["chosen_ids"]), len(ids["rejected_ids"]) - 1):
        found = encoded(encoder, row, n + room, "truncate_completion")
        assert found == Encoded({**ids, "rejected_ids": ids["rejected_ids"][:room]}, ANSWER_CUT)
        assert length(found.ids) == n + room
        assert found.ids["chosen_ids"][-1] in encoder.stop_ids
        assert not set(found.ids["rejected_ids"]) & set(encoder.stop_ids)


def test_both_answers_are_cut(encoder: Encoder) -> None:
    ids = whole(encoder, row := pair_row(PROMPT, "From cows. " * 9, "Not from cows. " * 9))
    n = len(ids["prompt_ids"])
    found = encoded(encoder, row, n + 5, "truncate_completion").ids
    assert found == {name: part[: 5 if name != "prompt_ids" else n] for name, part in ids.items()}


def test_a_prompt_that_leaves_no_room(encoder: Encoder) -> None:
    row = pair_row(PROMPT, "Cows.", "Stones.")
    n = len(whole(encoder, row)["prompt_ids"])
    for room in (0, -1, -20):
        assert reason(encoder, row, n + room, "truncate_completion") == "prompt leaves no room for an answer"
        messages = {"messages": [PROMPT[0], assistant("Leaves.")]}
        asked = len(encoder.prompt_ids(PROMPT[:1]))
        assert reason(encoder, messages, asked + room, "truncate_completion") == "prompt leaves no room for an answer"
    assert len(encoded(encoder, row, n + 1, "truncate_completion").ids["chosen_ids"]) == 1


def test_answers_that_become_equal_are_dropped(encoder: Encoder) -> None:
    row = pair_row(PROMPT, "It is from cows, of course.", "It is from stones.")
    ids = whole(encoder, row)
    same = next(i for i, (a, b) in enumerate(zip(ids["chosen_ids"], ids["rejected_ids"], strict=False)) if a != b)
    n = len(ids["prompt_ids"])
    assert reason(encoder, row, n + same, "truncate_completion") == "chosen equals rejected within max_length"
    assert encoded(encoder, row, n + same + 1, "truncate_completion").cut == ANSWER_CUT


def test_a_dialogue_is_cut_to_the_limit(encoder: Encoder) -> None:
    row = {"messages": [*PROMPT, assistant("From cows.")]}
    ids = whole(encoder, row)
    size = length(ids)
    found = encoded(encoder, row, size - 2, "truncate_completion")
    assert found == Encoded({name: part[: size - 2] for name, part in ids.items()}, ANSWER_CUT)
    assert found.ids["labels"][-1] == ids["input_ids"][size - 3]


def test_a_text_is_cut_to_the_limit(encoder: Encoder) -> None:
    ids = whole(encoder, ROWS["text"])["input_ids"]
    found = encoded(encoder, ROWS["text"], 8, "truncate_completion")
    assert found == Encoded({"input_ids": ids[:8], "labels": ids[:8]}, ANSWER_CUT)


# --- too long by its characters alone ---


@pytest.mark.parametrize(
    ("overlong", "excluded"),
    [("drop", True), ("truncate_prompt", True), ("truncate_completion", False), ("error", True)],
)
def test_texts_that_are_not_even_tokenized(overlong: str, excluded: bool) -> None:
    limit = Limit(10, overlong, longest_token=4)
    assert not limit.excludes("a" * 40)
    assert limit.excludes("a" * 41) == excluded


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_an_excluded_row_is_dropped_as_any_other(encoder: Encoder, row: Row) -> None:
    class Untouched(Encoder):
        def encode(self, texts: list[str]) -> list[Ids]:
            raise AssertionError(texts)

    blind = Untouched(**vars(encoder))
    rule = tokens.pair if "prompt" in row else tokens.dialogue
    with pytest.raises(Dropped, match=TOO_LONG):
        tokens.encode_one(blind, rule(blind, row, Limit(8, "drop", 1)))


def test_turns_are_left_out_until_the_rest_may_fit(encoder: Encoder) -> None:
    long = [user("What is tea? " * 99), assistant("Leaves. " * 99), *PROMPT[2:]]
    expected = whole(encoder, pair_row(PROMPT[2:]))
    limit = Limit(length(expected), "truncate_prompt", encode._longest_token(encoder))
    found = tokens.encode_rows(encoder, [tokens.pair(encoder, pair_row(long), limit)])
    assert found == [Encoded(expected, PROMPT_CUT)]


many = settings(max_examples=100, deadline=None, derandomize=True)
texts = st.text(st.sampled_from("tea as?\n é🌿"), min_size=1, max_size=12).map(lambda t: f"{t}.")
words = st.lists(st.sampled_from(["assistant", " question", " sentence.\n", " answer", "é", "🌿"]), min_size=1)
said = texts | words.map("".join)
turn_lists = st.lists(st.tuples(said, said), min_size=1, max_size=3).map(
    lambda turns: [message for question, answer in turns for message in (user(question), assistant(answer))]
)


@pytest.fixture(scope="session")
def one_long_token(plain_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> Encoder:
    """Its vocabulary's longest token is one that texts are full of, so that few characters are to spare."""
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens([" question"])
    tokenizer.chat_template = catalog.template("instruct")
    encoder = tokens.encoder(tokenizer)
    assert encode._longest_token(encoder) == len(" question")
    return encoder


@many
@given(
    template=st.sampled_from([*TEMPLATES, "long token"]), turns=turn_lists, other=said, max_length=st.integers(8, 90)
)
@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate_completion"])
def test_excluding_changes_no_row(
    make_encoder: MakeEncoder,
    one_long_token: Encoder,
    overlong: str,
    template: str,
    turns: list[Message],
    other: str,
    max_length: int,
) -> None:
    encoder = one_long_token if template == "long token" else make_encoder("mistral", template)
    row = pair_row(turns[:-1], turns[-1]["content"], other)
    limits = Limit(max_length, overlong), Limit(max_length, overlong, encode._longest_token(encoder))
    for rule, given_row in (
        (tokens.pair, row),
        (tokens.dialogue, {"messages": turns}),
        (tokens.dialogue, {"text": other}),
    ):
        known, quick = (tokens.encode_rows(encoder, [rule(encoder, given_row, limit)])[0] for limit in limits)
        assert repr(known) == repr(quick)


@many
@given(template=st.sampled_from(TEMPLATES), turns=turn_lists, other=said, max_length=st.integers(8, 90))
@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate_completion"])
def test_any_row_fits_or_is_dropped(
    make_encoder: MakeEncoder, overlong: str, template: str, turns: list[Message], other: str, max_length: int
) -> None:
    encoder = make_encoder("mistral", template)
    assume(turns[-1]["content"].strip() != other.strip())
    for row in (pair_row(turns[:-1], turns[-1]["content"], other), {"messages": turns}, {"text": other}):
        ids = whole(encoder, row)
        try:
            found = encoded(encoder, row, max_length, overlong)
        except Dropped:
            assert length(ids) > max_length
            continue
        assert length(found.ids) <= max_length
        assert (found == Encoded(ids)) == (length(ids) <= max_length)
        cuts = {"truncate_prompt": {PROMPT_CUT}, "truncate_completion": {ANSWER_CUT, TURNS_CUT}}.get(overlong, {""})
        assert found.cut in ({""} if length(ids) <= max_length else cuts)
        assert found.cut != ANSWER_CUT or length(found.ids) == max_length
        assert found.cut != TURNS_CUT or found.ids["input_ids"][-1] in encoder.stop_ids


# --- the whole set ---


def write(write_rows: WriteRows, method: str, count: int, *, text: bool = False) -> Path:
    """Sixty short rows, and `count` long ones."""
    question, long = "Tea?", "Leaves. " * 60
    rows: list[Row] = []
    for answer in ["Leaves."] * 60 + [long] * count:
        if method == "dpo":
            rows.append({"prompt": question, "chosen": answer, "rejected": "Stones."})
        elif text:
            rows.append({"text": answer})
        else:
            rows.append({"messages": [user(question), assistant(answer)]})
    return write_rows(rows)


KINDS = [("dpo", False), ("sft", False), ("sft", True)]


@pytest.mark.parametrize(("method", "text"), KINDS)
def test_overlong_rows_are_dropped(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, method: str, text: bool
) -> None:
    train, _ = data.prepare(data_recipe(method, write(write_rows, method, 2, text=text), max_length=300), encoder)
    assert {why: (p.rows, p.first) for why, p in train.ledger.dropped.items()} == {
        TOO_LONG: (2, ["rows.jsonl:61", "rows.jsonl:62"])
    }


@pytest.mark.parametrize(("method", "text"), KINDS)
def test_cut_rows_are_counted(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, method: str, text: bool
) -> None:
    path = write(write_rows, method, 4, text=text)
    recipe = data_recipe(method, path, max_length=300, overlong="truncate_completion")
    train, _ = data.prepare(recipe, encoder)
    assert (train.ledger.kept, train.ledger.dropped) == (64, {})
    first = ["rows.jsonl:61", "rows.jsonl:62", "rows.jsonl:63"]
    assert train.summary()["cut"] == {ANSWER_CUT: {"rows": 4, "first": first}}


@pytest.mark.parametrize(("method", "text"), KINDS)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_overlong_rows_are_an_error(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, method: str, text: bool, count: int
) -> None:
    path = write(write_rows, method, count, text=text)
    recipe = data_recipe(method, path, max_length=300, overlong="error", max_dropped=1.0)
    first = ", ".join(f"rows.jsonl:{61 + i}" for i in range(min(count, 3)))
    with pytest.raises(DataError) as error:
        data.prepare(recipe, encoder)
    assert str(error.value) == (
        f"data.train: rows longer than 300 tokens: {count} (first: {first})"
        " — raise data.max_length, or data.overlong=drop"
    )


def test_overlong_held_out_rows_are_an_error(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    held = write_rows([{"prompt": "Long?", "chosen": "Leaves. " * 60, "rejected": "Stones."}], "eval.jsonl")
    path = write(write_rows, "dpo", 0)
    recipe = data_recipe("dpo", path, eval=[{"path": str(held)}], max_length=300, overlong="error")
    with pytest.raises(DataError, match=r"^data\.eval: rows longer than 300 tokens: 1 \(first: eval\.jsonl:1\) — "):
        data.prepare(recipe, encoder)


def test_no_overlong_row_is_no_error(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    recipe = data_recipe("dpo", write(write_rows, "dpo", 0), max_length=300, overlong="error")
    assert data.prepare(recipe, encoder)[0].ledger.kept == 60
