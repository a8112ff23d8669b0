"""All runs below a folder, whatever state they are in."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignctl.report.listing import Row, listing

MakeRun = Callable[..., Path]


def by_name(folder: Path) -> dict[str, Row]:
    return {Path(row.path).name: row for row in listing(folder)}


def test_what_a_row_says(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    assert listing(tmp_path) == [
        Row(
            path=str(run),
            status="finished",
            method="dpo",
            model="some/model",
            data="train.jsonl",
            verdict="better",
            accuracy=0.9,
            margin=0.9,
            seconds=300.0,
            started="2026-11-25T17:00:00+00:00",
        )
    ]
    assert listing(run) == listing(tmp_path)


def test_the_newest_first(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("old", started="2026-11-24T10:00:00+00:00")
    make_run("deep/down/new", started="2026-11-26T10:00:00+00:00")
    make_run("middle", started="2026-11-26T11:30:00+02:00")
    assert [Path(row.path).name for row in listing(tmp_path)] == ["new", "middle", "old"]


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b'{"status": "finished", "comm', "broken", "cannot be read"),
        (b"\xff\xfe", "broken", "cannot be read"),
        (b"[]", "broken", "not an object"),
        (b"", "broken", "cannot be read"),
        (b'{"runs": []}', "foreign", "none of alignctl's"),
    ],
)
def test_broken_and_foreign_folders_stand_in_the_list(
    make_run: MakeRun, tmp_path: Path, content: bytes, status: str, said: str
) -> None:
    make_run("good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_bytes(content)
    found = by_name(tmp_path)
    assert found["good"].status == "finished"
    assert found["bad"].status == status
    assert said in found["bad"].note


def test_a_folder_whose_run_json_was_never_written(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").touch()
    assert by_name(tmp_path)["begun"].note == "no run.json: it was stopped before it was written"


def test_values_of_other_kinds(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("odd", started=5, seconds="long", model=[], why={"a": 1}, method=None)
    (tmp_path / "odd" / "summary.json").write_text('{"after": [1], "verdict": 7}')
    (tmp_path / "odd" / "ledger.json").write_text("{")
    found = by_name(tmp_path)["odd"]
    assert (found.status, found.model, found.accuracy, found.verdict) == ("finished", "", None, "7")


def test_running_and_killed(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("killed", status="running", seconds=None, ended=None)
    with (make_run("running", status="running") / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = by_name(tmp_path)
    assert (found["killed"].status, found["running"].status) == ("killed", "running")
    assert found["killed"].seconds is None


def test_a_failed_run_says_why_and_how_long_it_lasted(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(status="failed", why="the disk is full", seconds=None)
    (found,) = listing(tmp_path)
    assert (found.note, found.seconds) == ("the disk is full", 300.0)


def test_folders_inside_runs_hidden_ones_and_links_are_not_looked_at(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("list/run")
    for inside in ("checkpoints/step-1", "model", "stand-in/model"):
        (run / inside).mkdir(parents=True)
        (run / inside / "run.json").write_text("{}")
    (tmp_path / "list" / ".trash").mkdir()
    (tmp_path / "list" / ".trash" / "run.json").write_text("{}")
    (tmp_path / "list" / "again").symlink_to(tmp_path / "list")
    assert [Path(row.path).name for row in listing(tmp_path / "list")] == ["run"]


def test_an_evaluation_has_the_last_word(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (run / "evaluations").mkdir()
    (run / "evaluations" / "held-out.json").write_text(json.dumps({"verdict": "broken"}))
    assert listing(tmp_path)[0].verdict == "broken"
