"""The run folder: names, atomic writes, JSON lines. Everything after training reads this folder and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignctl.errors import Problem, RecipeError


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
        try:
            self.record: dict[str, Any] = read_json(path / "run.json")
        except (ValueError, OSError) as error:
            way_out = "give --output another folder"
            raise RecipeError(Problem(str(path / "run.json"), f"cannot be read: {error}", way_out)) from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

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
                self._clear(overwrite=overwrite)
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            self.record = {"status": "running", "started": now(), **record}
            write_json(self.path / "run.json", self.record)
        except OSError as error:
            raise RecipeError(
                Problem(str(self.path), f"cannot be written: {error.strerror or error}", "give --output another folder")
            ) from error

    def _clear(self, *, overwrite: bool) -> None:
        ours = {"status", "command"} <= self.record.keys()
        if not ours and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RecipeError(Problem(str(self.path), "exists and is not a run folder", "give --output another folder"))
        if ours and self.trained and not overwrite:
            status = self.record.get("status", "unknown")
            raise RecipeError(
                Problem(
                    str(self.path),
                    f"holds a run already (status: {status})",
                    "--resume to go on with it, --output DIR to keep both, --overwrite to replace it",
                )
            )
        if ours:
            shutil.rmtree(self.path)

    def update(self, **changes: Any) -> None:
        """Change run.json, atomically."""
        self.record.update(changes)
        write_json(self.path / "run.json", self.record)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))
