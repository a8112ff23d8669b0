"""A run's folder is read whatever state it is in; only a folder that holds no run is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignctl.errors import RecipeError
from alignctl.report import html, plots
from alignctl.report.gather import gather
from alignctl.report.values import dig, interval, number, numbers

MakeRun = Callable[..., Path]
FILES = (
    "recipe.yaml",
    "ledger.json",
    "metrics.jsonl",
    "summary.json",
    "samples.jsonl",
    "logs/before.json",
    "logs/after.json",
)
JUNK = {
    "nothing": b"",
    "half": b'{"train": {"rows": 3, "kept"',
    "no text": b"\xff\xfe\x00\x81",
    "a list": b"[1, 2, 3]",
    "a number": b"7",
    "nulls": b'{"train": null, "after": null, "scores": null, "model": null, "gates": null, "samples": null}',
    "wrong kinds": b'{"train": {"lengths": {"edges": [0, "x"], "counts": 3, "mean": []}, "tokens": 5, "dropped": [1],'
    b' "sources": [1, {"path": 4}]}, "after": {"n": "x", "margin": true}, "before": [], "scores": {"nll": [null]},'
    b' "step": "x", "loss": [], "prompt": {"a": 1}, "before_tokens": "x", "findings": [{"warns": 1}, 3]}',
}


def test_everything_is_read(make_run: MakeRun) -> None:
    found = gather(make_run(steps=8))
    assert (found.status, found.method, found.beta, found.unread) == ("finished", "dpo", 0.1, [])
    assert len(found.metrics) == 8 + 4
    assert found.recipe["training"]["learning_rate"] == 5e-5
    assert found.scores["after"]["scores"]["chosen_rewards"][0] == pytest.approx(0.35)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("junk", list(JUNK.values()), ids=list(JUNK))
def test_a_broken_file_never_stops_the_page(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, name: str, junk: bytes
) -> None:
    monkeypatch.setattr(plots, "curve", lambda shown: shown.alternative)  # drawn elsewhere, and slowly
    run = make_run(steps=3)
    (run / name).write_bytes(junk)
    page = html.page(gather(run))
    assert "<h1>run</h1>" in page
    assert ("Could not be read" in page) == bool(gather(run).unread)


def test_a_broken_file_is_named(make_run: MakeRun) -> None:
    run = make_run()
    (run / "ledger.json").write_bytes(JUNK["half"])
    (run / "recipe.yaml").write_text("model: [", encoding="utf-8")
    found = gather(run)
    assert [line.split(":")[0] for line in found.unread] == ["recipe.yaml", "ledger.json"]
    assert found.ledger == found.recipe == {}
    assert found.recipe_text == "model: ["


def test_a_folder_of_a_run_json_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "failed", "why": "no disk", "command": "alignctl dpo x"}')
    page = html.page(gather(tmp_path))
    assert "no disk" in page
    assert "The run stopped before its recipe was written." in page
    assert 'id="curves"' not in page


@pytest.mark.parametrize(
    "values",
    [
        {"gates": 3, "model": [], "machine": "x", "data": [], "engine": 1, "versions": 2},
        {"seconds": "long", "started": 5, "status": [], "why": {}, "memory": {"lines": 3}},
        {"gates": {"a": 1, "b": {"verdict": [], "value": 1e400}}, "engine": {"packed": 1}},
    ],
)
def test_a_run_json_of_other_kinds(make_run: MakeRun, values: dict[str, object]) -> None:
    run = make_run(**values)
    assert "<h1>run</h1>" in html.page(gather(run))


def test_a_line_of_the_log_that_was_being_written_is_left_out(make_run: MakeRun) -> None:
    run = make_run(steps=3)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('17\n{"step": 4, "lo')
    assert len(gather(run).metrics) == len(gather(make_run("whole", steps=3)).metrics)


def test_a_run_that_nobody_writes_was_killed(make_run: MakeRun) -> None:
    page = html.page(gather(make_run(status="running")))
    assert "<strong>killed</strong>" in page
    assert "The process ended without a word" in page


@pytest.mark.parametrize(("content", "said"), [(None, "is no run"), ("{", "cannot be read"), ("[]", "cannot be read")])
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RecipeError, match=said) as error:
        gather(tmp_path)
    assert "--output another" not in str(error.value)


def test_secrets_are_not_shown(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "tea&leaves<secret>")
    run = make_run(status="failed", why="refused: tea&leaves<secret>")
    values = json.loads((run / "ledger.json").read_text())
    values["train"]["dropped"] = {"holds tea&leaves<secret>": {"rows": 1, "first": []}}
    (run / "ledger.json").write_text(json.dumps(values))
    page = html.page(gather(run))
    assert "tea&amp;leaves" not in page
    assert page.count("${oc.env:MY_TOKEN}") == 2


def test_values_of_other_kinds_are_none() -> None:
    assert [number(v) for v in (1, 2.5, True, "3", None, float("nan"), float("inf"), 10**400)] == [1, 2.5, *[None] * 6]
    assert numbers([1, 2]) == [1.0, 2.0]
    assert numbers([1, None]) == numbers("12") == numbers(None) == []
    assert interval([0.1, 0.2]) == (0.1, 0.2)
    assert interval([0.1]) is None
    assert dig({"a": {"b": 1}}, "a", "b") == 1
    assert dig({"a": 3}, "a", "b") is dig(None, "a") is None
