"""Checkpoints appear whole."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignctl.rundir import RunDir, read_json
from alignctl.train import model as models
from alignctl.train.record import NOTE, Checkpoints

CONTROL = TrainerControl()


def at(step: int, last: int = 1000) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


def test_checkpoints_appear_whole_and_the_oldest_goes_last(tmp_path: Path, args: TrainingArguments) -> None:
    run, model = RunDir(tmp_path), nn.Linear(2, 1)
    (tmp_path / "metrics.jsonl").touch()
    callback = Checkpoints(run, keep=2)
    for step in (1, 2, 10):
        written = Path(args.output_dir) / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "weights").write_text("x")
        callback.on_save(args, at(step), CONTROL, model=model)
    assert [path.name for path in run.checkpoints()] == ["step-2", "step-10"]
    note = read_json(tmp_path / "checkpoints" / "step-10" / NOTE)
    assert (note["step"], note["trained"]) == (10, models.trained_fingerprint(model))
    (Path(args.output_dir) / "checkpoint-11").mkdir()
    callback.tidy()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-2"]
