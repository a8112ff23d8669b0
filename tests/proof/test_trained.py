"""A finished run's models: the trained one, and what its training started from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignctl.errors import MachineError, RecipeError
from alignctl.proof import trained
from alignctl.train import standin

IDS = torch.tensor([[5, 9, 12, 40, 41, 7]])


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_an_adapter_run_gives_the_adapted_model_and_its_base(finished: Callable[..., Path], workshop: Path) -> None:
    folder = finished("dpo")
    found = trained.opened(folder).load()
    plain = AutoModelForCausalLM.from_pretrained(workshop / "base", dtype=torch.float32).eval()
    base = logits(plain)
    tuned = logits(PeftModel.from_pretrained(plain, folder / "model").eval())
    assert (tuned - base).abs().max() > 1e-4
    assert torch.allclose(logits(found.tuned), tuned, atol=1e-6)
    with found.start() as start:
        assert torch.allclose(logits(start), base, atol=1e-6)
    assert torch.allclose(logits(found.tuned), tuned, atol=1e-6)


def test_a_run_that_went_on_from_an_adapter_started_from_it(finished: Callable[..., Path], workshop: Path) -> None:
    parent = finished("sft")
    found = trained.opened(finished("dpo", lora=None, model={"adapter": str(parent)})).load()
    plain = AutoModelForCausalLM.from_pretrained(workshop / "base", dtype=torch.float32).eval()
    base = logits(plain)
    started = logits(PeftModel.from_pretrained(plain, parent / "model").eval())
    with found.start() as start:
        assert torch.allclose(logits(start), started, atol=1e-6)
    with found.base() as start:
        assert torch.allclose(logits(start), base, atol=1e-6)
    assert (logits(found.tuned) - started).abs().max() > 1e-5


def test_a_run_of_all_weights_has_two_models(finished: Callable[..., Path], workshop: Path) -> None:
    found = trained.opened(finished("orpo", lora=None)).load()
    plain = AutoModelForCausalLM.from_pretrained(workshop / "base", dtype=torch.float32).eval()
    with found.start() as start:
        assert torch.allclose(logits(start), logits(plain), atol=1e-6)
    assert (logits(found.tuned) - logits(plain)).abs().max() > 1e-4


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no run"):
        trained.opened(tmp_path)


def test_a_base_with_other_weights_is_refused(
    finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained.opened(finished("dpo"))
    other = tmp_path / "other"
    family = standin.family("smollm")[0]
    standin._tokenizer(family, finished("dpo").parents[1] / "train.jsonl", other)
    monkeypatch.setattr(standin, "set_seed", lambda seed: torch.manual_seed(7))
    standin._model(family, other)
    model = found.recipe.model.model_copy(update={"name_or_path": str(other)})
    moved = trained.Trained(found.run, found.recipe.model_copy(update={"model": model}), found.machine)
    with pytest.raises(MachineError, match="other weights"):
        moved.load()
