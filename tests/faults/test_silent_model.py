"""Silent faults of what training starts from (1 to 4, 16): each is planted in a real run, with its gate on and off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer

from alignctl.recipe import catalog
from alignctl.train import dpo, fit
from alignctl.train.parts import Parts

Train = Callable[..., Any]
Fault = Callable[[Trainer], None]
Plant = Callable[[Fault], None]

METHODS = ("sft", "dpo", "orpo")
LATER = {"moved": False, "saved": False}
# Below a bfloat16 weight's last bit: adapters begin at up to 0.125 here, and 0.125 / 400 is 3e-4.
LOW = {"learning_rate": 5e-6, "max_steps": 10}


def trained(trainer: Trainer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_planted(train: Train, method: str) -> None:
    for name, changes in {"adapter": {}, "all": {"lora": None, "training": {"learning_rate": 1e-5}}}.items():
        ran = train(method, folder=name, **changes)
        assert ran.code == 0 and ran.record["status"] == "finished", ran.err
        verdicts = {gate: found["verdict"] for gate, found in ran.record["gates"].items()}
        assert verdicts.pop("reload") == "off"
        assert set(verdicts.values()) == {"passed"}
        assert {"targets", "trainable", "memory", "packed", "reference", "finite", "moved", "saved"} <= set(verdicts)


# 1: the reference is not what training starts from.


@torch.no_grad()
def off_the_reference(trainer: Trainer) -> None:
    for name, parameter in trained(trainer).items():
        if "lora_B" in name:
            parameter.normal_(std=0.1)


@pytest.mark.parametrize("precomputed", [False, True])
def test_the_policy_has_left_the_reference(train: Train, plant: Plant, precomputed: bool) -> None:
    plant(off_the_reference)
    section = {"precompute_ref_log_probs": precomputed}
    ran = train(dpo=section)
    assert ran.code == 5 and ran.verdict("reference") == "stopped"
    assert "gate.reference: policy and reference differ by" in ran.err
    assert "model.adapter must be what training starts from" in ran.err
    found = ran.record["gates"]["reference"]
    assert found["value"] > 10 * found["limit"]
    assert train(dpo=section, gates={"reference": False}, folder="off").code == 0


def base_as_reference(trainer: Trainer) -> None:
    """TRL keeps a copy of the adapter for the reference; without it the reference is the base."""
    trainer.model.delete_adapter("ref")


def test_the_reference_is_the_base_and_not_the_sft_model(train: Train, plant: Plant) -> None:
    assert train("sft", folder="sft").code == 0
    onward: dict[str, Any] = {"lora": None, "model": {"adapter": "sft"}}
    sound = train(**onward, folder="sound")
    assert sound.code == 0 and sound.record["gates"]["reference"]["value"] < 1e-6
    plant(base_as_reference)
    ran = train(**onward)
    assert ran.code == 5 and ran.verdict("reference") == "stopped" and "gate.reference" in ran.err
    assert train(**onward, gates={"reference": False}, folder="off").code == 0


# 2: the reference is read anew from the model's folder, and what was merged in memory is lost.


def merged_in_memory(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(parts: Parts, recipe: Any) -> PreTrainedModel:
        merged = PeftModel.from_pretrained(parts.base(recipe), adapter).merge_and_unload()
        return merged.requires_grad_()

    monkeypatch.setattr(Parts, "start", start)


def test_a_merge_in_memory_is_not_in_the_reference(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("sft", folder="sft").code == 0
    merged_in_memory(tmp_path / "sft" / "model", monkeypatch)
    whole: dict[str, Any] = {"lora": None, "training": {"learning_rate": 1e-5}}
    ran = train(**whole)
    assert ran.code == 5 and ran.verdict("reference") == "stopped"
    assert "a merged model needs its own folder" in ran.err
    assert train(**whole, gates={"reference": False}, folder="off").code == 0


# 3: adapters in bfloat16, where small updates round to nothing.


def in_bfloat16(trainer: Trainer) -> None:
    for parameter in trained(trainer).values():
        parameter.data = parameter.data.bfloat16()


def test_adapters_in_bfloat16(train: Train, plant: Plant) -> None:
    plant(in_bfloat16)
    ran = train()
    assert ran.code == 5 and ran.verdict("trainable") == "stopped"
    assert "gate.trainable: 28 of 28 trained tensors are bfloat16" in ran.err
    ran = train(gates={"trainable": False}, folder="off")
    assert ran.code == 0
    kept = load_file(ran.folder / "model" / "adapter_model.safetensors")
    assert {p.dtype for p in kept.values()} == {torch.bfloat16}


def test_adapters_that_round_their_updates_away(train: Train, plant: Plant) -> None:
    """0 to 6 % of the values of every lora_A have moved after 10 updates; in float32 all have."""
    plant(in_bfloat16)
    ran = train(gates={"trainable": False}, training=LOW)
    assert ran.code == 5 and ran.verdict("moved") == "stopped"


def test_all_weights_in_bfloat16(train: Train, plant: Plant) -> None:
    plant(in_bfloat16)
    whole: dict[str, Any] = {"lora": None, "training": LOW}
    ran = train("sft", **whole)
    assert ran.code == 5 and "gate.trainable: 21 of 21 trained tensors are bfloat16" in ran.err
    ran = train("sft", **whole, gates={"trainable": False}, folder="moved")
    assert ran.code == 5 and ran.verdict("moved") == "stopped"
    assert train("sft", **whole, gates={"trainable": False, "moved": False}, folder="off").code == 0


def test_rounding_is_not_called_a_missing_gradient(train: Train, plant: Plant) -> None:
    plant(in_bfloat16)
    ran = train("sft", lora=None, training=LOW, gates={"trainable": False})
    assert ran.code == 5 and "gate.moved: " in ran.err
    assert "no gradient reaches them" not in ran.err


def test_trl_leaves_adapters_of_a_4_bit_model_in_bfloat16_and_we_do_not(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []

    def settle(trainer: Trainer, *given: Any) -> Trainer:
        left.append({p.dtype for p in trained(trainer).values()})
        return settled(trainer, *given)

    settled = dpo.settle
    monkeypatch.setattr(dpo, "settle", settle)
    ran = train(quantization={})
    assert left == [{torch.bfloat16}]
    assert ran.code == 0 and ran.verdict("trainable") == ran.verdict("quantized") == "passed"
    kept = load_file(ran.folder / "model" / "adapter_model.safetensors")
    assert {p.dtype for p in kept.values()} == {torch.float32}


# 4: nothing is trained.


def frozen(trainer: Trainer) -> None:
    """As after `enable_input_require_grads`, where the backward pass goes through although no weight wants it."""
    trainer.model.requires_grad_(False)
    trainer.model.enable_input_require_grads()


def test_nothing_is_trained(train: Train, plant: Plant) -> None:
    plant(frozen)
    ran = train("sft")
    assert ran.code == 5 and ran.verdict("trainable") == "stopped" and ran.record["gates"]["trainable"]["value"] == 0
    assert "gate.trainable: no weight of the model is trained" in ran.err
    ran = train("sft", gates={"trainable": False, "moved": False}, folder="later")
    assert ran.code == 6 and ran.verdict("saved") == "stopped"
    assert "gate.saved: 14 adapters are all zero: they change nothing" in ran.err
    assert train("sft", gates={"trainable": False, **LATER}, folder="off").code == 0


@pytest.mark.parametrize("steps", [4, 10])
def test_nothing_has_moved(train: Train, plant: Plant, steps: int) -> None:
    plant(frozen)
    ran = train("sft", gates={"trainable": False}, training={"max_steps": steps})
    assert ran.code == 5 and ran.verdict("moved") == "stopped"


# 16: SFT, DPO and what is served have different templates.


def test_another_template_than_the_parent(train: Train) -> None:
    assert train("sft", folder="sft").code == 0
    onward: dict[str, Any] = {"lora": None, "model": {"adapter": "sft", "chat_template": "zephyr"}}
    ran = train(**onward)
    assert ran.code == 5 and ran.verdict("parent") == "stopped"
    assert "gate.parent: sft/model was trained with another chat template (model)" in ran.err
    assert "model.chat_template: model" in ran.err
    found = json.loads((ran.folder / "ledger.json").read_text(encoding="utf-8"))["findings"]
    assert [finding["warns"] for finding in found if finding["name"] == "template.parent"] == [True]
    ran = train(**onward, gates={"parent": False}, folder="off")
    assert ran.code == 0 and ran.record["template"]["name"] == "zephyr"
    served = (ran.folder / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    assert served == catalog.template("zephyr")


def test_another_template_is_saved(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(catalog.template("zephyr"), encoding="utf-8")

    monkeypatch.setattr(fit, "flush", flush)
    ran = train()
    assert ran.code == 6 and ran.verdict("saved") == "stopped"
    assert "gate.saved: the tokenizer's chat template is not the one that was trained with" in ran.err
    assert train(gates={"saved": False}, folder="off").code == 0
