"""The `data` section as a whole: every row is kept or dropped for a reason, and no prompt is on both sides."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest

from alignctl.errors import DataError
from alignctl.recipe.schema import Recipe
from alignctl.train import data, encode
from alignctl.train.data import Ids, Rows
from alignctl.train.ledger import Places
from alignctl.train.tokens import Encoder

MakeRecipe = Callable[..., Recipe]
WriteRows = Callable[..., Path]
Row = dict[str, Any]


def pair(prompt: str, chosen: str = "Leaves.", rejected: str = "Stones.", **more: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


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
    return [row["prompt"][-1]["content"] for row in canonical(rows)]


def canonical(rows: Rows) -> list[Row]:
    return [rows.canonical(i) for i in range(len(rows))]


def encoded(rows: Rows) -> list[Ids]:
    return [rows.encoded(i) for i in range(len(rows))]


def firsts(reasons: dict[str, Places]) -> dict[str, list[str]]:
    """The rows of each reason, of which there are three at most."""
    assert all(places.rows == len(places.first) for places in reasons.values())
    return {reason: places.first for reason, places in reasons.items()}


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
    assert firsts(train.ledger.dropped) == places
    assert (train.ledger.rows, train.ledger.kept, train.ledger.lost) == (len(rows), kept, len(places))
    assert train.ledger.rows == train.ledger.kept + train.ledger.lost
    assert len(train) == train.dataset().num_rows == kept
    assert evaluated is not None
    assert (evaluated.ledger.rows, evaluated.ledger.kept, evaluated.ledger.lost) == (1, 1, 0)


def test_every_source_is_read_in_its_own_format(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    first, second = write_rows([pair("Tea?"), pair("Milk?")], "a.jsonl"), write_rows([FAULTY_PAIRS[0]], "b.jsonl")
    recipe = data_recipe("dpo", first, more=[{"path": str(second), "take": 1}])
    train, held_out = data.prepare(recipe, encoder)
    assert train.ledger.formats == {
        "prompt, chosen and rejected as strings": 2,
        "chosen and rejected as lists of messages": 1,
    }
    assert sorted(prompts(train)) == ["Milk?", "Tea?", "Tea?"]
    assert [(part["format"], part["rows"]) for part in train.summary()["sources"]] == [
        ("prompt-chosen-rejected", 2),
        ("conversational", 1),
    ]
    assert held_out is None


# --- several sources ---


def named(letter: str, count: int) -> list[Row]:
    return [pair(f"{letter} {i}?") for i in range(count)]


def mixed(
    write_rows: WriteRows, data_recipe: MakeRecipe, parts: dict[str, tuple[int, float | None]], **more: Any
) -> Recipe:
    """A recipe with one source for each of `parts`: how many rows, and their weight."""
    given = [
        {"path": str(write_rows(named(letter, count), f"{letter}.jsonl")), "weight": weight}
        for letter, (count, weight) in parts.items()
    ]
    return data_recipe("dpo", given[0]["path"], {"weight": given[0]["weight"]}, more=given[1:], **more)


def test_one_source_stays_in_order(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    for weight in (None, 0.3):
        recipe = mixed(write_rows, data_recipe, {"a": (600, weight)})
        assert prompts(data.prepare(recipe, encoder)[0]) == [f"a {i}?" for i in range(600)]


def test_several_sources_are_shuffled_by_the_seed(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    parts: dict[str, tuple[int, float | None]] = {"a": (30, None), "b": (20, None)}
    one, again, other = (
        prompts(data.prepare(mixed(write_rows, data_recipe, parts, seed=seed), encoder)[0]) for seed in (1, 1, 2)
    )
    assert one == again != other
    assert (
        sorted(one)
        == sorted(other)
        == sorted(row["prompt"] for part in ("a", "b") for row in named(part, parts[part][0]))
    )
    assert {prompt[0] for prompt in one[:15]} == {"a", "b"}


WEIGHTS = [
    ({"a": (40, 0.5), "b": (10, 0.5)}, {"a": 10, "b": 10}),
    ({"a": (40, 3.0), "b": (10, 1.0)}, {"a": 30, "b": 10}),
    ({"a": (40, 1.0), "b": (10, 3.0)}, {"a": 3, "b": 10}),
    ({"a": (10, 0.7), "b": (20, 0.2), "c": (20, 0.1)}, {"a": 10, "b": 3, "c": 1}),
    ({"a": (5, 1.0), "b": (5, 1.0)}, {"a": 5, "b": 5}),
]


@pytest.mark.parametrize(("parts", "expected"), WEIGHTS)
def test_weights_are_kept_and_no_row_comes_twice(
    encoder: Encoder,
    write_rows: WriteRows,
    data_recipe: MakeRecipe,
    parts: dict[str, tuple[int, float | None]],
    expected: dict[str, int],
) -> None:
    train, _ = data.prepare(mixed(write_rows, data_recipe, parts), encoder)
    found = prompts(train)
    assert len(set(found)) == len(found)
    assert Counter(prompt[0] for prompt in found) == expected
    assert train.ledger.rows == sum(count for count, _ in parts.values())
    assert train.ledger.kept == len(train) == sum(expected.values())
    beyond = {"more than the source's weight": Places(train.ledger.rows - len(train), [])}
    assert train.ledger.aside == (beyond if train.ledger.rows > len(train) else {})


def test_the_seed_picks_the_rows_of_a_weight(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    parts: dict[str, tuple[int, float | None]] = {"a": (40, 0.5), "b": (10, 0.5)}
    found = [
        {p for p in prompts(data.prepare(mixed(write_rows, data_recipe, parts, seed=seed), encoder)[0]) if p[0] == "a"}
        for seed in range(3)
    ]
    assert len(set(map(frozenset, found))) == 3
    assert found[0] != {f"a {i}?" for i in range(10)}


def test_a_mix_is_split_by_prompt(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    recipe = mixed(write_rows, data_recipe, {"a": (40, 0.5), "b": (10, 0.5)}, eval_fraction=0.2)
    train, held_out = data.prepare(recipe, encoder)
    assert held_out is not None
    assert (len(train), len(held_out)) == (16, 4)
    assert {reason: places.rows for reason, places in train.ledger.aside.items()} == {
        "more than the source's weight": 30,
        "held out by data.eval_fraction": 4,
    }
    assert (held_out.ledger.rows, held_out.ledger.kept) == (4, 4)


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

    assert held(path, 1) == held(turned, 1)
    assert len({frozenset(held(path, seed)) for seed in range(5)}) > 1


def test_dialogues_are_split_by_what_the_user_says(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    rows = [chat(("user", f"Tea {i}?"), ("assistant", f"{answer}.")) for i in range(6) for answer in ("Leaf", "Bag")]
    train, held_out = data.prepare(data_recipe("sft", write_rows(rows), eval_fraction=0.5), encoder)
    assert held_out is not None
    sides = [{row["messages"][0]["content"] for row in canonical(side)} for side in (train, held_out)]
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
    assert firsts(train.ledger.dropped) == {"prompt is in the held-out rows": ["rows.jsonl:1", "rows.jsonl:3"]}
    assert prompts(train) == ["Is tea cold?"]
    assert prompts(held_out) == ["Is TEA\n hot?"]


@pytest.mark.parametrize(
    ("row", "text"),
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
        ({"text": " Tea\n is HOT."}, "tea is hot."),
    ],
)
def test_the_prompt_of_a_row(row: Row, text: str) -> None:
    assert encode.prompt_text(row) == text


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


def test_the_fingerprint_changes_with_the_order(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    rows = [pair("Tea?"), pair("Coffee?"), pair("Milk?")]
    found = [
        summary(data_recipe("dpo", write_rows(order, f"{i}.jsonl")), encoder)["fingerprint"]
        for i, order in enumerate((rows, rows[::-1], [*rows[1:], rows[0]], rows[:2]))
    ]
    assert len(set(found)) == 4


def test_the_summary_of_pairs(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    given = [pair("Tea? " * (i % 7 + 1), "Leaves. " * (i * i % 23 + 1), "Stones. " * (i % 5 + 1)) for i in range(41)]
    train, _ = data.prepare(data_recipe("dpo", write_rows(given)), encoder)
    said = json.loads(json.dumps(train.summary()))
    rows = encoded(train)
    lengths = {name: [len(row[f"{name}_ids"]) for row in rows] for name in ("prompt", "chosen", "rejected")}
    assert said["tokens"] == {
        name: {f"p{p}": int(numpy.percentile(values, p)) for p in (5, 50, 95, 99, 100)}
        for name, values in lengths.items()
    }
    answers = sum(lengths["chosen"]) + sum(lengths["rejected"])
    assert said["supervised_share"] == round(answers / (answers + sum(lengths["prompt"])), 4)
    longer = [a > b for a, b in zip(lengths["chosen"], lengths["rejected"], strict=True)]
    assert said["chosen_longer"] == round(sum(longer) / len(longer), 4)
    edges, counts = said["lengths"]["edges"], said["lengths"]["counts"]
    assert {name: sum(counts[name]) for name in counts} == dict.fromkeys(lengths, 41)
    for name, values in lengths.items():
        held = [sum(low <= value < high for value in values) for low, high in pairwise(edges)]
        assert counts[name] == held
        assert said["lengths"]["mean"][name] == round(sum(values) / 41, 2)
    assert (said["rows"], said["kept"], said["dropped"], said["set_aside"], said["cut"]) == (41, 41, {}, {}, {})
    assert said["sources"][0]["cache"].startswith("miss ")
    assert train.sizes().tolist() == [sum(map(len, row.values())) for row in rows]
    assert train.sizes()[train.longest()] == max(train.sizes())


def test_the_summary_of_dialogues(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    given = [chat(*(("user", "Tea?"), ("assistant", "Leaves. " * i)) * 2) for i in range(1, 20)]
    train, _ = data.prepare(data_recipe("sft", write_rows(given)), encoder)
    said = json.loads(json.dumps(train.summary()))
    rows = encoded(train)
    lengths = [len(row["input_ids"]) for row in rows]
    assert said["tokens"] == {"input": {f"p{p}": int(numpy.percentile(lengths, p)) for p in (5, 50, 95, 99, 100)}}
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    assert said["supervised_share"] == round(labelled / sum(lengths), 4)
    assert train.sizes().tolist() == lengths
    assert "ties" not in said
    assert sum(said["lengths"]["counts"]["input"]) == 19


@pytest.mark.parametrize(
    ("lengths", "edges", "counts"),
    [
        ([0, 1, 1, 2], [0, 1, 2, 3], [1, 2, 1]),
        ([40, 80], list(range(0, 83, 2)), [0] * 20 + [1] + [0] * 19 + [1]),
        ([81], list(range(0, 85, 3)), [0] * 27 + [1]),
    ],
)
def test_a_histogram_has_whole_edges_and_every_row(lengths: list[int], edges: list[int], counts: list[int]) -> None:
    found = data._histogram({"input": numpy.array(lengths)})
    assert (found["edges"], found["counts"]["input"]) == (edges, counts)


@pytest.mark.parametrize(
    ("method", "row", "columns"),
    [
        ("dpo", pair("Tea?"), ["chosen_ids", "prompt_ids", "rejected_ids"]),
        ("sft", FAULTY_CHATS[0], ["input_ids", "labels"]),
        ("sft", {"text": "Tea is hot."}, ["input_ids", "labels"]),
    ],
)
def test_the_data_set_holds_the_ids(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, method: str, row: Row, columns: list[str]
) -> None:
    paths = [write_rows([row] * 3 + [row | {"text": "Milk.", "prompt": "Milk?"}], f"{i}.jsonl") for i in range(2)]
    train, _ = data.prepare(data_recipe(method, paths[0], more=[{"path": str(paths[1])}]), encoder)
    found = train.dataset()
    assert sorted(found.column_names) == columns
    assert len(train) == 8
    assert found.to_list() == encoded(train) == [found[i] for i in range(8)]
