"""Runs beside each other: differences by hand, what means the same in both, and what may not be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.errors import RecipeError
from alignctl.report import html
from alignctl.report.comparison import Row, Set, compare

MakeRun = Callable[..., Path]
Make = Callable[..., dict[str, Any]]


def rows(found: Set) -> dict[str, Row]:
    return {row.name: row for row in found.rows}


def write(run: Path, *found: dict[str, Any]) -> None:
    (run / "evaluations").mkdir(exist_ok=True)
    for each in found:
        (run / "evaluations" / f"{each['name']}.json").write_text(json.dumps(each))


def test_paired_differences_of_two_betas(make_run: MakeRun) -> None:
    """Of 40 pairs 10 have a gap of shift - 0.3 and 30 of shift + 0.1: means 0.2 and 0.6, and 0.4 apart in each pair."""
    found = compare([make_run("low", beta=0.1, shift=0.2), make_run("high", beta=0.5, shift=0.6)])
    (held_out,) = found.sets
    found_rows = rows(held_out)
    margin, accuracy = found_rows["margin_per_token"], found_rows["accuracy_per_token"]
    assert [each.value for each in margin.values if each] == [pytest.approx(0.2), pytest.approx(0.6)]
    (difference,) = margin.differences
    assert difference is not None
    assert difference.value == pytest.approx(0.4)
    assert difference.interval == (pytest.approx(0.4), pytest.approx(0.4))
    assert margin.verdicts == ["better"]
    assert [each.value for each in accuracy.values if each] == [0.75, 1.0]
    assert accuracy.differences[0] is not None
    assert accuracy.differences[0].value == pytest.approx(0.25)
    assert "margin" not in found_rows
    assert any("units of beta" in note for note in found.notes)
    assert found.recipe == [("dpo.beta", ["0.1", "0.5"])]


def test_rewards_are_compared_where_they_mean_the_same(make_run: MakeRun) -> None:
    found = compare([make_run("a", shift=0.2), make_run("b", shift=0.6)])
    assert rows(found.sets[0])["margin"].differences[0].value == pytest.approx(0.4)  # type: ignore[union-attr]
    assert not any("units of beta" in note for note in found.notes)
    other = make_run("c", reference="another reference")
    assert "margin" not in rows(compare([make_run("d"), other]).sets[0])


def test_dpo_beside_orpo(make_run: MakeRun) -> None:
    found = compare([make_run("dpo"), make_run("orpo", "orpo", reference=None)])
    assert "margin_per_token" in rows(found.sets[0])
    assert "margin" not in rows(found.sets[0])
    assert ("orpo.beta", ["–", "0.1"]) in found.recipe


def test_sft_is_compared_by_its_likelihood(make_run: MakeRun) -> None:
    found = compare([make_run("a", "sft", shift=1.0), make_run("b", "sft", shift=0.7), make_run("c", "sft", shift=1.2)])
    nll = rows(found.sets[0])["nll"]
    assert [each.value for each in nll.differences if each] == [pytest.approx(0.3), pytest.approx(-0.2)]
    assert nll.verdicts == ["worse", "better"]


def test_different_held_out_rows_are_refused_by_name(make_run: MakeRun) -> None:
    first, second = make_run("first"), make_run("second", held_out="c" * 64)
    values = json.loads((second / "ledger.json").read_text())
    values["eval"]["sources"][0]["path"] = "others.jsonl"
    (second / "ledger.json").write_text(json.dumps(values))
    with pytest.raises(RecipeError) as error:
        compare([first, second])
    said = str(error.value)
    assert "first on 40 rows of test.jsonl (fingerprint aaaaaaaaaaaa)" in said
    assert "second on 40 rows of others.jsonl (fingerprint cccccccccccc)" in said
    assert f"alignctl eval {first} --data FILE and alignctl eval {second} --data FILE" in said
    assert "tokens are not" not in said


def test_one_file_in_other_tokens_is_refused_and_explained(make_run: MakeRun) -> None:
    with pytest.raises(RecipeError, match="another tokenizer, template or max_length"):
        compare([make_run("first"), make_run("second", held_out="c" * 64)])


def test_evaluations_of_the_same_rows_are_the_way_out(make_run: MakeRun, evaluation: Make) -> None:
    first, second = make_run("first"), make_run("second", held_out="c" * 64)
    write(first, evaluation("extra", "9" * 64, shift=0.2))
    write(second, evaluation("extra", "8" * 64, shift=0.6))
    with pytest.raises(RecipeError, match="different held-out rows"):
        compare([first, second])
    write(second, evaluation("extra", "9" * 64, shift=0.6))
    (found,) = compare([first, second]).sets
    assert (found.name, found.data, found.fingerprint) == ("extra", "extra.jsonl", "9" * 64)
    assert rows(found)["margin_per_token"].differences[0].value == pytest.approx(0.4)  # type: ignore[union-attr]
    assert [reply.text for reply in found.answers[0].replies] == ["extra", "extra"]


def test_the_same_rows_are_not_compared_twice(make_run: MakeRun, evaluation: Make) -> None:
    runs = [make_run("a"), make_run("b")]
    for run in runs:
        write(run, evaluation("held-out", "a" * 64), evaluation("extra", "9" * 64))
    assert [found.name for found in compare(runs).sets] == ["held-out", "extra"]


def test_answers_to_the_prompts_that_both_were_asked(make_run: MakeRun) -> None:
    first, second = make_run("first", answers=3), make_run("second", answers=5)
    lines = [json.loads(line) for line in (second / "samples.jsonl").read_text().splitlines()]
    lines[0] |= {"after": "Something else.", "after_tokens": 99}
    (second / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = compare([first, second]).sets
    assert len(found.answers) == 3
    assert [reply.label for reply in found.answers[0].replies] == ["first", "second"]
    assert found.answers[0].changed
    assert not found.answers[1].changed
    length = rows(found)["answer_tokens"]
    assert (length.n, length.better) == (3, None)
    assert length.differences[0].value == pytest.approx((99 - 5) / 3)  # type: ignore[union-attr]


def test_a_failed_run_is_compared_as_far_as_it_came(make_run: MakeRun) -> None:
    failed = make_run("failed", status="failed", why="it diverged", seconds=None)
    (failed / "logs" / "after.json").unlink()
    found = compare([make_run("good"), failed])
    assert found.notes == ["failed is failed: it diverged"]
    margin = rows(found.sets[0])["margin_per_token"]
    assert margin.values[1] is None
    assert margin.differences == [None]
    assert margin.verdicts == [""]
    assert found.cost[0].texts == ["5 min 00 s", "–"]
    assert "it diverged" in html.comparison(found)


def test_runs_that_held_nothing_out_are_compared_by_the_rest(make_run: MakeRun) -> None:
    runs = [make_run(name, data={"train": {"rows": 400, "fingerprint": "f" * 64}}) for name in ("a", "b")]
    found = compare(runs)
    assert found.sets == []
    assert {curve.key for curve in found.curves} >= {"loss", "drift", "margin"}


def test_what_it_cost(make_run: MakeRun) -> None:
    """A row has 20 tokens on each of three sides, and one epoch saw 400 rows: 24,000."""
    found = {row.label: row.texts for row in compare([make_run("a"), make_run("b", "sft", held_out="a" * 64)]).cost}
    assert found["tokens of the rows seen"] == ["24,000", "8,000"]
    assert found["steps"] == ["60", "60"]
    assert found["peak memory"] == ["3.30 GiB", "3.30 GiB"]


def test_two_runs_are_needed(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(RecipeError, match="two runs or more"):
        compare([run, run / "." / ".." / "run"])


def test_runs_of_one_name_are_told_apart_by_their_paths(make_run: MakeRun) -> None:
    assert compare([make_run("x/run"), make_run("y/run")]).names[0].endswith("x/run")
