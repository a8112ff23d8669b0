"""The run folder: names, atomic writes, JSON lines. Everything after training reads this folder and nothing else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakSet

from alignctl import secrets
from alignctl.errors import MachineError, Problem, RecipeError

LOCK = ".lock"
# What a name ends in while its content is being written.
WRITING = ".writing"
# Where a smoke run has its stand-ins for model and adapter.
STAND_IN = "stand-in"
# What a checkpoint says of itself, for a run that goes on from it.
NOTE = "alignctl.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Locks that this process holds. A forked child shares them, and would keep them after its parent was killed.
_held: WeakSet[BinaryIO] = WeakSet()


def _let_go() -> None:
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_let_go)


def now() -> str:
    """This moment in UTC, as run.json writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """Write `parts`, one behind the other, to `path`, whole or not at all."""
    beside = path.with_name(path.name + WRITING)
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
    write_text(path, json.dumps(secrets.hidden(value), indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one line a row to `path`, whole or not at all."""
    write_parts(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line to `path`, whole or not at all, and wait until it is on the disk.

    Raises:
        RecipeError: the file cannot be written.
        MachineError: the disk is full.
    """
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and _last_byte(file) != b"\n":
                line = b"\n" + line
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
    except OSError as error:
        if error.errno in _FULL:
            raise MachineError(Problem(str(path), "the disk is full", "free space, then save again")) from error
        what = f"cannot be written: {error.strerror or error}"
        raise RecipeError(Problem(str(path), what, "name another file")) from error


def _last_byte(file: FileIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


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


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The rows in `path` but for lines that are none; none when there is no such file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file in `checkpoint` but its note, by name."""
    out = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != NOTE:
            with path.open("rb") as file:
                out[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def _locked(file: BinaryIO, kind: int, patience: int = 0) -> bool:
    """Whether `file` could be locked, in 20 ms times `patience` at most."""
    for left in range(patience, -1, -1):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02 if left else 0)
        else:
            return True
    return False


class RunDir:
    """One run's folder. `run.json` is written first and last, and its `status` is the truth."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None
        self.record = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self.path / "run.json")
        except (ValueError, OSError) as error:
            way_out = "give --output another folder"
            raise RecipeError(Problem(str(self.path / "run.json"), f"cannot be read: {error}", way_out)) from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def status(self) -> str:
        """What became of the run: run.json's word, or `killed` when it says running and nobody is."""
        said = str(self.record.get("status", "unknown"))
        return "killed" if said == "running" and not self.is_claimed() else said

    def is_claimed(self) -> bool:
        """Whether a process is writing this folder now."""
        if self._lock is not None:
            return True
        try:
            lock = (self.path / LOCK).open("rb")
        except FileNotFoundError:
            return False
        with lock:
            return not _locked(lock, fcntl.LOCK_SH)

    def claim(self) -> None:
        """Make the folder, and keep every other process from writing it until `release`, or until this process ends.

        The record is read anew: until now another process may have written it.

        Raises:
            RecipeError: another process writes it, or it cannot be written.
        """
        with self._written():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.fdopen(os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "ab")
            if not _locked(lock, fcntl.LOCK_EX, patience=5):  # one that only looks is gone at once
                lock.close()
                way_out = "wait until it has ended, or give --output another folder"
                raise RecipeError(Problem(str(self.path), "is being written by another run", way_out))
        _held.add(lock)
        self._lock = lock
        self.record = self._read()
        if self.record.get("status") == "running":
            self.record["status"] = "killed"

    def release(self) -> None:
        """Let others write the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """What cannot be written inside is a matter of the folder or of the disk."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise MachineError(Problem(str(self.path), "the disk is full", "free space, then run again")) from error
            raise RecipeError(
                Problem(str(self.path), f"cannot be written: {error.strerror or error}", "give --output another folder")
            ) from error

    @property
    def trained(self) -> bool:
        """Whether the folder holds anything that training made."""
        return any((self.path / name).exists() for name in ("metrics.jsonl", "model", "checkpoints"))

    def create(self, record: dict[str, Any], *, overwrite: bool) -> None:
        """Make the folder and its run.json.

        A run that stopped before its first step holds nothing but its error, and is replaced.

        Raises:
            RecipeError: the folder holds a run or other files, is being written, or cannot be written.
        """
        with self._written():
            if self.path.exists():
                self._check_ours()
        self.claim()
        try:
            self._check_free(overwrite=overwrite)
            with self._written():
                self._clear({"status": "running", "started": now(), **record})
                (self.path / "logs").mkdir()
        except BaseException:
            self.release()
            raise

    def _check_ours(self) -> None:
        self.record = self._read()
        ours = {"status", "command"} <= self.record.keys()
        if not ours and (not self.path.is_dir() or any(p.name != LOCK for p in self.path.iterdir())):
            raise RecipeError(Problem(str(self.path), "exists and is not a run folder", "give --output another folder"))

    def _check_free(self, *, overwrite: bool) -> None:
        if self.record and self.trained and not overwrite:
            way_out = "--output DIR to keep both, --overwrite to replace it"
            if self.checkpoints() and self.status != "finished":
                way_out = f"--resume to go on with it, {way_out}"
            raise RecipeError(Problem(str(self.path), f"holds a run already (status: {self.status})", way_out))

    def _clear(self, record: dict[str, Any]) -> None:
        """Put `record` in the place of everything else.

        The old checkpoints are gone before the new record stands, and all at once, so that no run goes on from them.
        """
        self._sweep()
        if (self.path / "checkpoints").exists():
            (self.path / "checkpoints").rename(self.path / f"checkpoints{WRITING}")
        self.record = record
        write_json(self.path / "run.json", record)
        for old in self.path.iterdir():
            if old.name not in (LOCK, "run.json"):
                remove(old)

    def _sweep(self) -> None:
        """Remove what was being written when the process before this one was killed."""
        for path in (*self.path.glob(f"*{WRITING}"), *self.path.glob(f"*/*{WRITING}")):
            remove(path)

    def go_on(self, checkpoint: Path) -> None:
        """Take back what came after `checkpoint`, so that training can go on from it.

        Raises:
            RecipeError: the folder cannot be written.
        """
        with self._written():
            for name in ("why", "ended", "seconds"):
                self.record.pop(name, None)
            self.update(status="running", resumed_from=checkpoint.name)
            self.cut_metrics(int(checkpoint.name.removeprefix("step-")))
            self._sweep()
            for name in ("logs/after.json", "report.html"):
                remove(self.path / name)
            if (self.path / "model").exists():  # of a run that ended before it was found to be the trained one
                remove((self.path / "model").rename(self.path / f"model{WRITING}"))

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
        return whole_lines(self.path / "metrics.jsonl")

    def cut_metrics(self, step: int) -> None:
        """Take back the lines of metrics.jsonl after `step`."""
        write_jsonl(self.path / "metrics.jsonl", (row for row in self.metrics() if row["step"] <= step))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))
