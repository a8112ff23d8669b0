"""All runs below a folder, one row each, whatever state they are in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from alignctl import rundir
from alignctl.errors import RecipeError
from alignctl.report.measures import HELD_OUT
from alignctl.report.values import dig, number, rows, table, text
from alignctl.rundir import RunDir

# Folders of a run, which hold no runs.
_INSIDE = ("checkpoints", "model", "logs", "stand-in", "evaluations")


@dataclass(frozen=True)
class Row:
    """One folder with a run.json; `status` is `broken` or `foreign` where it is no run's, and `note` says why."""

    path: str
    status: str
    method: str = ""
    model: str = ""
    data: str = ""
    verdict: str = ""
    accuracy: float | None = None
    margin: float | None = None
    nll: float | None = None
    seconds: float | None = None
    started: str = ""
    note: str = ""


def listing(folder: Path) -> list[Row]:
    """The runs in `folder` and below it, the newest first."""
    found = [(_when(path), _row(path)) for path in _folders(folder)]
    return [row for _, row in sorted(found, key=lambda each: (-each[0], each[1].path))]


def _folders(folder: Path) -> Iterator[Path]:
    """Folders with a run.json, or where a run has begun to make one; links are not followed."""
    for here, below, names in os.walk(folder):
        if "run.json" in names or rundir.LOCK in names:
            below[:] = [name for name in below if name not in _INSIDE]
            yield Path(here)
        below[:] = sorted(name for name in below if not name.startswith("."))


def _when(path: Path) -> float:
    """When the run was started; when its folder was changed where it does not say."""
    try:
        return datetime.fromisoformat(text(dig(_read(path / "run.json"), "started"))).timestamp()
    except (ValueError, OSError, OverflowError):
        return path.stat().st_mtime if path.exists() else 0.0


def _read(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where there is none that can be read."""
    try:
        return rundir.read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}


def _row(path: Path) -> Row:
    if not (path / "run.json").exists():
        return Row(str(path), "broken", note="no run.json: it was stopped before it was written")
    try:
        run = RunDir(path)
        status = run.status
    except (RecipeError, RecursionError, OSError) as error:
        said = error.problems[0].what if isinstance(error, RecipeError) else str(error)
        return Row(str(path), "broken", note=f"run.json {said}")
    if not {"status", "command"} <= run.record.keys():
        return Row(str(path), "foreign", note="its run.json is none of alignctl's")
    record, summary = run.record, _read(path / "summary.json")
    evaluation = _read(path / "evaluations" / f"{HELD_OUT}.json")
    return Row(
        path=str(path),
        status=status,
        method=text(record.get("method")),
        model=text(dig(record, "model", "name_or_path")),
        data=_data(path),
        verdict=text(evaluation.get("verdict") or summary.get("verdict")),
        accuracy=number(dig(summary, "after", "reward_accuracy")),
        margin=number(dig(summary, "after", "margin")),
        nll=number(dig(summary, "after", "nll")),
        seconds=_seconds(record),
        started=text(record.get("started")),
        note=text(record.get("why")),
    )


def _data(path: Path) -> str:
    """The names of the training sources."""
    sources = rows(dig(_read(path / "ledger.json"), "train", "sources"))
    named = [text(row.get("path")) for row in sources]
    return ", ".join(PurePath(each).name if Path(each).is_absolute() else each for each in named if each)


def _seconds(record: dict[str, Any]) -> float | None:
    """How long it took, or lasted."""
    seconds = number(table(record).get("seconds"))
    if seconds is not None:
        return seconds
    try:
        began, ended = (datetime.fromisoformat(text(record.get(key))) for key in ("started", "ended"))
        return (ended - began).total_seconds()
    except (ValueError, TypeError):
        return None
