"""Runs that are killed, stopped or run out of disk: what is left is whole, and going on gives the same weights."""

from __future__ import annotations

import datetime
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from alignctl import rundir
from alignctl.errors import Interrupted
from alignctl.rundir import RunDir
from alignctl.train import fit, machine, record

Train = Callable[..., Any]
Plant = Callable[[TrainerCallback], None]
# What a clock or the machine decides.
MEASURED = ("tokens_per_second", "pairs_per_second", "peak_memory_gib", "peak_host_gib", "eta_seconds")
MEASURED_AT_EVALUATION = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
# Two epochs and a half of 16 rows.
LONG = {"max_steps": 10, "save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Give every trainer that is built a callback, before all others."""

    def with_callback(callback: TrainerCallback) -> None:
        def build(*given: Any, built: Callable[..., Trainer]) -> Trainer:
            trainer = built(*given)
            trainer.callback_handler.callbacks.insert(1, callback)
            return trainer

        for method, built in fit.BUILD.items():
            monkeypatch.setitem(fit.BUILD, method, partial(build, built=built))

    return with_callback


class At(TrainerCallback):
    """Calls `what` once, after an update and before its line of metrics is written."""

    def __init__(self, step: int, what: Callable[[], object]) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = 0
            self.what()


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = (*MEASURED, *MEASURED_AT_EVALUATION)
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def same(ours: Path, theirs: Path) -> bool:
    """Whether two runs end with the same weights and have the same metrics, bit for bit."""
    names = [path.name for path in (theirs / "model").glob("*.safetensors")]
    assert names
    for name in names:
        a, b = load_file(ours / "model" / name), load_file(theirs / "model" / name)
        if a.keys() != b.keys() or not all(a[key].equal(b[key]) for key in a):
            return False
    return metrics(ours) == metrics(theirs)


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
    train: Train, tmp_path: Path, plant: Plant, case: str, every: int, step: int, last: int
) -> None:
    """The folder as it is at a moment is what a kill at that moment leaves."""
    method, changes = CASES[case]
    sections = changes | {"training": LONG | {"save_steps": every} | changes.get("training", {})}
    plant(At(step, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
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


def test_an_adapter_that_goes_on_from_another_is_resumed(train: Train, tmp_path: Path, plant: Plant) -> None:
    assert train("sft", folder="before").code == 0
    sections = {"training": LONG, "model": {"adapter": "before"}, "lora": None}
    plant(At(8, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
    whole = train(**sections)
    assert whole.code == 0, whole.err
    ran = train("dpo", None, "--resume", folder="killed", **sections)
    assert ran.code == 0, ran.err
    assert same(ran.folder, whole.folder)


# --- checkpoints are whole or absent


def whole_checkpoints(run: Path) -> list[str]:
    """The names of the checkpoints that count; each holds what its note says."""
    found = RunDir(run).checkpoints()
    for path in found:
        assert json.loads((path / "alignctl.json").read_text())["files"] == rundir.digests(path), path
        assert len(rundir.digests(path)) >= 6, path
    return [path.name for path in found]


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


def test_a_line_that_was_being_written_is_taken_back(train: Train, tmp_path: Path, plant: Plant) -> None:
    def killed() -> None:
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
        with (tmp_path / "killed/metrics.jsonl").open("ab") as file:
            file.write('{"step": 6, "text": "\u00e9'.encode()[:-1])

    plant(At(6, killed))
    whole = train(training=LONG)
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 0, ran.err
    assert "killed after step 5" in ran.out
    assert same(ran.folder, whole.folder)
    assert [row["step"] for row in metrics(ran.folder)] == list(range(1, 11))


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(train: Train, plant: Plant, number: signal.Signals) -> None:
    sections = {"training": LONG | {"logging_steps": 4}}
    whole = train(folder="whole", **sections)
    plant(At(5, lambda: signal.raise_signal(number)))
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


def test_a_second_signal_ends_the_run_at_once(train: Train, plant: Plant) -> None:
    plant(Again())
    plant(At(5, lambda: signal.raise_signal(signal.SIGINT)))
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


# --- what `--resume` refuses


@pytest.fixture
def killed(train: Train, tmp_path: Path, plant: Plant) -> Path:
    """The folder of a run that was killed in step 8 of 10, with the checkpoints of steps 3 and 6."""
    plant(At(8, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
    assert train(training=LONG).code == 0
    return tmp_path / "killed"


def test_another_recipe_is_refused(train: Train, killed: Path) -> None:
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    ran = train("dpo", None, "--resume", folder="killed", training=LONG, dpo={"beta": 0.2})
    assert ran.code == 2
    assert "was made by another recipe than this one is now — resume with killed/recipe.yaml" in ran.err
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before | {killed / ".lock": b""}


def test_a_gate_may_be_switched_off_on_the_way(train: Train, killed: Path) -> None:
    ran = train("dpo", None, "--resume", folder="killed", training=LONG, gates={"moved": False})
    assert ran.code == 0, ran.err
    assert ran.verdict("moved") == "off"


def test_other_rows_are_refused(train: Train, killed: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows[3]["chosen"] = "something else"
    ran = train("dpo", rows, "--resume", folder="killed", training=LONG)
    assert ran.code == 3 and ran.verdict("resume") == "stopped"
    assert "gate.resume: the rows of data.train are not those that the run began with" in ran.err
    again = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert again.code == 0, again.err
    assert same(again.folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("adapter_model.safetensors", "cut"),
        ("optimizer.pt", "cut"),
        ("optimizer.pt", "flipped"),
        ("optimizer.pt", "removed"),
        ("rng_state.pth", "removed"),
        ("trainer_state.json", "cut"),
        ("alignctl.json", "cut"),
        ("alignctl.json", "removed"),
    ],
)
def test_a_damaged_checkpoint_is_refused(train: Train, killed: Path, name: str, how: str) -> None:
    file = killed / "checkpoints/step-6" / name
    data = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 5 and ran.verdict("resume") == "stopped"
    (line,) = [line for line in ran.err.splitlines() if line.startswith("alignctl:")]
    assert line.startswith("alignctl: gate.resume: step-6 is not as it was written: ")
    assert name == "alignctl.json" or line.partition("written: ")[2].startswith(f"{name} — ")
    assert f"remove {killed.name}/checkpoints/step-6 to go on from step-3, or train anew" in line


def test_one_goes_on_from_the_checkpoint_before_a_damaged_one(train: Train, killed: Path, tmp_path: Path) -> None:
    shutil.rmtree(killed / "checkpoints/step-6")
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 0, ran.err
    assert ran.record["resumed_from"] == "step-3"
    assert same(ran.folder, tmp_path / "run")


def test_another_adapter_in_the_checkpoint_is_refused(train: Train, killed: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "run/model/adapter_model.safetensors", killed / "checkpoints/step-6")
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 5 and "step-6 is not as it was written: adapter_model.safetensors" in ran.err
    off = train("dpo", None, "--resume", folder="killed", training=LONG, gates={"resume": False})
    assert off.code == 0, off.err


class Forgets(TrainerCallback):
    """Loads something else than the checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in kwargs["model"].parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-3)


def test_weights_that_are_not_those_of_the_checkpoint_are_refused(train: Train, killed: Path, plant: Plant) -> None:
    plant(Forgets())
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 5 and ran.verdict("resume") == "stopped"
    assert "gate.resume: what was loaded is not the checkpoint of step 6" in ran.err
    off = train("dpo", None, "--resume", folder="killed", training=LONG, gates={"resume": False})
    assert off.code == 0, off.err


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(train: Train, tmp_path: Path, plant: Plant) -> None:
    plant(At(3, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
    assert train(training=LONG).code == 0
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 2
    assert "killed: has no checkpoint to go on from — start it with --overwrite" in ran.err
    ran = train("dpo", None, folder="killed", training=LONG)
    assert ran.code == 2
    assert "killed: holds a run already (status: killed) — --output DIR to keep both, --overwrite to" in ran.err
    assert train("dpo", None, "--overwrite", folder="killed", training=LONG).code == 0
    assert same(tmp_path / "killed", tmp_path / "run")


def test_a_smoke_run_is_not_resumed(train: Train, killed: Path) -> None:
    ran = train("dpo", None, "--resume", "--smoke", folder="killed", training=LONG)
    assert ran.code == 2 and "--resume: and --smoke contradict each other" in ran.err


# --- one process writes a folder


def test_a_second_run_is_refused_the_folder(train: Train, plant: Plant) -> None:
    found: list[subprocess.CompletedProcess[str]] = []

    def others() -> None:
        for options in ([], ["--overwrite"], ["--resume"]):
            command = [sys.executable, "-m", "alignctl", "dpo", "r.yaml", "--output", "run", *options]
            found.append(subprocess.run(command, capture_output=True, text=True, check=False))
        command = [sys.executable, "-m", "alignctl", "verify", "run"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=False))

    plant(At(4, others))
    ran = train(training=LONG)
    assert ran.code == 0, ran.err
    for done in found[:3]:
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "alignctl: run: is being written by another run — wait until it has ended, or give --output another folder"
        ]
    assert found[3].returncode == 2 and "(status: running)" in found[3].stderr


def test_a_run_that_looks_at_its_model_is_not_verified_by_another(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[subprocess.CompletedProcess[str]] = []

    def others(*_: Any) -> None:
        command = [sys.executable, "-m", "alignctl", "verify", "run"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=False))

    monkeypatch.setattr(fit, "check_saved", others)
    assert train().code == 0
    assert found[0].returncode == 2 and "run: is being written by another run" in found[0].stderr


# --- a full disk


@pytest.fixture
def full() -> Iterator[Callable[[], None]]:
    """From its call on, no file can grow beyond 20 kB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint(
    train: Train, plant: Plant, full: Callable[[], None], tmp_path: Path
) -> None:
    whole = train(folder="whole", training=LONG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    plant(At(5, full))
    ran = train(training=LONG)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ran.code == 4, ran.err
    said = "the disk is full; the last whole checkpoint is step-3 — free space, then run again with --resume"
    assert ran.err.splitlines()[-1] == f"alignctl: run: {said}"
    assert ran.record["status"] == "failed"
    assert [path.name for path in (ran.folder / "checkpoints").iterdir()] == whole_checkpoints(ran.folder) == ["step-3"]
    again = train("dpo", None, "--resume", training=LONG)
    assert again.code == 0, again.err
    assert same(again.folder, whole.folder)


def test_a_full_disk_while_the_model_is_saved(
    train: Train, full: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled(job: fit.Job) -> None:
        full()
        save(job)

    save, before = fit.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = train(folder="whole")
    monkeypatch.setattr(fit, "save", filled)
    ran = train()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ran.code == 4 and "the last whole checkpoint is step-4" in ran.err
    assert not list(ran.folder.glob("model*"))
    monkeypatch.setattr(fit, "save", save)
    again = train("dpo", None, "--resume")
    assert again.code == 0, again.err
    assert same(again.folder, whole.folder)


def test_a_full_disk_before_the_first_checkpoint_names_a_way_that_works(
    train: Train, plant: Plant, full: Callable[[], None]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    plant(At(1, full))
    ran = train(training=LONG)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ran.code == 4 and "the disk is full; no checkpoint had been written" in ran.err
    assert RunDir(ran.folder).checkpoints() == []
    assert ran.err.splitlines()[-1].endswith("free space, then run again with --overwrite")


def test_a_disk_that_is_still_full_is_no_bug(train: Train, killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 4
    assert ran.err.splitlines()[-1] == "alignctl: killed: the disk is full — free space, then run again"
    again = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert again.code == 0, again.err
    assert same(again.folder, killed.parent / "run")


# --- clocks and names


def test_a_clock_that_jumps_back_does_no_harm(
    train: Train, monkeypatch: pytest.MonkeyPatch, plant: Plant, tmp_path: Path
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
    plant(At(8, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
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


# --- a killed run says so


def test_a_killed_run_is_said_to_be_killed(train: Train, killed: Path) -> None:
    assert RunDir(killed).record["status"] == "running" and RunDir(killed).status == "killed"
    ran = train("dpo", None, folder="killed", training=LONG)
    assert ran.code == 2
    assert "killed: holds a run already (status: killed) — --resume to go on with it, --output DIR" in ran.err
    last = json.loads((killed / "metrics.jsonl").read_text().splitlines()[-1])
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    peak, there = last["peak_host_gib"], machine.host_memory_gib()
    assert ran.out.splitlines()[0] == (
        f"note: the run was killed after step 7, at a peak of {peak:.1f} of {there:.1f} GiB of memory"
    )


def test_a_run_killed_near_the_end_of_memory_names_the_keys_that_save_some(
    train: Train, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "host_memory_gib", lambda: machine.peak_host_gib() * 1.1)
    note = " ".join(train("dpo", None, "--resume", folder="killed", training=LONG).out.split())
    assert "a system that runs out of memory does so — in order of least harm: " in note
    keys = ["training.gradient_checkpointing=true", "per_device_train_batch_size", "quantization", "data.max_length"]
    assert sorted(keys, key=note.index) == keys


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
