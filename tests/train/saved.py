"""The saved model of a run, changed on the disk."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from alignctl.rundir import RunDir

WEIGHTS = "adapter_model.safetensors"


def change(run: RunDir, name: str, values: torch.Tensor) -> None:
    """Change one saved tensor."""
    save_file(load_file(run / "model" / WEIGHTS) | {name: values}, run / "model" / WEIGHTS)
