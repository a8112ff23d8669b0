"""The `data` section as a whole: every row is kept or dropped for a reason, and no prompt is on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.errors import DataError
from alignctl.recipe.schema import Recipe
from alignctl.train import data
from alignctl.train.data import Ledger, Rows
from alignctl.train.tokens import Encoder

MakeRecipe = Callable[..., Recipe]
WriteRows = Callable[..., Path]
Row = dict[str, Any]


@pytest.fixture(scope="session")
def encoder(make_encoder: Callable[[str, str], Encoder]) -> Encoder:
    return make_encoder("mistral", "chatml")


def pair(prompt: str, chosen: str = "Leaves.", rejected: str = "Stones.") -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(*turns: tuple[str, str]) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def misordered() -> Row:
    """A preference row whose history is two questions in a row."""
    history = [{"role": "user", "content": "Tea?"}, {"role": "user", "content": "Tea!"}]
    good, bad = ({"role": "assistant", "content": content} for content in ("Leaves.", "Stones."))
    return {"chosen": [*history, good], "rejected": [*history, bad]}


def bare_pair(prompt: str, chosen: str, rejected: str) -> Row:
    """A preference row as two conversations."""
    question = {"role": "user", "content": prompt}
    return {
        "chosen": [question, {"role": "assistant", "content": chosen}],
        "rejected": [question, {"role": "assistant", "content": rejected}],
    }


FAULTY_PAIRS = [
    bare_pair("Tea?", "Leaves.", "Stones."),
    misordered(),
    bare_pair("Empty?", " ", "Stones."),
    bare_pair("Stop?", "Leaves.<|im_end|>More.", "Stones."),
    bare_pair("Equal?", "Leaves.", "Leaves. "),
    bare_pair("Long?", "Leaves. " * 60, "Stones."),
    bare_pair("COFFEE ?", "Beans.", "Stones."),
    bare_pair("Milk?", "Cows.", "Stones."),
]
PAIR_PLACES = {
    "roles do not alternate": ["rows.jsonl:2"],
    "empty answer": ["rows.jsonl:3"],
    "stop token inside the answer": ["rows.jsonl:4"],
    "chosen equals rejected": ["rows.jsonl:5"],
    "longer than max_length": ["rows.jsonl:6"],
    "prompt is in the held-out rows": ["rows.jsonl:7"],
}
FAULTY_CHATS = [
    chat(("user", "Tea?"), ("assistant", "Leaves.")),
    chat(("user", "Tea?"), ("user", "Tea!"), ("assistant", "Leaves.")),
    chat(("user", "Empty?"), ("assistant", "")),
    chat(("user", "Stop?"), ("assistant", "Leaves.<|im_end|>")),
    chat(("user", "Nothing?")),
    chat(("user", "Long?"), ("assistant", "Leaves. " * 60)),
    chat(("user", "coffee  ?"), ("assistant", "Beans.")),
]
CHAT_PLACES = {
    "roles do not alternate": ["rows.jsonl:2"],
    "empty answer": ["rows.jsonl:3"],
    "stop token inside the answer": ["rows.jsonl:4"],
    "no assistant turn": ["rows.jsonl:5"],
    "longer than max_length": ["rows.jsonl:6"],
    "prompt is in the held-out rows": ["rows.jsonl:7"],
}
COFFEE_PAIR = bare_pair("Coffee ?", "Beans.", "Stones.")
COFFEE_CHAT = chat(("user", "Coffee ?"), ("assistant", "Beans."))


def evaluation(write_rows: WriteRows, rows: list[Row]) -> list[Row]:
    return [{"path": str(write_rows(rows, "eval.jsonl"))}]


def prompts(rows: Rows | None) -> list[str]:
    """The last question of every row."""
    assert rows is not None
    return [row["prompt"][-1]["content"] for row in rows.canonical]


def refused(recipe: Recipe, encoder: Encoder) -> str:
    with pytest.raises(DataError) as error:
        data.prepare(recipe, encoder)
    assert error.value.exit_code == 3
    return str(error.value)


# --- the ledger ---


@pytest.mark.parametrize(
    ("method", "rows", "held_out", "places", "kept"),
    [
        ("dpo", FAULTY_PAIRS, COFFEE_PAIR, PAIR_PLACES, 2),
        ("orpo", FAULTY_PAIRS, COFFEE_PAIR, PAIR_PLACES, 2),
        ("sft", FAULTY_CHATS, COFFEE_CHAT, CHAT_PLACES, 1),
    ],
)
def test_the_ledger_adds_up(
    encoder: Encoder,
    write_rows: WriteRows,
    data_recipe: MakeRecipe,
    method: str,
    rows: list[Row],
    held_out: Row,
    places: dict[str, list[str]],
    kept: int,
) -> None:
    held = evaluation(write_rows, [held_out])
    recipe = data_recipe(method, write_rows(rows), eval=held, max_length=300, max_dropped=1.0)
    train, evaluated = data.prepare(recipe, encoder)
    assert train.ledger.dropped == places
    assert (train.ledger.rows, train.ledger.kept, train.ledger.lost) == (len(rows), kept, len(places))
    assert train.ledger.rows == train.ledger.kept + train.ledger.lost
    assert len(train.canonical) == len(train.encoded) == kept
    assert evaluated is not None
    assert (evaluated.ledger.rows, evaluated.ledger.kept, evaluated.ledger.lost) == (1, 1, 0)


def test_places_in_the_summary_are_the_first_three() -> None:
    ledger = Ledger(rows=6, kept=1)
    ledger.dropped["empty answer"].append("a:1")
    ledger.dropped["longer than max_length"] += ["a:2", "a:3", "b:1", "b:2"]
    ledger.formats["messages"] = 6
    assert ledger.summary() == {
        "rows": 6,
        "kept": 1,
        "dropped": {
            "longer than max_length": {"rows": 4, "first": ["a:2", "a:3", "b:1"]},
            "empty answer": {"rows": 1, "first": ["a:1"]},
        },
        "formats": {"messages": 6},
    }
    assert list(ledger.summary()["dropped"]) == ["longer than max_length", "empty answer"]


def test_every_source_is_read_in_its_own_format(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    first, second = write_rows([pair("Tea?"), pair("Milk?")], "a.jsonl"), write_rows([FAULTY_PAIRS[0]], "b.jsonl")
    recipe = data_recipe("dpo", first)
    both = [*recipe.data.train, recipe.data.train[0].model_copy(update={"path": str(second), "take": 1})]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": both})})
    train, held_out = data.prepare(recipe, encoder)
    assert train.ledger.formats == {
        "prompt, chosen and rejected as strings": 2,
        "chosen and rejected as messages": 1,
    }
    assert prompts(train) == ["Tea?", "Milk?", "Tea?"]
    assert held_out is None


# --- too many dropped ---


def test_too_many_dropped_rows_stop_the_run(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    rows = [pair("Tea?")] * 4
    rows += [pair("Empty?", chosen="")] * 4
    rows += [pair("Equal?", rejected="Leaves.")] * 3
    rows += [pair("Stop?", chosen="a<|im_end|>b")] * 2
    rows += [pair("Long?", chosen="Leaves. " * 60)]
    said = refused(data_recipe("dpo", write_rows(rows), max_length=300), encoder)
    assert said == (
        "data.train: 10 of 14 rows would be dropped, more than data.max_dropped (5%): "
        "empty answer: 4 (first: rows.jsonl:5, rows.jsonl:6, rows.jsonl:7); "
        "chosen equals rejected: 3 (first: rows.jsonl:9, rows.jsonl:10, rows.jsonl:11); "
        "stop token inside the answer: 2 (first: rows.jsonl:12, rows.jsonl:13)"
        " — mend the rows, or raise data.max_length or data.max_dropped"
    )


@pytest.mark.parametrize(("share", "stops"), [(0.5, False), (0.49, True), (0.0, True), (1.0, False)])
def test_the_share_that_may_be_dropped(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, share: float, stops: bool
) -> None:
    recipe = data_recipe("dpo", write_rows([pair("Tea?"), pair("Empty?", chosen="")]), max_dropped=share)
    if stops:
        assert "1 of 2 rows would be dropped" in refused(recipe, encoder)
    else:
        assert data.prepare(recipe, encoder)[0].ledger.lost == 1


def test_dropped_held_out_rows_stop_the_run_too(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    held = evaluation(write_rows, [pair("Milk?"), pair("Empty?", rejected="")])
    said = refused(data_recipe("dpo", write_rows([pair("Tea?")]), eval=held), encoder)
    assert said.startswith("data.eval: 1 of 2 rows would be dropped")
    assert "empty answer: 1 (first: eval.jsonl:2)" in said


def test_no_row_left_stops_the_run(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    recipe = data_recipe("dpo", write_rows([pair("Empty?", chosen="")]), max_dropped=1.0)
    assert refused(recipe, encoder) == (
        "data.train: 1 of 1 rows would be dropped, so none is left: empty answer: 1 (first: rows.jsonl:1)"
        " — mend the rows, or raise data.max_length or data.max_dropped"
    )


# --- overlong rows ---


def overlong(write_rows: WriteRows, count: int) -> Path:
    return write_rows([pair("Tea?")] * 60 + [pair("Long?", chosen="Leaves. " * 60)] * count)


def test_overlong_rows_are_dropped(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    train, _ = data.prepare(data_recipe("dpo", overlong(write_rows, 2), max_length=300), encoder)
    assert train.ledger.dropped == {"longer than max_length": ["rows.jsonl:61", "rows.jsonl:62"]}


@pytest.mark.parametrize(
    ("count", "first"),
    [
        (1, "rows.jsonl:61"),
        (3, "rows.jsonl:61, rows.jsonl:62, rows.jsonl:63"),
        (4, "rows.jsonl:61, rows.jsonl:62, rows.jsonl:63"),
    ],
)
def test_overlong_rows_are_an_error(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, count: int, first: str
) -> None:
    recipe = data_recipe("dpo", overlong(write_rows, count), max_length=300, overlong="error")
    assert refused(recipe, encoder) == (
        f"data.train: rows longer than 300 tokens: {count} (first: {first})"
        " — raise data.max_length, or data.overlong=drop"
    )


def test_overlong_held_out_rows_are_an_error(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    held = evaluation(write_rows, [pair("Long?", chosen="Leaves. " * 60)])
    recipe = data_recipe("dpo", write_rows([pair("Tea?")]), eval=held, max_length=300, overlong="error")
    assert refused(recipe, encoder).startswith("data.eval: rows longer than 300 tokens: 1 (first: eval.jsonl:1) — ")


def test_no_overlong_row_is_no_error(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    recipe = data_recipe("dpo", overlong(write_rows, 0), max_length=300, overlong="error")
    assert data.prepare(recipe, encoder)[0].ledger.kept == 60


# --- training rows and held-out rows ---

SPELLINGS = [pair(f"{word} {i}?") for i in range(10) for word in ("Which tea", "which  TEA", " Which\ntea ")]


def normal(prompt: str) -> str:
    return " ".join(prompt.lower().split())


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.2, 2), (0.5, 5), (0.9, 9)])
def test_a_prompt_is_on_one_side(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, fraction: float, held: int
) -> None:
    train, held_out = data.prepare(data_recipe("dpo", write_rows(SPELLINGS), eval_fraction=fraction), encoder)
    sides = {normal(p) for p in prompts(train)}, {normal(p) for p in prompts(held_out)}
    assert len(sides[1]) == held
    assert not sides[0] & sides[1]
    assert sorted(prompts(train) + prompts(held_out)) == sorted(row["prompt"] for row in SPELLINGS)
    assert train.ledger.lost == 0


def test_the_seed_decides_who_is_held_out(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    path, turned = write_rows(SPELLINGS, "a.jsonl"), write_rows(SPELLINGS[::-1], "b.jsonl")

    def held(path: Path, seed: int) -> set[str]:
        recipe = data_recipe("dpo", path, seed=seed, eval_fraction=0.3)
        return {normal(p) for p in prompts(data.prepare(recipe, encoder)[1])}

    assert held(path, 1) == held(turned, 1) == {"which tea 6?", "which tea 8?", "which tea 9?"}
    assert len({frozenset(held(path, seed)) for seed in range(5)}) > 1


def test_dialogues_are_split_by_what_the_user_says(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    rows = [chat(("user", f"Tea {i}?"), ("assistant", f"{answer}.")) for i in range(6) for answer in ("Leaf", "Bag")]
    train, held_out = data.prepare(data_recipe("sft", write_rows(rows), eval_fraction=0.5), encoder)
    assert held_out is not None
    sides = [{row["messages"][0]["content"] for row in side.canonical} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [3, 3]


def test_too_few_prompts_to_split_are_called_so(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    assert refused(data_recipe("dpo", write_rows([pair("Tea?")] * 5), eval_fraction=0.5), encoder) == (
        "data.eval_fraction: 0.5 of 1 different prompts leaves none to train on — lower it, or name `data.eval`"
    )


def test_training_rows_with_a_held_out_prompt_are_dropped(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    held = evaluation(write_rows, [pair("Is TEA\n hot?", chosen="Yes.", rejected="No.")])
    rows = [pair("is tea hot?"), pair("Is tea cold?"), pair("Is tea hot?")]
    train, held_out = data.prepare(data_recipe("dpo", write_rows(rows), eval=held, max_dropped=0.7), encoder)
    assert train.ledger.dropped == {"prompt is in the held-out rows": ["rows.jsonl:1", "rows.jsonl:3"]}
    assert prompts(train) == ["Is tea cold?"]
    assert prompts(held_out) == ["Is TEA\n hot?"]


def test_a_held_out_row_that_is_dropped_still_holds_its_prompt(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    held = evaluation(write_rows, [pair("Tea?", chosen=""), pair("Milk?")])
    recipe = data_recipe("dpo", write_rows([pair("Tea?"), pair("Coffee?")]), eval=held, max_dropped=0.5)
    assert prompts(data.prepare(recipe, encoder)[0]) == ["Coffee?"]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": [{"role": "user", "content": " Is\tTea  hot?\n"}]}, "is tea hot?"),
        (
            {
                "prompt": [
                    {"role": "system", "content": "Be Short."},
                    {"role": "user", "content": "Tea?"},
                    {"role": "assistant", "content": "Leaves."},
                    {"role": "user", "content": "Hot?"},
                ]
            },
            "be short. tea? leaves. hot?",
        ),
        (chat(("system", "Be Short."), ("user", "Tea?"), ("assistant", "Leaves.")), "be short. tea?"),
    ],
)
def test_prompt_key(row: Row, key: str) -> None:
    assert data.prompt_key(row) == key


# --- formats ---


def test_the_chosen_answers_become_rows_for_sft(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    rows = [pair("Tea?"), {**pair("Coffee?", chosen="Beans."), "system": "Be short."}]
    path = write_rows(rows)
    train, _ = data.prepare(data_recipe("sft", path, source={"answer": "chosen"}), encoder)
    expected = [
        chat(("user", "Tea?"), ("assistant", "Leaves.")),
        chat(("system", "Be short."), ("user", "Coffee?"), ("assistant", "Beans.")),
    ]
    assert train.canonical == expected
    assert train.ledger.formats == {"prompt, chosen and rejected as strings": 2}
    same, _ = data.prepare(data_recipe("sft", write_rows(expected, "messages.jsonl")), encoder)
    assert train.encoded == same.encoded


def test_a_preference_file_for_sft_names_the_way_out(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    said = refused(data_recipe("sft", write_rows([pair("Tea?")])), encoder)
    assert said == (
        "rows.jsonl:1: columns are `prompt` (a string), `chosen` (a string), `rejected` (a string), "
        "expected “messages” or “prompt and completion” — rename the columns; for a preference set, `answer: chosen`"
    )


SECOND_SHAPES: dict[str, tuple[str, list[Row], str]] = {
    "lists among strings": (
        "dpo",
        [pair("Tea?"), FAULTY_PAIRS[0]],
        "rows.jsonl:2: `prompt` is missing, expected a string — "
        "the first row has the format “prompt, chosen and rejected as strings”; mend or remove this one",
    ),
    "strings among lists": (
        "orpo",
        [FAULTY_PAIRS[0], FAULTY_PAIRS[0], pair("Tea?")],
        "rows.jsonl:3: `chosen` is a string, expected a list of messages — "
        "the first row has the format “chosen and rejected as messages”; mend or remove this one",
    ),
    "completion among messages": (
        "sft",
        [FAULTY_CHATS[0], {"prompt": "Tea?", "completion": "Leaves."}],
        "rows.jsonl:2: `messages` is missing, expected a list of messages — "
        "the first row has the format “messages”; mend or remove this one",
    ),
}


@pytest.mark.parametrize(("method", "rows", "message"), SECOND_SHAPES.values(), ids=SECOND_SHAPES.keys())
def test_a_second_shape_in_a_file_names_its_row(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, method: str, rows: list[Row], message: str
) -> None:
    assert refused(data_recipe(method, write_rows(rows)), encoder) == message


def test_text_that_is_no_unicode_names_its_row(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    """JSON can hold half an emoji, where somebody cut a text by its UTF-16 units."""
    recipe = data_recipe("dpo", write_rows([pair("Tea?"), pair("Milk?", chosen="Cows \ud83d")]), max_dropped=0.5)
    said = refused(recipe, encoder)
    assert said.startswith("rows.jsonl:2: `chosen` is no text: character 6 is half of a surrogate pair — ")


# --- what goes on to training, and into ledger.json ---


def summary(recipe: Recipe, encoder: Encoder) -> dict[str, Any]:
    return data.prepare(recipe, encoder)[0].summary()


@pytest.mark.parametrize("change", [{"prompt": "Tee?"}, {"chosen": "Leaf."}, {"rejected": "Stone."}])
def test_the_fingerprint_changes_with_a_row(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, change: Row
) -> None:
    rows = [pair("Tea?"), pair("Coffee?")]
    first = summary(data_recipe("dpo", write_rows(rows, "a.jsonl")), encoder)["fingerprint"]
    again = summary(data_recipe("orpo", write_rows(rows, "b.jsonl")), encoder)["fingerprint"]
    other = summary(data_recipe("dpo", write_rows([{**rows[0], **change}, rows[1]], "c.jsonl")), encoder)["fingerprint"]
    assert first == again != other


def test_the_fingerprint_ignores_rows_that_are_dropped(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    kept = summary(data_recipe("dpo", write_rows([pair("Tea?")], "a.jsonl")), encoder)
    rows = [pair("Tea?"), pair("Empty?", chosen="")]
    more = summary(data_recipe("dpo", write_rows(rows, "b.jsonl"), max_dropped=0.5), encoder)
    assert more["fingerprint"] == kept["fingerprint"]
    assert more["dropped"] == {"empty answer": {"rows": 1, "first": ["b.jsonl:2"]}}


def ids(count: int) -> list[int]:
    return list(range(count))


def test_the_summary_of_pairs() -> None:
    encoded = [{"prompt_ids": ids(2 * n), "chosen_ids": ids(n), "rejected_ids": ids(3)} for n in range(1, 102)]
    said = Rows([{}] * 101, encoded, Ledger(rows=101, kept=101)).summary()
    assert said["tokens"] == {
        "prompt": {"p5": 12, "p50": 102, "p95": 192, "p100": 202},
        "chosen": {"p5": 6, "p50": 51, "p95": 96, "p100": 101},
        "rejected": {"p5": 3, "p50": 3, "p95": 3, "p100": 3},
    }
    assert said["supervised_share"] == round((5151 + 303) / (3 * 5151 + 303), 4)
    assert (said["rows"], said["kept"], said["dropped"]) == (101, 101, {})


def test_the_summary_of_dialogues() -> None:
    encoded = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]}, {"input_ids": [5], "labels": [5]}]
    said = Rows([{}] * 2, encoded, Ledger(rows=2, kept=2)).summary()
    assert list(said["tokens"]) == ["input"]
    assert said["tokens"]["input"]["p100"] == 4
    assert said["supervised_share"] == 0.4
    assert said["fingerprint"] == hashlib.sha256(json.dumps(encoded).encode()).hexdigest()


def test_the_summary_of_no_rows() -> None:
    ledger = Ledger(rows=1)
    ledger.dropped["empty answer"].append("a:1")
    assert Rows([], [], ledger).summary() == ledger.summary()


@pytest.mark.parametrize(
    ("method", "row", "columns"),
    [
        ("dpo", pair("Tea?"), ["chosen_ids", "prompt_ids", "rejected_ids"]),
        ("sft", FAULTY_CHATS[0], ["input_ids", "labels"]),
    ],
)
def test_the_data_set_holds_the_ids(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, method: str, row: Row, columns: list[str]
) -> None:
    train, _ = data.prepare(data_recipe(method, write_rows([row])), encoder)
    found = train.dataset()
    assert sorted(found.column_names) == columns
    assert found.to_list() == train.encoded
