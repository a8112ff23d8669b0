"""Three steps of a recipe, timed: what a plan can only estimate."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.plan.fixes import changed_by
from alignctl.recipe.load import Loaded
from alignctl.rundir import RunDir
from alignctl.train import fit, machine
from alignctl.train.display import Display
from alignctl.train.translate import translated

_TIMED = 3


class _Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.times.append(time.monotonic())


def three_steps(loaded: Loaded, folder: Path, display: Display) -> dict[str, float]:
    """Seconds of a step, the median of three behind a first one, and the peak so far in GiB; written to `folder`.

    Raises:
        AlignctlError: whatever keeps the recipe from training here.
    """
    recipe = changed_by(loaded.recipe, {"training.max_steps": _TIMED + 1, "evaluation.samples": 0})
    run, clock = RunDir(folder), _Clock()
    run.create({"command": "alignctl plan --measure"}, overwrite=False)
    try:
        with translated(run):
            job = fit.assemble(replace(loaded, recipe=recipe), run, display, smoke=False)
            job.trainer.add_callback(clock)
            job.trainer.train()
    finally:
        run.release()
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    here = machine.detect()
    return {
        "seconds_per_step": statistics.median(steps),
        "peak_gib": here.peak_memory_gib(),
        "cuda": here.kind == "cuda",
    }
