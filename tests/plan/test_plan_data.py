"""Lengths of rows that nobody tokenized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.errors import RecipeError
from alignctl.plan import data
from alignctl.plan.activations import Batch
from alignctl.plan.data import Lengths, Row
from alignctl.recipe.load import Loaded, load
from alignctl.recipe.schema import Recipe

PAIRS = [{"prompt": "a" * 40, "chosen": "b" * (8 * i), "rejected": "c" * 12} for i in range(1, 6)]
RECIPE = "model: {name_or_path: microsoft/phi-2}\nlora: {}\ntraining: {learning_rate: 1e-4}\n"


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loaded]:
    """A recipe in an empty folder, with `rows` in a file where some are given."""
    monkeypatch.chdir(tmp_path)

    def build(rows: list[dict[str, Any]] | None, method: str = "dpo", more: str = "") -> Loaded:
        if rows is not None:
            Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        path = "rows.jsonl" if rows is not None else "somebody/rows"
        text = f"{RECIPE}data: {{train: [{{path: {path}{more}}}], max_length: 64}}\n{method}: {{}}\n"
        Path("r.yaml").write_text(text, encoding="utf-8")
        return load(Path("r.yaml"))

    return build


def test_a_packed_batch(recipe: Callable[..., Recipe]) -> None:
    """A prompt is computed once and attended to twice."""
    rows = [Row(10, 20, 5), Row(4, 6, 6)]
    assert data.batch(rows, recipe(), packed=True) == Batch(4, 30, 35 + 16, 45 + 20, 25 + 12)
    assert data.batch(rows, recipe(), packed=False) == Batch(4, 30, 120, 120, 37)
    assert data.batch(rows, recipe("orpo"), packed=True).supervised == 37 + 14
    assert data.batch(rows, recipe("orpo", orpo={"nll_on_prompt": False}), packed=True).supervised == 37
    assert data.batch([Row(0, 20), Row(0, 8)], recipe("sft"), packed=True) == Batch(2, 20, 28, 28, 28)


def test_no_row_is_longer_than_the_limit() -> None:
    assert Row(50, 30, 10).within(64) == Row(50, 14, 10) and Row(90, 5, 5).within(64) == Row(63, 1, 1)


def test_the_longest_rows_make_the_largest_batch(recipe: Callable[..., Recipe]) -> None:
    lengths = Lengths((Row(8, 9, 9), Row(8, 5, 5)), Row(1, 1, 1), 9, "")
    assert data.largest(lengths, recipe(training={"per_device_train_batch_size": 1}), packed=True).tokens == 26
    assert data.largest(lengths, recipe(), packed=True).tokens == 26 + 3 * 18  # four rows, of which two are known


def test_rows_that_are_not_at_hand(loaded: Callable[..., Loaded]) -> None:
    found = data.of(loaded(None, more=", take: 7"), None)
    assert (found.longest, found.count) == ((Row(0, 64, 64),), 7) and "at most" in found.source
    assert data.of(loaded(None, "sft"), None).longest == (Row(0, 64),)
    assert data.of(loaded(None), None).count is None


def test_the_recipes_own_file(loaded: Callable[..., Loaded]) -> None:
    """Four characters to a token."""
    found = data.of(loaded(PAIRS), None)
    assert found.longest[0] == Row(10, 10, 3) and found.mean == Row(10, 6, 3) and found.count == 5
    assert found.source == "5 rows, estimated as a token for 4 characters"
    assert data.of(loaded(PAIRS, more=", take: 2"), None).longest == (Row(10, 4, 3), Row(10, 2, 3))


def test_a_file_that_is_named(loaded: Callable[..., Loaded]) -> None:
    recipe = loaded(None)
    Path("more.jsonl").write_text(json.dumps(PAIRS[4]) + "\n", encoding="utf-8")
    assert data.of(recipe, Path("more.jsonl")).longest == (Row(10, 10, 3),)
    Path("more.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    assert data.of(recipe, Path("more.json")).count == 5


def test_dialogues(loaded: Callable[..., Loaded]) -> None:
    messages = [{"role": "user", "content": "a" * 8}, {"role": "assistant", "content": "b" * 16}]
    assert data.of(loaded([{"messages": messages}], "sft"), None).longest == (Row(0, 6),)
    assert data.of(loaded(PAIRS, "sft", ", answer: chosen"), None).longest[0] == Row(0, 20)


def test_answers_with_scores(loaded: Callable[..., Loaded]) -> None:
    answers = [{"response": "x" * size, "score": float(size)} for size in (40, 4, 80)]
    found = data.of(loaded([{"prompt": "a" * 8, "completions": answers}]), None)
    assert found.longest == (Row(2, 20, 1),)  # the best against the worst
    apart = [{"prompt": "a" * 8, **answer} for answer in answers]
    assert data.of(loaded(apart), None).longest == found.longest


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', "\xff"])
def test_a_file_without_rows(loaded: Callable[..., Loaded], content: str) -> None:
    Path("bad.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"bad\.jsonl"):
        data.of(loaded(None), Path("bad.jsonl"))


def test_the_ledger_of_an_earlier_run(loaded: Callable[..., Loaded]) -> None:
    recipe = loaded(None)
    run = Path("runs") / "r"
    run.mkdir(parents=True)
    sides = {name: {"p50": 3, "p100": size} for name, size in (("prompt", 7), ("chosen", 20), ("rejected", 9))}
    (run / "ledger.json").write_text(json.dumps({"train": {"kept": 44, "tokens": sides}}), encoding="utf-8")
    assert data.of(recipe, None).count is None  # of which rows it is, nobody knows
    (run / "recipe.yaml").write_text(recipe.text(), encoding="utf-8")
    found = data.of(recipe, None)
    assert (found.longest, found.mean, found.count) == ((Row(7, 20, 9),), Row(3, 3, 3), 44)
    assert "ledger.json" in found.source
    (run / "recipe.yaml").write_text(recipe.text().replace("max_length: 64", "max_length: 65"), encoding="utf-8")
    assert data.of(recipe, None).count is None
