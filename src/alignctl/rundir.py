"""The run folder: names, atomic writes, JSON lines. Everything after training reads this folder and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignctl.errors import Problem, RecipeError

LOCK = ".lock"


def now() -> str:
    """This moment in UTC, as run.json writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """Write `parts`, one behind the other, to `path`, whole or not at all."""
    beside = path.with_name(path.name + ".writing")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one line a row to `path`, whole or not at all."""
    write_parts(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows in `path`; none when there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class RunDir:
    """One run's folder. `run.json` is written first and last, and its `status` is the truth."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None
        try:
            self.record: dict[str, Any] = read_json(path / "run.json")
        except (ValueError, OSError) as error:
            way_out = "give --output another folder"
            raise RecipeError(Problem(str(path / "run.json"), f"cannot be read: {error}", way_out)) from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def status(self) -> str:
        """What became of the run: run.json's word, or `killed` when it says running and nobody is."""
        said = str(self.record.get("status", "unknown"))
        return "killed" if said == "running" and not self.is_claimed() else said

    def is_claimed(self) -> bool:
        """Whether a process is writing this folder now."""
        from filelock import FileLock, Timeout

        if self._lock is not None:
            return True
        if not (self.path / LOCK).exists():
            return False
        try:
            with FileLock(self.path / LOCK, timeout=0):
                return False
        except Timeout:
            return True

    def claim(self) -> None:
        """Make the folder, and keep every other process from writing it for as long as this one lives.

        Raises:
            RecipeError: another process writes it.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            way_out = "wait until it has ended, or give --output another folder"
            raise RecipeError(Problem(str(self.path), "is being written by another run", way_out)) from error
        self._lock = lock

    @property
    def trained(self) -> bool:
        """Whether the folder holds anything that training made."""
        return any((self.path / name).exists() for name in ("metrics.jsonl", "model", "checkpoints"))

    def create(self, record: dict[str, Any], *, overwrite: bool) -> None:
        """Make the folder and its run.json.

        A run that stopped before its first step holds nothing but its error, and is replaced.

        Raises:
            RecipeError: the folder holds a run or other files, or cannot be written.
        """
        try:
            if self.path.exists():
                self._check_free(overwrite=overwrite)
            self.claim()
            self._clear()
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            self.record = {"status": "running", "started": now(), **record}
            write_json(self.path / "run.json", self.record)
        except OSError as error:
            raise RecipeError(
                Problem(str(self.path), f"cannot be written: {error.strerror or error}", "give --output another folder")
            ) from error

    def _check_free(self, *, overwrite: bool) -> None:
        ours = {"status", "command"} <= self.record.keys()
        if not ours and (not self.path.is_dir() or any(p.name != LOCK for p in self.path.iterdir())):
            raise RecipeError(Problem(str(self.path), "exists and is not a run folder", "give --output another folder"))
        if ours and self.trained and not overwrite:
            way_out = "--resume to go on with it, --output DIR to keep both, --overwrite to replace it"
            raise RecipeError(Problem(str(self.path), f"holds a run already (status: {self.status})", way_out))

    def _clear(self) -> None:
        for old in self.path.iterdir():
            if old.name == LOCK:
                continue
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()

    def update(self, **changes: Any) -> None:
        """Change run.json, atomically."""
        self.record.update(changes)
        write_json(self.path / "run.json", self.record)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, but for one that was being written when the run was killed."""
        file, rows = self.path / "metrics.jsonl", []
        for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else []:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def cut_metrics(self, step: int) -> None:
        """Take back the lines of metrics.jsonl after `step`."""
        write_jsonl(self.path / "metrics.jsonl", (row for row in self.metrics() if row["step"] <= step))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))
