"""Held-out numbers in one shape, whoever measured them, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.report import html, measures, shown, view
from alignctl.report.gather import gather
from alignctl.report.measures import Estimate, Evaluation

MakeRun = Callable[..., Path]
Make = Callable[..., dict[str, Any]]


def of(run: Path, *found: dict[str, Any]) -> list[Evaluation]:
    for each in found:
        (run / "evaluations").mkdir(exist_ok=True)
        (run / "evaluations" / f"{each['name']}.json").write_text(json.dumps(each))
    return measures.evaluations(gather(run))


def test_what_the_run_measured_itself(make_run: MakeRun) -> None:
    (found,) = of(make_run())
    assert (found.name, found.verdict) == ("held-out", "better")
    assert found.reason == "rise of the reward margin +0.900, 95 % interval +0.700 to +1.100"
    accuracy, margin = found.find("reward_accuracy"), found.find("margin")
    assert accuracy is not None
    assert margin is not None
    assert (accuracy.reference, accuracy.tuned) == (Estimate(0.5, (0.35, 0.65)), Estimate(0.9, (0.77, 0.96)))
    assert (accuracy.n, accuracy.difference) == (40, None)
    assert margin.difference == Estimate(0.9, (0.7, 1.1))
    assert [group for group, _ in found.groups()] == ["preferences", "likelihood", "answers", "drift"]


def test_a_gain_of_sft_is_a_fall(make_run: MakeRun) -> None:
    (found,) = of(make_run(method="sft"))
    nll = found.find("nll")
    assert nll is not None
    assert nll.difference == Estimate(-0.9, (-1.1, -0.7))


def test_an_evaluation_of_the_held_out_rows_takes_the_place_of_the_runs_own(
    make_run: MakeRun, evaluation: Make
) -> None:
    run = make_run()
    found = of(run, evaluation("other"), evaluation("held-out"), evaluation("another"))
    assert [each.name for each in found] == ["held-out", "another", "other"]
    measure = found[0].find("reward_accuracy")
    assert measure is not None
    assert measure.difference == Estimate(0.48, (0.4, 0.5), 0.0005)
    assert found[0].data == "40 rows of held-out.jsonl"
    assert found[0].judges[0].wins == 3
    banner = view.banner(gather(run), found)
    assert (banner.word, banner.tone) == ("better", "good")
    assert banner.reason.startswith("It tells 98 %")
    page = html.page(gather(run))
    for said in ("87.5% (40.0% to 100.0%)", "+48.0 points (+40.0 to +50.0), p = 0.0005", "trained, drawn"):
        assert said in page


def test_beside_another_evaluation_the_runs_own_numbers_stay(make_run: MakeRun, evaluation: Make) -> None:
    assert [each.name for each in of(make_run(), evaluation("other"))] == ["held-out", "other"]


@pytest.mark.parametrize("left_out", ["numbers", "rows", "answers", "judges", "data", "against", "verdict", "reason"])
def test_any_part_may_be_missing(make_run: MakeRun, evaluation: Make, left_out: str) -> None:
    run = make_run()
    values = evaluation()
    del values[left_out]
    (found,) = of(run, values)
    assert found.name == "held-out"
    assert "<h1>run</h1>" in html.page(gather(run))


@pytest.mark.parametrize("verdict", ["worse", "broken"])
def test_a_bad_verdict_is_red(make_run: MakeRun, evaluation: Make, verdict: str) -> None:
    run = make_run()
    found = of(run, evaluation(verdict=verdict))
    assert view.banner(gather(run), found).tone == "bad"


def test_a_run_without_held_out_rows(make_run: MakeRun) -> None:
    run = make_run()
    (run / "summary.json").write_text('{"method": "dpo", "verdict": "not measured: the recipe holds no rows out"}')
    assert of(run) == []
    banner = view.banner(gather(run), [])
    assert (banner.word, banner.tone) == ("finished", "fair")
    assert "holds no rows out" in banner.reason


def test_how_numbers_are_written() -> None:
    assert shown.estimate(None, "share") == shown.difference(None, "nats") == "–"
    assert shown.estimate(Estimate(0.5, (0.25, 0.75)), "share") == "50.0% (25.0% to 75.0%)"
    assert shown.estimate(Estimate(1.25), "ratio") == "1.25×"
    assert shown.estimate(Estimate(1234.5), "tokens") == "1,234.5"
    assert shown.estimate(Estimate(0.9), "") == "0.900"
    assert shown.estimate(Estimate(12345.0), "") == "1.234e+04"
    assert shown.difference(Estimate(-0.1, (-0.2, 0.0)), "nats") == "-0.100 (-0.200 to +0.000)"
    assert shown.difference(Estimate(0.1), "share") == "+10.0 points"
    assert [shown.duration(s) for s in (None, 9.24, 61, 3725)] == ["–", "9.2 s", "1 min 01 s", "1 h 02 min"]
    assert shown.moment("2026-11-25T17:05:59+00:00") == "2026-11-25 17:05 UTC"
    assert shown.moment("") == ""


def test_planned_against_measured_memory(make_run: MakeRun) -> None:
    lines = [{"name": "weights", "bytes": 2**30}, {"name": "broken", "bytes": "x"}]
    run = make_run(memory={"planned_gib": 3.3, "measured_gib": 3.0, "lines": lines})
    found = view.memory(gather(run))
    assert found == view.Memory(3.3, 3.0, [("weights", 1.0)])
    assert "(+10 % of what was measured)" in html.page(gather(run))


def test_measured_memory_comes_from_the_log_where_nothing_was_planned(make_run: MakeRun) -> None:
    found = view.memory(gather(make_run()))
    assert found is not None
    assert (found.planned, found.measured) == (None, pytest.approx(3.3))
    assert "planned not" in html.page(gather(make_run("other")))
