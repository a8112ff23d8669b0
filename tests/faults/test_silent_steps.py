"""Silent faults of training (5 to 7, 17): each is planted in a real run, with its gate on and off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from alignctl.train import standin

Train = Callable[..., Any]
Fault = Callable[[Trainer], None]
Plant = Callable[[Fault], None]

METHODS = ("sft", "dpo", "orpo")
LATER = {"moved": False, "saved": False}


def trained(trainer: Trainer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def blocks(trainer: Trainer) -> nn.ModuleList:
    return trainer.model.get_base_model().model.layers


# 5: some layers get no gradient.


def cut_off(trainer: Trainer, block: int = 0) -> None:
    """No gradient reaches the blocks up to `block`, as under a checkpointing that forgets its input."""
    blocks(trainer)[block].register_forward_hook(lambda module, given, out: out.detach().requires_grad_())


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_reaches_a_block(train: Train, plant: Plant, method: str) -> None:
    plant(cut_off)
    ran = train(method)
    assert ran.code == 5 and ran.verdict("moved") == "stopped"
    assert "gate.moved: 7 of 14 trained tensors have not moved after 1 update" in ran.err
    assert "layers.0." in ran.err and "training.gradient_checkpointing=false" in ran.err
    assert ran.record["gates"]["moved"]["step"] == 1


def test_a_block_without_gradient_and_without_the_gate(train: Train, plant: Plant) -> None:
    plant(cut_off)
    ran = train(gates={"moved": False})
    assert ran.code == 6 and ran.verdict("saved") == "stopped"
    assert "gate.saved: 7 adapters are all zero" in ran.err
    assert train(gates=LATER, folder="off").code == 0


def test_resuming_is_no_way_out_of_adapters_that_are_zero(train: Train, plant: Plant) -> None:
    plant(cut_off)
    ran = train(gates={"moved": False})
    assert ran.code == 6 and ran.verdict("saved") == "stopped"
    assert "--resume" not in ran.err


def test_a_warm_up_from_0_is_not_a_layer_without_gradient(train: Train) -> None:
    ran = train(training={"lr_scheduler_type": "linear", "warmup_steps": 2})
    assert ran.code == 0 and ran.record["gates"]["moved"]["step"] == 2


def test_rare_tokens_are_not_a_layer_without_gradient(train: Train, tmp_path: Path) -> None:
    """Nothing is planted: all weights of a model with as many tokens as Mistral's, whose head is not its embedding."""
    family = standin.family("mistral")[0]
    (tmp_path / "corpus.txt").write_text("Say tea and rain.\n", encoding="utf-8")
    standin._tokenizer(family, tmp_path / "corpus.txt", tmp_path / "large")
    standin._model(family, tmp_path / "large")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    model.resize_token_embeddings(32000)
    model.save_pretrained(tmp_path / "large")
    ran = train("sft", lora=None, model={"name_or_path": "./large"}, training={"learning_rate": 1e-5})
    assert ran.code == 0, ran.err


# 6: the forward pass is not of what is updated; metrics vary, weights stay.


def other_weights(trainer: Trainer) -> None:
    """The optimizer holds copies, which are updated in the place of the weights."""
    group = [nn.Parameter(p.detach().clone()) for p in trained(trainer).values()]
    trainer.optimizer = torch.optim.AdamW(group, lr=5e-4)


def test_the_optimizer_updates_other_weights(train: Train, plant: Plant) -> None:
    plant(other_weights)
    ran = train()
    assert ran.code == 5 and ran.verdict("trainable") == "stopped"
    assert "gate.trainable: the optimizer lacks 28 of 28 trained tensors" in ran.err
    ran = train(gates={"trainable": False}, folder="moved")
    assert ran.code == 5 and ran.verdict("moved") == "stopped"
    assert "gate.moved: 14 of 14 trained tensors have not moved after 1 update" in ran.err
    ran = train(gates={"trainable": False, "moved": False}, folder="saved")
    assert ran.code == 6 and ran.verdict("saved") == "stopped"
    assert train(gates={"trainable": False, **LATER}, folder="off").code == 0


def test_the_loss_is_of_something_else(train: Train, plant: Plant) -> None:
    plant(lambda trainer: cut_off(trainer, block=-1))
    ran = train()
    assert ran.code == 5 and ran.verdict("trainable") == "passed" and ran.verdict("moved") == "stopped"
    assert "gate.moved: 14 of 14 trained tensors have not moved" in ran.err
    ran = train(gates=LATER, folder="off")
    assert ran.code == 0
    kept = load_file(ran.folder / "model" / "adapter_model.safetensors")
    assert not any(p.any() for name, p in kept.items() if "lora_B" in name)


