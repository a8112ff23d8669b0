"""Where every row goes: kept, dropped or set aside for a reason, and never lost without a word."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignctl.errors import DataError
from alignctl.recipe.schema import Data, Recipe, Source
from alignctl.train import data, encode, ledger
from alignctl.train.data import Rows
from alignctl.train.ledger import Ledger, Places
from alignctl.train.tokens import Encoder

MakeRecipe = Callable[..., Recipe]
WriteRows = Callable[..., Path]
Row = dict[str, Any]


def pair(prompt: str, chosen: str = "Leaves.", rejected: str = "Stones.", **more: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def chat(*contents: str) -> Row:
    """A dialogue that begins with the user."""
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def answer(prompt: str, response: str, score: float, **more: Any) -> Row:
    return {"prompt": prompt, "response": response, "helpfulness": score, **more}


def refused(recipe: Recipe, encoder: Encoder) -> str:
    with pytest.raises(DataError) as error:
        data.prepare(recipe, encoder)
    assert error.value.exit_code == 3
    return str(error.value)


def counts(reasons: dict[str, Places]) -> dict[str, int]:
    return {reason: places.rows for reason, places in reasons.items()}


def check_sum(found: Ledger) -> None:
    assert found.rows == found.kept + found.lost + sum(counts(found.aside).values())


def answers(rows: Rows) -> list[tuple[str, str, str]]:
    """The last question, the chosen answer and the rejected one of every row."""
    found = [rows.canonical(i) for i in range(len(rows))]
    return [tuple(row[part][-1]["content"] for part in ("prompt", "chosen", "rejected")) for row in found]


# --- the ledger itself ---


def test_places_in_the_summary_are_the_first_three() -> None:
    found = Ledger(rows=8, kept=1, formats={"messages": 8})
    found.drop("empty answer", ["a:1"])
    found.drop("longer than max_length", ["a:2", "a:3"])
    found.drop("longer than max_length", ["b:1", "b:2"])
    found.set_aside("tie", ["c:1"])
    found.set_aside("more than the source's weight", [], 1)
    found.set_aside("never", [])
    assert found.summary() == {
        "rows": 8,
        "kept": 1,
        "dropped": {
            "longer than max_length": {"rows": 4, "first": ["a:2", "a:3", "b:1"]},
            "empty answer": {"rows": 1, "first": ["a:1"]},
        },
        "set_aside": {
            "tie": {"rows": 1, "first": ["c:1"]},
            "more than the source's weight": {"rows": 1, "first": []},
        },
        "formats": {"messages": 8},
    }
    assert list(found.summary()["dropped"]) == ["longer than max_length", "empty answer"]
    assert found.lost == 5
    check_sum(found)


def test_ledgers_are_added() -> None:
    one, other = Ledger(4, 2, formats={"messages": 4}), Ledger(6, 1, formats={"messages": 2, "plain text": 4})
    one.drop("a", ["1:1", "1:2"])
    other.drop("a", ["2:1", "2:2", "2:3", "2:4"])
    other.set_aside("b", ["2:5"])
    total = Ledger()
    total.add(one)
    total.add(other)
    assert total == Ledger(
        10,
        3,
        {"a": Places(6, ["1:1", "1:2", "2:1"])},
        {"b": Places(1, ["2:5"])},
        {"messages": 6, "plain text": 4},
    )
    assert one.dropped == {"a": Places(2, ["1:1", "1:2"])}


def test_a_ledger_is_read_back() -> None:
    found = Ledger(6, 2, formats={"messages": 6})
    found.drop("a", ["1:1", "1:2"])
    found.set_aside("b", [], 2)
    assert ledger.from_summary(json.loads(json.dumps(found.summary()))) == found


def test_places_as_text() -> None:
    assert str(Places(4, ["a:1", "a:2", "a:3"])) == "4 (first: a:1, a:2, a:3)"
    assert str(Places(4)) == "4"


@pytest.mark.parametrize(
    ("kept", "lost", "share", "stops"),
    [(95, 5, 0.05, False), (94, 6, 0.05, True), (1, 99, 0.99, False), (0, 1, 1.0, True), (0, 0, 1.0, True)],
)
def test_the_share_that_may_be_dropped(kept: int, lost: int, share: float, stops: bool) -> None:
    found = Ledger(kept + lost, kept)
    found.drop("empty answer", [f"a:{i}" for i in range(lost)])
    recipe = Data(train=[Source(path="a.jsonl")], max_dropped=share)
    if not stops:
        ledger.check("data.train", found, recipe, "too long")
        return
    with pytest.raises(DataError, match=rf"^data\.train: {lost} of {kept + lost} rows would be dropped"):
        ledger.check("data.train", found, recipe, "too long")


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
        " — mend the rows, or raise data.max_dropped"
    )


@pytest.mark.parametrize(("share", "stops"), [(0.5, False), (0.49, True), (0.0, True), (1.0, False)])
def test_the_share_that_may_be_dropped_of_a_file(
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
    held = [{"path": str(write_rows([pair("Milk?"), pair("Empty?", rejected="")], "eval.jsonl"))}]
    said = refused(data_recipe("dpo", write_rows([pair("Tea?")]), eval=held), encoder)
    assert said.startswith("data.eval: 1 of 2 rows would be dropped")
    assert "empty answer: 1 (first: eval.jsonl:2)" in said


@pytest.mark.parametrize("more", [{}, {"eval_fraction": 0.5}])
def test_no_row_left_stops_the_run(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, more: dict[str, Any]
) -> None:
    recipe = data_recipe("dpo", write_rows([pair("Empty?", chosen="")]), max_dropped=1.0, **more)
    assert refused(recipe, encoder) == (
        "data.train: 1 of 1 rows would be dropped, so none is left: empty answer: 1 (first: rows.jsonl:1)"
        " — mend the rows, or raise data.max_dropped"
    )


def test_ties_do_not_count_as_dropped(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    rows = [pair(f"Tea {i}?", score_chosen=2, score_rejected=2 if i else 1) for i in range(9)]
    train, _ = data.prepare(data_recipe("dpo", write_rows(rows), {"tie_margin": 0.0}), encoder)
    assert (train.ledger.kept, counts(train.ledger.aside), train.ledger.lost) == (1, {"tie": 8}, 0)


@pytest.mark.parametrize("way", ["eval_fraction", "weight"])
def test_rows_set_aside_do_not_raise_the_share_that_is_dropped(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, way: str
) -> None:
    """4 of 100 rows are bad, and 5% may be."""
    path = write_rows([pair(f"Tea {i}?") for i in range(96)] + [pair("Empty?", chosen="")] * 4)
    if way == "eval_fraction":
        recipe = data_recipe("dpo", path, eval_fraction=0.5)
    else:
        other = {"path": str(write_rows([pair("Milk?")], "few.jsonl")), "weight": 0.5}
        recipe = data_recipe("dpo", path, {"weight": 0.5}, more=[other])
    assert data.prepare(recipe, encoder)[0].ledger.lost == 4


# --- every row is accounted for ---

PAIRS = {
    "": pair("Tea?"),
    "empty answer": pair("Tea?", chosen=" "),
    "chosen equals rejected": pair("Tea?", rejected="Leaves. "),
    "stop token inside the answer": pair("Tea?", rejected="a<|im_end|>b"),
    "longer than max_length": pair("Tea?", chosen="Leaves. " * 60),
    "tie": pair("Tea?", score_chosen=1.0, score_rejected=1),
}
CHATS = {
    "": chat("Tea?", "Leaves."),
    "empty answer": chat("Tea?", ""),
    "no assistant turn": chat("Tea?"),
    "roles do not alternate": {"messages": [*chat("Tea?")["messages"], *chat("Tea?", "Leaves.")["messages"]]},
    "longer than max_length": chat("Tea?", "Leaves. " * 60),
}
MIXES = st.one_of(
    st.tuples(st.just("dpo"), st.lists(st.sampled_from(list(PAIRS)), min_size=1, max_size=30)),
    st.tuples(st.just("sft"), st.lists(st.sampled_from(list(CHATS)), min_size=1, max_size=30)),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(mix=MIXES, take=st.none() | st.integers(1, 30))
def test_the_ledger_adds_up(
    encoder: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
    data_recipe: MakeRecipe,
    mix: tuple[str, list[str]],
    take: int | None,
) -> None:
    method, names = mix
    known = PAIRS if method == "dpo" else CHATS
    path = tmp_path_factory.mktemp("mix") / "rows.jsonl"
    path.write_text("".join(json.dumps(known[name]) + "\n" for name in names), encoding="utf-8")
    source: dict[str, Any] = {"take": take} | ({"tie_margin": 0.5} if method == "dpo" else {"format": "messages"})
    train, _ = data.read(data_recipe(method, path, source, max_length=300), encoder)
    found = train.ledger
    taken = names[:take]
    expected = Counter(taken)
    assert found.rows == len(taken)
    assert found.kept == len(train) == expected.pop("", 0)
    assert counts(found.aside) == ({"tie": expected.pop("tie")} if "tie" in expected else {})
    assert counts(found.dropped) == dict(expected)
    check_sum(found)
    for reason, places in (found.dropped | found.aside).items():
        assert places.first == [f"rows.jsonl:{i}" for i, name in enumerate(taken, 1) if name == reason][:3]
    assert [train.place(i) for i in range(len(train))] == [
        f"rows.jsonl:{i}" for i, name in enumerate(taken, 1) if not name
    ]


# --- what is said of the kept rows ---


def test_the_summary_of_no_rows(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    train, _ = data.read(data_recipe("dpo", write_rows([pair("Tea?", chosen="")])), encoder)
    said = json.loads(json.dumps(train.summary()))
    assert said.pop("sources")[0]["dropped"] == said["dropped"]
    assert said == train.ledger.summary()
    assert (said["rows"], said["kept"]) == (1, 0)


def test_rows_that_are_alike_are_counted(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    rows = [
        pair("Tea?", score_chosen=2, score_rejected=1),
        pair("Milk?"),
        pair("Tea?", score_chosen=2, score_rejected=2),
        pair("tea !", "LEAVES"),
        pair("Tea?"),
        pair("Tea?", "Stones.", "Leaves."),
        pair("Rain?", "It is wet!", "it is  WET"),
    ]
    train, _ = data.prepare(data_recipe("dpo", write_rows(rows)), encoder)
    said = train.summary()
    assert said["duplicates"] == {"rows": 2, "first": ["rows.jsonl:3", "rows.jsonl:5"]}
    assert said["near_duplicates"] == {"rows": 1, "first": ["rows.jsonl:4"]}
    assert said["ties"] == {"rows": 1, "first": ["rows.jsonl:3"]}
    assert said["same_words"] == {"rows": 1, "first": ["rows.jsonl:7"]}


# --- sets of scored answers ---


def test_answers_are_brought_together_by_prompt(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    rows = [
        answer("Tea?", "Stones.", 1),
        answer("Milk?", "Only one.", 4),
        answer("Tea?", "Leaves.", 4),
        answer("Coffee?", "Beans.", 2),
        answer("Tea?", "Dried leaves.", 3),
        answer("Coffee?", "Berries.", 2),
        answer("Empty?", "", 3),
        answer("Empty?", "Nothing.", 2),
    ]
    train, _ = data.prepare(data_recipe("dpo", write_rows(rows), max_dropped=0.5), encoder)
    assert answers(train) == [("Tea?", "Leaves.", "Stones.")]
    assert train.place(0) == "rows.jsonl:1"
    found = train.ledger
    assert (found.rows, found.kept) == (8, 1)
    assert found.dropped == {"empty answer": Places(1, ["rows.jsonl:7"])}
    assert found.aside == {
        "tie": Places(2, ["rows.jsonl:2", "rows.jsonl:4"]),
        "further answers to a prompt": Places(4, []),
    }
    assert found.formats == {"prompt, response and its score, a row an answer": 8}
    check_sum(found)


def test_answers_that_are_all_in_a_pair(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    rows = [answer("Tea?", "Stones.", 1), answer("Tea?", "Leaves.", 4)]
    train, _ = data.prepare(data_recipe("dpo", write_rows(rows)), encoder)
    assert train.ledger.aside["further answers to a prompt"].rows == 1  # 2 rows in = 1 pair + 1


@pytest.mark.parametrize(("margin", "kept"), [(None, 3), (0.0, 3), (0.9, 3), (1.0, 2), (2.0, 1), (3.0, 0)])
def test_the_margin_between_scored_answers(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, margin: float | None, kept: int
) -> None:
    rows = [
        {"prompt": f"Tea {gap}?", "completions": [{"response": "a", "score": 5}, {"response": "b", "score": 5 - gap}]}
        for gap in range(4)
    ]
    train, _ = data.read(data_recipe("dpo", write_rows(rows), {"tie_margin": margin}), encoder)
    assert (len(train), counts(train.ledger.aside)) == (kept, {"tie": 4 - kept})
    check_sum(train.ledger)


@pytest.mark.parametrize(("margin", "kept"), [(None, 4), (0.0, 3), (0.9, 3), (1.0, 2), (2.0, 1), (3.0, 0)])
def test_the_margin_between_given_scores(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe, margin: float | None, kept: int
) -> None:
    rows = [pair(f"Tea {gap}?", score_chosen=5, score_rejected=5 - gap) for gap in range(4)]
    train, _ = data.read(data_recipe("dpo", write_rows(rows), {"tie_margin": margin}), encoder)
    assert (len(train), train.ledger.lost) == (kept, 0)
    check_sum(train.ledger)


def test_scores_the_wrong_way_round_are_no_tie(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    rows = [pair("Tea?"), pair("Milk?", score_chosen=1, score_rejected=9)]
    train, _ = data.read(data_recipe("dpo", write_rows(rows), {"tie_margin": 1.0}), encoder)
    assert "tie" not in train.ledger.aside


def test_a_random_answer_depends_on_the_seed_alone(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    def scored(i: int) -> Row:
        given = [{"response": f"{i} {score}", "score": score} for score in (1, 5, 2, 5, 3, 4)]
        return {"prompt": f"Tea {i}?", "completions": given}

    rows = [scored(i) for i in range(12)]

    def found(name: str, rows: list[Row], seed: int, rejected: str = "random") -> set[tuple[str, str, str]]:
        recipe = data_recipe("dpo", write_rows(rows, name), {"rejected": rejected, "tie_margin": 1.0}, seed=seed)
        return set(answers(data.prepare(recipe, encoder)[0]))

    first = found("a.jsonl", rows, 1)
    assert first == found("b.jsonl", rows[::-1], 1) == found("a.jsonl", rows, 1)
    assert found("c.jsonl", rows[3:5], 1) <= first
    assert len({frozenset(found("a.jsonl", rows, seed)) for seed in range(4)}) == 4
    assert {chosen.split()[1] for _, chosen, _ in first} == {"5"}
    assert {rejected.split()[1] for _, _, rejected in first} == {"1", "2", "3"}
    worst = found("a.jsonl", rows, 1, "worst")
    assert worst == found("a.jsonl", rows, 2, "worst")
    assert {rejected.split()[1] for _, _, rejected in worst} == {"1"}


# --- one row looked at ---


def test_a_row_by_its_place(encoder: Encoder, write_rows: WriteRows) -> None:
    source = Source(path=str(write_rows([pair("Tea?"), pair("Empty?", chosen=""), pair("Tea?", rejected=3)])))
    settings = Data(train=[source])

    def look(place: str) -> encode.Looked | None:
        return encode.look(source, "dpo", encoder, settings, 42, place)

    kept, dropped = look("rows.jsonl:1"), look("rows.jsonl:2")
    assert kept is not None
    assert kept.canonical is not None
    assert kept.canonical["prompt"][0]["content"] == kept.raw.values["prompt"] == "Tea?"
    assert dropped is not None
    assert str(dropped.encoded) == "empty answer"
    assert look("rows.jsonl:4") is None
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: `rejected` is a number, expected a string — "):
        look("rows.jsonl:3")
