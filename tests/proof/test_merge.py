"""A run's adapter merged into its base: the adapted model to rounding, or nothing at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[5, 9, 12, 40, 41, 7]])
STRONG = {"learning_rate": 2e-2, "lr_scheduler_type": "constant"}
Here = Callable[..., subprocess.CompletedProcess[str]]
Finished = Callable[..., Path]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_look(finished: Finished, workshop: Path, here: Here, tmp_path: Path, lora: dict) -> None:
    folder = finished("dpo", lora=lora, training=STRONG)
    done = here("merge", str(folder), str(tmp_path / "out"), "--debug")
    print(done.stdout, done.stderr)
    base = AutoModelForCausalLM.from_pretrained(workshop / "base", dtype=torch.float32).eval()
    plain = logits(base)
    live = logits(PeftModel.from_pretrained(base, folder / "model").eval())
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    print((found - live).abs().max(), (found - plain).abs().max())
    print(
        sorted(p.name for p in (tmp_path / "out").iterdir()),
        (tmp_path / "out/README.md").read_text(),
        (tmp_path / "out/alignctl.json").read_text(),
    )
    for d in ("bfloat16", "float16"):
        done = here("merge", str(folder), str(tmp_path / d), "--dtype", d)
        print(done.stdout, done.stderr)
