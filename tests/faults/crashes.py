"""What runs that are killed have in common: where they end, and with what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback

from alignctl import rundir
from alignctl.rundir import RunDir

Train = Callable[..., Any]
Watch = Callable[[TrainerCallback], None]
# What a clock or the machine decides.
MEASURED = ("tokens_per_second", "pairs_per_second", "peak_memory_gib", "peak_host_gib", "eta_seconds")
MEASURED_AT_EVALUATION = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
# Two epochs and a half of 16 rows.
LONG = {"max_steps": 10, "save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


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


def whole_checkpoints(run: Path) -> list[str]:
    """The names of the checkpoints that count; each holds what its note says."""
    found = RunDir(run).checkpoints()
    for path in found:
        assert json.loads((path / "alignctl.json").read_text())["files"] == rundir.digests(path), path
        assert len(rundir.digests(path)) >= 6, path
    return [path.name for path in found]
