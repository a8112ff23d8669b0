"""Callbacks that write the run folder while training goes on: metrics and checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl import secrets
from alignctl.rundir import NOTE as NOTE
from alignctl.rundir import RunDir, digests, read_json, remove, write_json
from alignctl.train.arguments import WRITING
from alignctl.train.gates import Gates
from alignctl.train.machine import Machine, peak_host_gib
from alignctl.train.model import trained_fingerprint

_RENAMED = {"learning_rate": "lr"}
_LEFT_OUT = (
    "total_flos",
    "num_input_tokens_seen",
    "num_tokens",
    "epoch",
    "train_",
    "eval_num_tokens",
    "eval_model_prep",
)


class Metrics(TrainerCallback):
    """One line of metrics.jsonl a log step, and the same to `show` and `track`."""

    def __init__(
        self,
        run: RunDir,
        machine: Machine,
        rows: int,
        show: Callable[[dict[str, Any], int], None],
        track: Callable[[dict[str, Any]], None],
    ) -> None:
        self.run, self.machine, self.rows, self.show, self.track = run, machine, rows, show, track
        self._last = (0.0, 0.0, 0.0)
        self._start = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (time.monotonic(), state.epoch or 0.0, float(state.num_input_tokens_seen))
        self._start = (time.monotonic(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A run that goes on from a checkpoint takes its averages from there, and so does one that was not stopped."""
        control.should_log |= control.should_save

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "train_loss" in logs:  # the Trainer's own summary, after the last step
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        row |= {_RENAMED.get(k, k): v for k, v in logs.items() if not k.startswith(_LEFT_OUT)}
        if "loss" in logs:
            row |= self._speed(state)
        self.run.append_metrics(row)
        self.show(row, state.max_steps)
        self.track(row)

    def _speed(self, state: TrainerState) -> dict[str, float]:
        now, epoch, tokens = time.monotonic(), state.epoch or 0.0, float(state.num_input_tokens_seen)
        then, epoch_then, tokens_then = self._last
        self._last = (now, epoch, tokens)
        seconds = max(now - then, 1e-9)
        began, first = self._start
        done = max(state.global_step - first, 1)
        return {
            "tokens_per_second": round((tokens - tokens_then) / seconds, 1),
            "pairs_per_second": round((epoch - epoch_then) * self.rows / seconds, 3),
            "peak_memory_gib": round(self.machine.peak_memory_gib(), 3),
            "peak_host_gib": round(peak_host_gib(), 3),
            "eta_seconds": round((now - began) / done * (state.max_steps - state.global_step), 1),
        }


class Checkpoints(TrainerCallback):
    """Moves each checkpoint into place when it is complete, and only then removes the oldest."""

    def __init__(self, run: RunDir, keep: int) -> None:
        self.run, self.keep = run, keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        secrets.sweep(written)
        note = {"step": state.global_step, "trained": trained_fingerprint(kwargs["model"]), "files": digests(written)}
        write_json(written / NOTE, note)
        flush(written)
        sync(self.run / "metrics.jsonl")
        written.rename(self.run / "checkpoints" / f"step-{state.global_step}")
        sync(self.run / "checkpoints")
        for old in self.run.checkpoints()[: -self.keep]:
            remove(old.rename(written.with_name(old.name)))  # gone at once: half of it would count as whole

    def tidy(self) -> None:
        """Remove what was being written when the run stopped."""
        shutil.rmtree(self.run / "checkpoints" / WRITING, ignore_errors=True)


def check(run: RunDir, checkpoint: Path, gates: Gates) -> None:
    """The gate `resume`, before anything is loaded: the checkpoint's files are those that were written.

    Raises:
        DivergedError: they are not.
    """
    expected, found = _noted(checkpoint), digests(checkpoint)
    changed = [name for name in expected if found.get(name) != expected[name]]
    if changed or not expected:
        said = f"{checkpoint.name} is not as it was written: {', '.join(changed) or NOTE}"
        before = [each for each in run.checkpoints() if each != checkpoint]
        anew = "train anew with --overwrite or --output DIR"
        way_out = f"remove {checkpoint} to go on from {before[-1].name}, or {anew}" if before else anew
        gates.stopped("resume", said, way_out)


def _noted(checkpoint: Path) -> dict[str, str]:
    try:
        return dict(read_json(checkpoint / NOTE).get("files", {}))
    except ValueError:
        return {}


def flush(folder: Path) -> None:
    """Wait until everything under `folder`, and its name, is on the disk."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
