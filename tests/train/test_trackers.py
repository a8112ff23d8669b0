"""Trackers: what reaches them, where they write, that they ask for nothing, and that none stops a run."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import flatten_dict

from alignctl import rundir
from alignctl.errors import DivergedError
from alignctl.recipe.load import load
from alignctl.rundir import RunDir
from alignctl.train import trackers
from alignctl.train.trackers import Tracking

Run = Callable[..., subprocess.CompletedProcess[str]]
SECRET = "5ecret9-of-the-tests"
RECIPE = """model: {name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct}
lora: {r: 4}
data:
  train: [{path: pairs.jsonl}]
  eval_fraction: 0.25
training: {learning_rate: 1e-3}
trl: {run_name: "${oc.env:MY_SECRET}"}
gates: {reload: off}
logging: {report_to: %s}
dpo: {}
"""
SCORES = {
    "chosen_rewards": [0.0, 3.0],
    "rejected_rewards": [0.0, 1.0],
    "chosen_logps_per_token": [-1.0, -3.0],
    "rejected_logps_per_token": [-2.0, -3.0],
}
SUMMARY = {
    "method": "dpo",
    "verdict": "better",
    "measure": "rise of the reward margin",
    "difference": 0.25,
    "difference_interval": [0.125, 0.5],
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder with a resolved recipe, held-out scores and a summary."""
    monkeypatch.setenv("MY_SECRET", SECRET)
    (tmp_path / "r.yaml").write_text(RECIPE % "none", encoding="utf-8")
    run = RunDir(tmp_path / "runs" / f"mine-{SECRET[:3]}")
    run.create({"command": "x"}, overwrite=False)
    rundir.write_text(run / "recipe.yaml", load(tmp_path / "r.yaml").text())
    rundir.write_json(run / "logs" / "before.json", {"loss": 0.5, "scores": SCORES})
    rundir.write_json(run / "summary.json", SUMMARY)
    return run


