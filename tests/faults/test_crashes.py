"""A killed or stopped run goes on to the same weights, whatever the clock says; checkpoints are whole or absent."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import LONG, At, Watch, metrics, same, whole_checkpoints
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from alignctl import rundir
from alignctl.errors import Interrupted
from alignctl.rundir import RunDir
from alignctl.train import fit, record

Train = Callable[..., Any]
CASES = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {}),
    "orpo": ("orpo", {}),
    "dropout": ("dpo", {"lora": {"r": 4, "lora_dropout": 0.3}, "trl": {"disable_dropout": False}}),
    "all weights": ("sft", {"lora": None, "training": {"learning_rate": 1e-4}}),
    "precomputed": ("dpo", {"dpo": {"precompute_ref_log_probs": True}}),
    "padded": ("dpo", {"training": {"packed": False}}),
    "logged rarely": ("dpo", {"training": {"logging_steps": 4}}),
    "evaluated": ("dpo", {"training": {"eval_steps": 2}, "data": {"eval_fraction": 0.25}}),
}


@pytest.mark.parametrize(("every", "step", "last"), [(3, 8, 6), (4, 9, 8)], ids=["in an epoch", "between epochs"])
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_to_the_same_weights(
    train: Train, tmp_path: Path, watch: Watch, case: str, every: int, step: int, last: int
) -> None:
    """The folder as it is at a moment is what a kill at that moment leaves."""
    method, changes = CASES[case]
    sections = changes | {"training": LONG | {"save_steps": every} | changes.get("training", {})}
    watch(At(step, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
    whole = train(method, **sections)
    assert whole.code == 0, whole.err
    ran = train(method, None, "--resume", folder="killed", **sections)
    assert ran.code == 0, ran.err
    assert ran.record["resumed_from"] == f"step-{last}"
    assert same(ran.folder, whole.folder)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(8, id="at the end of an epoch"),
        pytest.param(10, id="in an epoch"),
    ],
)
def test_a_run_killed_after_its_last_step_trains_no_further(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    def killed(job: fit.Job) -> None:
        if not (tmp_path / "killed").exists():
            fit._write_model(job, job.run / "model.writing")
            shutil.copytree(job.run.path, tmp_path / "killed")
            shutil.rmtree(job.run / "model.writing")
        save(job)

    save = fit.save
    monkeypatch.setattr(fit, "save", killed)
    sections = {"training": LONG | {"max_steps": steps}}
    whole = train(**sections)
    assert whole.code == 0, whole.err
    ran = train("dpo", None, "--resume", folder="killed", **sections)
    assert ran.code == 0, ran.err
    assert ran.record["resumed_from"] == f"step-{steps}"
    assert same(ran.folder, whole.folder)


def test_a_run_killed_when_its_model_was_saved_saves_it_again(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(job: fit.Job, *given: Any) -> None:
        if not (tmp_path / "killed").exists():
            shutil.copytree(job.run.path, tmp_path / "killed")
            (tmp_path / "killed/model/adapter_model.safetensors").write_bytes(b"")
        check(job, *given)

    check = fit.check_saved
    monkeypatch.setattr(fit, "check_saved", killed)
    sections = {"data": {"eval_fraction": 0.25}, "training": {"max_steps": 3}}
    whole = train(**sections)
    assert whole.code == 0, whole.err
    ran = train("dpo", None, "--resume", folder="killed", **sections)
    assert ran.code == 0, ran.err
    assert same(ran.folder, whole.folder)
    summaries = [(folder / "summary.json").read_bytes() for folder in (ran.folder, whole.folder)]
    assert summaries[0] == summaries[1]


def test_an_adapter_that_goes_on_from_another_is_resumed(train: Train, tmp_path: Path, watch: Watch) -> None:
    assert train("sft", folder="before").code == 0
    sections = {"training": LONG, "model": {"adapter": "before"}, "lora": None}
    watch(At(8, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
    whole = train(**sections)
    assert whole.code == 0, whole.err
    ran = train("dpo", None, "--resume", folder="killed", **sections)
    assert ran.code == 0, ran.err
    assert same(ran.folder, whole.folder)


# --- checkpoints are whole or absent


def test_checkpoints_are_whole_at_every_moment(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before everything that changes names, and before and after every file that is removed."""
    seen: list[list[str]] = []

    def looking(function: Callable[..., Any]) -> Callable[..., Any]:
        def look(*given: Any, **named: Any) -> Any:
            seen.append(whole_checkpoints(tmp_path / "run"))
            out = function(*given, **named)
            seen.append(whole_checkpoints(tmp_path / "run"))
            return out

        return look

    for module, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (torch, "save"), (os, "fsync")):
        monkeypatch.setattr(module, name, looking(module.__dict__[name]))
    assert train(training={"max_steps": 4, "save_steps": 1}).code == 0
    moments = [names for i, names in enumerate(seen) if i == 0 or names != seen[i - 1]]
    assert moments == [
        [],
        ["step-1"],
        ["step-1", "step-2"],
        ["step-1", "step-2", "step-3"],
        ["step-2", "step-3"],
        ["step-2", "step-3", "step-4"],
        ["step-3", "step-4"],
    ]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def sync(path: Path) -> None:
        done.append(path.name)
        before(path)

    before = record.sync
    monkeypatch.setattr(record, "sync", sync)
    assert train().code == 0
    (checkpoint,) = RunDir(tmp_path / "run").checkpoints()
    flushed = done[: done.index("metrics.jsonl")]
    assert sorted(flushed) == sorted(["checkpoint-4", *(path.name for path in checkpoint.rglob("*"))])
    assert done[len(flushed) : len(flushed) + 2] == ["metrics.jsonl", "checkpoints"]


