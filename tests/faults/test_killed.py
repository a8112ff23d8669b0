"""What the folder of a killed run says, what `--resume` refuses, and who may write a folder; a full disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import LONG, At, Watch, same, whole_checkpoints
from transformers import TrainerCallback

from alignctl.rundir import RunDir
from alignctl.train import fit, machine

Train = Callable[..., Any]
# --- what `--resume` refuses


@pytest.fixture
def killed(train: Train, tmp_path: Path, watch: Watch) -> Path:
    """The folder of a run that was killed in step 8 of 10, with the checkpoints of steps 3 and 6."""
    watch(At(8, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
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


def test_weights_that_are_not_those_of_the_checkpoint_are_refused(train: Train, killed: Path, watch: Watch) -> None:
    watch(Forgets())
    ran = train("dpo", None, "--resume", folder="killed", training=LONG)
    assert ran.code == 5 and ran.verdict("resume") == "stopped"
    assert "gate.resume: what was loaded is not the checkpoint of step 6" in ran.err
    off = train("dpo", None, "--resume", folder="killed", training=LONG, gates={"resume": False})
    assert off.code == 0, off.err


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(train: Train, tmp_path: Path, watch: Watch) -> None:
    watch(At(3, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")))
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


def test_a_second_run_is_refused_the_folder(train: Train, watch: Watch) -> None:
    found: list[subprocess.CompletedProcess[str]] = []

    def others() -> None:
        for options in ([], ["--overwrite"], ["--resume"]):
            command = [sys.executable, "-m", "alignctl", "dpo", "r.yaml", "--output", "run", *options]
            found.append(subprocess.run(command, capture_output=True, text=True, check=False))
        command = [sys.executable, "-m", "alignctl", "verify", "run"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=False))

    watch(At(4, others))
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
    train: Train, watch: Watch, full: Callable[[], None], tmp_path: Path
) -> None:
    whole = train(folder="whole", training=LONG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    watch(At(5, full))
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
    train: Train, watch: Watch, full: Callable[[], None]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    watch(At(1, full))
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
    assert "a system that runs out of memory does so — in order of least harm, each on top of" in note
    keys = ["per_device_train_batch_size=1", "quantization"]
    assert sorted(keys, key=note.index) == keys
