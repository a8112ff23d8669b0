"""Ctrl-C at any moment, and going on afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignctl.cli import signals
from alignctl.cli.main import main
from alignctl.errors import Interrupted
from alignctl.recipe.load import load
from alignctl.train import standin

RECIPE = """model: {{name_or_path: {model}, dtype: float32}}
lora: {{r: 4}}
data: {{train: [{{path: pairs.jsonl}}], eval_fraction: 0.2}}
training: {{learning_rate: 1e-3, num_train_epochs: {epochs}, per_device_train_batch_size: 1, save_steps: 5}}
dpo: {{}}
evaluation: {{samples: 2, max_new_tokens: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path, pairs: Path) -> Path:
    """A recipe on a tiny model on disk, long enough to be stopped in the middle."""
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(model="HuggingFaceTB/SmolLM2-135M", epochs=1))
    standin.stand_in(load(path).recipe, tmp_path / "tiny")
    path.write_text(RECIPE.format(model=tmp_path / "tiny" / "model", epochs=200))
    return path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "alignctl", "dpo", "r.yaml", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(process: subprocess.Popen[str], path: Path, lines: int) -> None:
    """Until `path` has so many lines, or the process has ended."""
    while process.poll() is None:
        if path.is_file() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.05)


def record(folder: Path) -> dict[str, str]:
    values: dict[str, str] = json.loads((folder / "runs/r/run.json").read_text())
    return values


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, recipe: Path, number: signal.Signals
) -> None:
    process = start(tmp_path)
    wait_for(process, tmp_path / "runs/r/metrics.jsonl", 7)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (line,) = said.splitlines()
    assert line.endswith("alignctl dpo r.yaml --resume")
    assert record(tmp_path)["status"] == "interrupted"
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "runs/r/checkpoints").iterdir())
    assert f"checkpoint step-{saved[-1]} is saved" in line
    assert saved[-1] == json.loads((tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert not (tmp_path / "runs/r/model").exists()


@pytest.mark.parametrize("seconds", [0.6, 1.5, 3.0, 4.5])
def test_ctrl_c_before_the_first_step(tmp_path: Path, recipe: Path, seconds: float) -> None:
    process = start(tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said and said.startswith("alignctl: ")
    if (tmp_path / "runs/r/run.json").exists():
        assert record(tmp_path)["status"] == "interrupted"


def test_resumed_equals_uninterrupted(tmp_path: Path, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("num_train_epochs: 200", "num_train_epochs: 4"))
    process = start(tmp_path)
    wait_for(process, tmp_path / "runs/r/metrics.jsonl", 9)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    resumed = start(tmp_path, "--resume")
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert record(tmp_path)["status"] == "finished"
    whole = start(tmp_path, "--output", "whole", "gates.reload=off")
    whole.communicate(timeout=120)
    assert whole.returncode == 0
    ours = load_file(tmp_path / "runs/r/model/adapter_model.safetensors")
    theirs = load_file(tmp_path / "whole/model/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    rows = [json.loads(line) for line in (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))


def test_resume_refuses_another_recipe(tmp_path: Path, recipe: Path) -> None:
    process = start(tmp_path)
    wait_for(process, tmp_path / "runs/r/metrics.jsonl", 7)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    changed = start(tmp_path, "dpo.beta=0.5", "--resume")
    _, said = changed.communicate(timeout=60)
    assert changed.returncode == 2 and "was made by another recipe" in said
    assert record(tmp_path)["status"] == "interrupted"


def test_a_signal_that_a_library_made_an_error_of_is_still_a_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lazy imports turn whatever stops them into an ImportError."""

    def app() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise ModuleNotFoundError("Could not import module 'Trainer'") from None

    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr("alignctl.cli.app.app", app)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stopped:
        main()
    for number, handler in before.items():
        signal.signal(number, handler)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "alignctl: run: stopped by SIGTERM\n"


def test_a_signal_that_a_library_swallowed_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_received", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.catch()
    signals.check()
    with contextlib.suppress(Interrupted):
        signal.raise_signal(signal.SIGINT)
    for number, handler in before.items():
        signal.signal(number, handler)
    with pytest.raises(Interrupted, match="SIGINT"):
        signals.check()