def test_a_run_killed_while_a_checkpoint_is_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(trainer: Trainer, folder: str) -> None:
        if trainer.state.global_step == 6 and not (tmp_path / "killed").exists():
            (Path(folder) / "optimizer.pt").write_bytes(b"half")
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
        save(trainer, folder)

    save = Trainer._save_optimizer_and_scheduler
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    whole = train(training=LONG)
    assert whole.code == 0, whole.err
    assert (tmp_path / "killed/checkpoints/.writing/checkpoint-6/optimizer.pt").exists()
    assert whole_checkpoints(tmp_path / "killed") == ["step-3"]
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 0, ran.err
    assert ran.record["resumed_from"] == "step-3"
    assert same(ran.folder, whole.folder)
    assert sorted(path.name for path in (ran.folder / "checkpoints").iterdir()) == ["step-10", "step-9"]


def test_a_line_that_was_being_written_is_taken_back(train: Train, tmp_path: Path, watch: Watch) -> None:
    def killed() -> None:
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
        with (tmp_path / "killed/metrics.jsonl").open("ab") as file:
            file.write('{"step": 6, "text": "\u00e9'.encode()[:-1])

    watch(At(6, killed))
    whole = train(training=LONG)
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 0, ran.err
    assert "killed after step 5" in ran.out
    assert same(ran.folder, whole.folder)
    assert [row["step"] for row in metrics(ran.folder)] == list(range(1, 11))


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(train: Train, watch: Watch, number: signal.Signals) -> None:
    sections = {"training": LONG | {"logging_steps": 4}}
    whole = train(folder="whole", **sections)
    watch(At(5, lambda: signal.raise_signal(number)))
    ran = train(**sections)
    assert ran.code == 128 + number
    assert ran.record["status"] == "interrupted"
    assert ran.err.splitlines()[-1] == (
        "alignctl: run: stopped by a signal; checkpoint step-5 is saved — alignctl dpo r.yaml --output run --resume"
    )
    assert whole_checkpoints(ran.folder) == ["step-3", "step-5"]
    assert not (ran.folder / "model").exists()
    again = train("dpo", None, "--resume", **sections)
    assert again.code == 0, again.err
    assert "killed" not in again.out
    assert again.record["resumed_from"] == "step-5" and "why" not in again.record
    ours, theirs = (load_file(each.folder / "model/adapter_model.safetensors") for each in (again, whole))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert [row["step"] for row in metrics(again.folder)] == [3, 4, 5, 6, 8, 9, 10]


class Again(TrainerCallback):
    """A second signal, while the checkpoint that the first one asked for is being written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_ends_the_run_at_once(train: Train, watch: Watch) -> None:
    watch(Again())
    watch(At(5, lambda: signal.raise_signal(signal.SIGINT)))
    ran = train(training=LONG)
    assert ran.code == 128 + signal.SIGTERM
    assert ran.record["status"] == "interrupted"
    assert ran.err.splitlines()[-1] == (
        "alignctl: run: stopped by SIGTERM; the last checkpoint is step-3 — alignctl dpo r.yaml --output run --resume"
    )
    assert whole_checkpoints(ran.folder) == ["step-3"]
    assert [path.name for path in (ran.folder / "checkpoints").iterdir()] == ["step-3"]


def test_a_signal_before_the_first_step_saves_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fit.Job, "measure", measured)
    ran = train()
    assert ran.code == 130 and ran.record["status"] == "interrupted"
    assert ran.err.splitlines()[-1] == "alignctl: run: stopped by SIGINT"


def test_a_signal_that_a_library_made_an_error_of_ends_the_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise RuntimeError("Failed to import a module") from None

    monkeypatch.setattr(fit.Job, "measure", measured)
    ran = train()
    assert ran.code == 128 + signal.SIGTERM and ran.record["status"] == "interrupted"


# --- clocks and names


def test_a_clock_that_jumps_back_does_no_harm(
    train: Train, monkeypatch: pytest.MonkeyPatch, watch: Watch, tmp_path: Path
) -> None:
    class Backwards(datetime.datetime):
        seconds = 2e9

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            cls.seconds -= 3600
            return cls.fromtimestamp(cls.seconds, tz)

    whole = train(folder="whole", training=LONG)
    monkeypatch.setattr(time, "time", lambda: Backwards.now().timestamp())
    monkeypatch.setattr(rundir, "datetime", Backwards)
    monkeypatch.setattr(socket, "gethostname", lambda: f"host-{Backwards.now().timestamp():.0f}")
    watch(At(8, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
    ran = train(training=LONG)
    assert ran.code == 0, ran.err
    assert ran.record["ended"] < ran.record["started"]
    again = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert again.code == 0, again.err
    assert same(again.folder, whole.folder) and same(ran.folder, whole.folder)
    for folder in (ran.folder, again.folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(row["eta_seconds"] >= 0 and row["pairs_per_second"] > 0 for row in rows)
        assert rows[-1]["eta_seconds"] == 0


# --- kills


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_the_uninterrupted_one() -> None:
    command = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "kills.py"), "--kills", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("| 6 kills, seed 0 | |\n")
    fell = [int(line.split("|")[2]) for line in done.stdout.splitlines()[2:6]]
    assert sum(fell) == 6
    assert "runs ended with the weights and metrics of the uninterrupted one, bit for bit" in done.stdout
