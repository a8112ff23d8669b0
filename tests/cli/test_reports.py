"""`report`, `compare` and `runs` as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run's folder in the current folder: run.json with these values, scores of four pairs, one answer."""
    monkeypatch.chdir(tmp_path)

    def build(name: str, gap: float = 0.5, **record: Any) -> Path:
        folder = Path("runs") / name
        (folder / "logs").mkdir(parents=True)
        evaluated = {"rows": 4, "fingerprint": record.pop("held_out", "a" * 64)}
        values = {"status": "finished", "command": "alignctl dpo x", "method": "dpo", "data": {"eval": evaluated}}
        (folder / "run.json").write_text(json.dumps(values | record))
        chosen, rejected = [-1.0] * 4, [-1.0 - gap] * 3 + [-0.9]
        scores = {"chosen_logps_per_token": chosen, "rejected_logps_per_token": rejected}
        (folder / "logs" / "after.json").write_text(json.dumps({"scores": scores}))
        answer = {"prompt": "Why\x1b[31m?", "after": f"Because {gap}.", "after_tokens": 3, "after_stopped": True}
        (folder / "samples.jsonl").write_text(json.dumps(answer) + "\n")
        return folder

    return build


def test_report_says_where_it_is(run_folder: Callable[..., Path], here: Here) -> None:
    folder = run_folder("mine")
    done = here("report", str(folder))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}/report.html\n", "")
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in folder.iterdir()} == {"run.json", "logs", "samples.jsonl", "report.html"}


def test_report_says_nothing_of_a_home_that_cannot_be_written(
    run_folder: Callable[..., Path], alignctl: Here, tmp_path: Path
) -> None:
    folder = run_folder("mine")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    done = alignctl("report", str(folder), MPLCONFIGDIR=str(tmp_path / "runs" / "mine" / "run.json"))
    assert (done.returncode, done.stderr) == (0, "")


def test_report_of_what_is_no_run(tmp_path: Path, here: Here) -> None:
    done = here("report", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"alignctl: {tmp_path}: is no run — give the folder that --output named\n"
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written(run_folder: Callable[..., Path], here: Here) -> None:
    folder = run_folder("mine")
    (folder / "report.html").mkdir()
    done = here("report", str(folder))
    assert done.returncode == 2
    assert done.stderr.startswith(f"alignctl: {folder}/report.html: cannot be written")
    assert not list(folder.glob("*.writing"))


def test_compare_prints_differences_and_answers(run_folder: Callable[..., Path], here: Here, tmp_path: Path) -> None:
    first, second = run_folder("first", 0.5), run_folder("second", 1.0)
    done = here("compare", str(first), str(second), "--html", "both.html")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert any(line.startswith("length-normalised accuracy (n = 4) first 75.0%") for line in lines)
    assert any(line.startswith("second 0.725") and "+0.375" in line for line in lines)
    assert "Why\N{REPLACEMENT CHARACTER}[31m?" in lines
    assert "second Because 1.0." in lines
    assert lines[-1] == "both.html"
    assert (tmp_path / "both.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_compare_as_json(run_folder: Callable[..., Path], here: Here) -> None:
    done = here("compare", str(run_folder("first", 0.5)), str(run_folder("second", 1.0)), "--json")
    found = json.loads(done.stdout)
    assert found["names"] == ["first", "second"]
    row = next(row for row in found["sets"][0]["rows"] if row["name"] == "margin_per_token")
    assert row["differences"][0]["value"] == pytest.approx(0.375)
    assert row["verdicts"] == ["better"]
    assert "curves" not in found


def test_compare_refuses_other_rows(run_folder: Callable[..., Path], here: Here) -> None:
    done = here("compare", str(run_folder("first")), str(run_folder("second", held_out="b" * 64)))
    assert (done.returncode, done.stdout) == (2, "")
    assert "first on 4 rows (fingerprint aaaaaaaaaaaa); second on 4 rows (fingerprint bbbbbbbbbbbb)" in done.stderr
    assert "alignctl eval runs/first --data FILE" in done.stderr


def test_compare_of_one_run(run_folder: Callable[..., Path], here: Here) -> None:
    done = here("compare", str(run_folder("first")))
    assert (done.returncode, done.stdout) == (2, "")
    assert "name two runs or more" in done.stderr


def test_runs_lists_them(run_folder: Callable[..., Path], here: Here) -> None:
    run_folder("good", started="2026-11-25T17:00:00+00:00")
    run_folder("bad\x1b[2J", status="failed", why="gate.finite:\nnot finite")
    (Path("runs") / "half").mkdir()
    (Path("runs") / "half" / "run.json").write_text('{"status": ')
    done = here("runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert any(line.startswith("good finished dpo") for line in lines)
    assert any(line.startswith("half broken") for line in lines)
    assert "bad\N{REPLACEMENT CHARACTER}[2J: gate.finite: not finite" in lines


def test_runs_as_json(run_folder: Callable[..., Path], here: Here) -> None:
    run_folder("good")
    shutil.copytree("runs/good", "runs/deep/copy")
    found = json.loads(here("runs", "runs", "--json").stdout)
    assert {row["path"] for row in found} == {"runs/good", "runs/deep/copy"}
    assert {row["status"] for row in found} == {"finished"}


def test_no_runs_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("runs", ".")
    assert (done.returncode, done.stdout) == (0, "no runs in .\n")
    done = here("runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("alignctl: runs: is no folder")