@pytest.fixture
def smoke(here: Run, tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A smoke run that reports to a tracker, in this process."""
    monkeypatch.setenv("MY_SECRET", SECRET)
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "r.yaml").write_text(RECIPE % name, encoding="utf-8")
        return here("dpo", "r.yaml", "--smoke")

    return run


def track(run: RunDir, name: str, said: list[str], resumed: int | None = None) -> None:
    """A short run, told to a tracker."""
    tracking = Tracking(name, said.append)
    tracking.open(run, resumed)
    tracking.held_out(run, "before", 0)
    tracking.row({"step": 1, "epoch": 0.5, "loss": 0.75, "note": "text", "grad_norm": float("nan")})
    tracking.row({"step": 2, "eval_loss": 0.25})
    tracking.close(run, failed=False)


def holding(folder: Path, secret: str = SECRET) -> list[Path]:
    """The files that hold the secret."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


# TensorBoard, for real.


def events(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
    """The scalars and texts of a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    tags = found.Tags()
    scalars = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in tags["scalars"]}
    texts = {name: found.Tensors(name)[-1].tensor_proto.string_val[0].decode() for name in tags["tensors"]}
    return scalars, {name.removesuffix("/text_summary"): text for name, text in texts.items()}


def test_tensorboard_is_told_the_numbers_and_the_outcome(run: RunDir) -> None:
    said: list[str] = []
    (run / "report.html").write_text("<html>", encoding="utf-8")
    track(run, "tensorboard", said)
    scalars, texts = events(run / "logs" / "tensorboard")
    assert said == [f"tensorboard: tensorboard --logdir {run.path.parent}"]
    assert scalars == {
        "train/loss": [(1, 0.75)],
        "train/epoch": [(1, 0.5)],
        "eval/loss": [(2, 0.25)],
        "heldout/loss": [(0, 0.5)],
        "heldout/n": [(0, 2.0)],
        "heldout/reward_accuracy": [(0, 0.75)],
        "heldout/margin": [(0, 1.0)],
        "heldout/chosen_logps_per_token": [(0, -2.0)],
        "heldout/rejected_logps_per_token": [(0, -2.5)],
    }
    assert "learning_rate: 0.001" in texts["recipe"] and "${oc.env:MY_SECRET}" in texts["recipe"]
    assert texts["verdict"] == "better" and texts["run"] == str(run.path)
    assert texts["difference"] == "rise of the reward margin +0.2500, 95 % interval +0.1250 to +0.5000"
    assert texts["report"] == str(run / "report.html")
    assert holding(run.path) == []


def test_tensorboard_takes_back_what_a_resumed_run_writes_again(run: RunDir) -> None:
    """The run was killed behind step 2, and goes on from a checkpoint of step 1."""
    track(run, "tensorboard", [])
    tracking = Tracking("tensorboard", print)
    tracking.open(run, 1)
    tracking.row({"step": 2, "eval_loss": 0.5})
    tracking.close(run, failed=False)
    scalars, _ = events(run / "logs" / "tensorboard")
    assert scalars["eval/loss"] == [(2, 0.5)] and scalars["train/loss"] == [(1, 0.75)]


def test_a_run_reports_to_tensorboard(smoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    done = smoke("tensorboard")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "r-smoke"
    scalars, texts = events(folder / "logs" / "tensorboard")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert scalars["train/loss"] == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert {"train/pairs_per_second", "train/rewards/margins"} <= scalars.keys()
    summary = json.loads((folder / "summary.json").read_text())
    assert scalars["heldout/margin"] == [(0, 0.0), (2, pytest.approx(summary["after"]["margin"], rel=1e-5))]
    assert texts["verdict"] == summary["verdict"]
    assert holding(tmp_path) == [] and not (tmp_path / "elsewhere").exists()
    assert "tensorboard: tensorboard --logdir runs" in done.stdout
    assert json.loads((folder / "run.json").read_text())["tracker"] == {"name": "tensorboard", "id": None}


# Trackio, for real. It reads TRACKIO_DIR when it is imported, so it runs in a process of its own.


def test_a_run_reports_to_trackio_in_its_folder(tmp_path: Path, alignctl: Run, pairs: Path) -> None:
    pytest.importorskip("trackio")
    (tmp_path / "r.yaml").write_text(RECIPE % "trackio", encoding="utf-8")
    done = alignctl("dpo", "r.yaml", "--smoke", MY_SECRET=SECRET, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    folder = tmp_path / "runs" / "r-smoke"
    rows = database(folder / "logs" / "trackio" / "alignctl.db")
    steps = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == {row["step"]: pytest.approx(row["loss"]) for row in logged}
    assert [row["step"] for row in rows if "heldout/margin" in row] == [0, 2]
    summary = json.loads((folder / "summary.json").read_text())
    (outcome,) = (row["outcome"] for row in rows if "outcome" in row)
    assert summary["verdict"] in json.dumps(outcome)
    assert holding(tmp_path) == []


def database(file: Path) -> list[dict[str, Any]]:
    """The lines of a trackio project, with their steps."""
    with sqlite3.connect(file) as opened:
        found = opened.execute("select step, metrics from metrics order by id").fetchall()
    return [{"step": step, **json.loads(metrics)} for step, metrics in found]


# Weights & Biases and MLflow, as far as it can be seen without them.


class FakeRun:
    """What a run of wandb is asked for."""

    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.summary = given, [], {}
        self.id, self.url, self.dir = "abc123", None, "somewhere/offline-run-abc123/files"

    def define_metric(self, *given: Any, **named: Any) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A stand-in for the package; the runs that it was asked for."""
    runs: list[FakeRun] = []
    module: Any = types.ModuleType("wandb")
    module.Settings = dict
    module.init = lambda **given: runs.append(FakeRun(**given)) or runs[-1]  # type: ignore[func-returns-value]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards, whatever is set meanwhile
        monkeypatch.delenv(name)
    return runs


def test_wandb_stays_offline_without_a_key(run: RunDir, wandb: list[FakeRun]) -> None:
    said: list[str] = []
    track(run, "wandb", said)
    (found,) = wandb
    assert os.environ["WANDB_MODE"] == "offline"
    assert found.given["dir"] == str(run / "logs") and found.given["id"] is None
    assert found.given["config"] == load(run / "recipe.yaml").resolved() and SECRET not in repr(found.given)
    assert found.given["settings"]["x_disable_meta"] and found.given["settings"]["console"] == "off"
    assert found.logged[1] == {"train/epoch": 0.5, "train/loss": 0.75, "step": 1}
    assert found.summary["verdict"] == "better" and found.exit_code == 0
    assert said == ["wandb: wandb sync somewhere/offline-run-abc123"]


@pytest.mark.parametrize(("name", "value"), [("WANDB_API_KEY", "k" * 40), ("WANDB_MODE", "online")])
def test_wandb_goes_online_when_it_is_told_to(
    run: RunDir, wandb: list[FakeRun], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    track(run, "wandb", [])
    assert os.environ.get("WANDB_MODE") == (value if name == "WANDB_MODE" else None)


def test_a_resumed_run_is_the_same_one_in_the_tracker(run: RunDir, wandb: list[FakeRun]) -> None:
    track(run, "wandb", [])
    track(run, "wandb", [], resumed=1)
    assert [found.given["id"] for found in wandb] == [None, "abc123"]


def test_a_run_that_fails_is_told_as_failed(run: RunDir, wandb: list[FakeRun]) -> None:
    recipe = load(run / "recipe.yaml").recipe
    recipe = recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"report_to": "wandb"})})
    with pytest.raises(DivergedError), trackers.tracking(recipe, run, print, None):
        raise DivergedError
    assert wandb[0].exit_code == 1


def test_a_recipe_as_mlflow_takes_it(run: RunDir) -> None:
    """Keys that are a path, values that are texts."""
    flat = trackers._flat(load(run / "recipe.yaml").resolved())
    assert flat["training.learning_rate"] == "0.001" and flat["trl.run_name"] == "${oc.env:MY_SECRET}"
    assert flat.keys() == flatten_dict(load(run / "recipe.yaml").resolved(), delimiter=".").keys()


# What goes wrong.


def test_a_tracker_that_fails_is_left_out(run: RunDir, wandb: list[FakeRun], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def log(self: FakeRun, values: dict[str, Any]) -> None:
        calls.append(values)
        raise OSError("no route\nto host")

    monkeypatch.setattr(FakeRun, "log", log)
    said: list[str] = []
    track(run, "wandb", said)
    assert len(calls) == 1
    assert said[1:] == ["note: wandb failed and is left out from here on: OSError: no route to host"]


def test_a_run_goes_on_without_a_tracker_that_does_not_start(
    smoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "mlflow.py").write_text("raise RuntimeError('broken')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    done = smoke("mlflow")
    assert done.returncode == 0, done.stderr
    assert "note: mlflow failed and is left out from here on: RuntimeError: broken" in done.stdout
    assert json.loads((tmp_path / "runs/r-smoke/run.json").read_text())["status"] == "finished"


def test_a_tracker_that_is_not_installed_is_said_first(smoke: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    done = smoke("wandb")
    assert done.returncode == 4
    assert done.stderr == "alignctl: logging.report_to: wandb is not installed — pip install wandb\n"
    assert "reading and tokenizing" not in done.stdout