# 7: NaN behind the log's filter.


def overflow(trainer: Trainer) -> None:
    """The embedding of the token 9 is no number; only the tenth row says 9."""
    nine = trainer.processing_class.convert_tokens_to_ids("9")

    def look(module: nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill((given[0] == nine)[..., None], float("nan"))

    trainer.model.get_input_embeddings().register_forward_hook(look)


@pytest.mark.parametrize(
    ("method", "packed"),
    [("sft", False), ("dpo", False), ("dpo", True), ("orpo", True)],
)
def test_a_row_overflows(train: Train, plant: Plant, method: str, packed: bool) -> None:
    plant(overflow)
    ran = train(method, training={"packed": packed})
    assert ran.code == 5 and ran.verdict("finite") == "stopped"
    assert not (ran.folder / "model").exists()
    assert "gate.finite: log-probabilities of rows.jsonl:10 are not finite" in ran.err


def adapter(trainer: Trainer) -> nn.Parameter:
    return next(p for name, p in trained(trainer).items() if "lora_B" in name)


def bad_gradient(trainer: Trainer) -> None:
    """From the second step on one gradient is no number, behind a forward pass that is finite."""
    passes = []

    def look(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(gradient)  # the first is of the gate `memory`
        return gradient * float("nan") if len(passes) > 2 else gradient

    adapter(trainer).register_hook(look)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_is_not_finite(train: Train, plant: Plant, method: str) -> None:
    plant(bad_gradient)
    ran = train(method)
    assert ran.code == 5 and ran.verdict("finite") == "stopped" and ran.record["gates"]["finite"]["step"] == 2
    assert "gate.finite: the gradient's norm is nan, so the update would ruin every weight; its rows: rows.j" in ran.err
    assert ran.err.count("rows.jsonl:") == 4
    assert "training.learning_rate" in ran.err
    ran = train(method, gates={"finite": False}, folder="later")
    assert ran.code == 6 and ran.verdict("saved") == "stopped" and "holds values that are not finite" in ran.err


def test_without_the_gates_everything_is_ruined_and_the_log_says_so(train: Train, plant: Plant) -> None:
    """A Trainer would log the NaN as 0.0, or as the last loss."""
    plant(bad_gradient)
    ran = train(gates={"finite": False, "saved": False})
    assert ran.code == 0
    kept = load_file(ran.folder / "model" / "adapter_model.safetensors")
    assert all(p.isnan().all() for p in kept.values())
    log = [json.loads(line) for line in (ran.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [str(row["loss"]) for row in log[2:]] == ["nan", "nan"]
    source = {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.25}
    ran = train(gates={"finite": False, "saved": False}, folder="held-out", data=source)
    assert ran.code == 5 and "held-out rows after training: the loss is nan" in ran.err


def last_update(trainer: Trainer) -> None:
    """The last update writes an infinite weight, behind finite gradients; no forward pass follows."""

    class Writes(TrainerCallback):
        @torch.no_grad()
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                adapter(trainer)[0, 0] = float("inf")

    trainer.add_callback(Writes())


def test_the_last_update_ruins_a_weight(train: Train, plant: Plant) -> None:
    plant(last_update)
    ran = train()
    assert ran.code == 5 and ran.verdict("finite") == "stopped" and ran.record["gates"]["finite"]["step"] == 4
    assert "gate.finite: 1 of 28 trained tensors are not finite" in ran.err and "q_proj.lora_B" in ran.err
    assert not list(ran.folder.glob("checkpoints/step-*"))
    ran = train(gates={"finite": False}, folder="later")
    assert ran.code == 6 and ran.verdict("saved") == "stopped" and "q_proj.lora_B" in ran.err
    assert train(gates={"finite": False, "saved": False}, folder="off").code == 0


# 17: a mask without a supervised token.


def masked(trainer: Trainer) -> None:
    collate = trainer.data_collator

    def all_masked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = collate(rows)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    trainer.data_collator = all_masked


def test_a_mask_without_a_supervised_token(train: Train, plant: Plant) -> None:
    plant(masked)
    ran = train("sft")
    assert ran.code == 5 and ran.verdict("moved") == "stopped"
    assert "gate.moved: 14 of 14 trained tensors have not moved after 1 update" in ran.err
    ran = train("sft", gates={"moved": False}, folder="later")
    assert ran.code == 6 and ran.verdict("saved") == "stopped"
    assert train("sft", gates=LATER, folder="off").code == 0
