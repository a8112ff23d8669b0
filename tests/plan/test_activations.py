"""What is kept for the backward pass, beside what autograd keeps of real models under the packed engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from alignctl.plan import memory, shape
from alignctl.plan.activations import Batch, block
from alignctl.plan.setup import Setup
from alignctl.train import packing

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
GROUPED = {"num_key_value_heads": 2}


def kept(model: Any, ids: Tensor) -> int:
    """Bytes of all storages that the forward pass saves, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage  # held, so that no other one gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packing.backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(
    ("model_type", "extra"), [("llama", GROUPED), ("mistral", GROUPED), ("phi", {}), ("gpt_neox", {})]
)
def test_recomputed_blocks_keep_their_inputs(
    made: Callable[..., Setup], model_type: str, extra: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **extra, num_attention_heads=4))
    of = shape.of(model.config.to_dict())
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    packing.install(model)
    ids = torch.randint(3, 120, (4, 20))
    ids[2:, :9] = ids[:2, :9]
    total = packing.lay_out(ids, torch.ones_like(ids)).segments.total
    how = replace(made(), trains="adapter", compute=4, rank=4, checkpointing=True, packed=True, cuda=False)
    batch = Batch(rows=4, longest=20, tokens=total, keys=80, supervised=40)
    lines = memory._held(of, how, batch, block(of, how, 80 / total))
    rotary = 2 * 4 * of.rotary * total  # in the closure of each block, which is no saved tensor
    assert sum(line.bytes for line in lines) - rotary == kept(model, ids)


def test_a_block_of_mistral_by_hand(made: Callable[..., Setup], packaged: Callable[..., Any]) -> None:
    """In bytes a token, in bfloat16, on 4-bit weights."""
    found = block(packaged("mistralai/Mistral-7B-v0.1"), made("mistralai/Mistral-7B-v0.1"), 1.5)
    norms = 2 * (4 * 4096 + 4)
    attention = 2 * 4096 + 2 * 4096 + 2 * 4096 + 2 * 2 * 1024 * 1.5 + 4 * 32  # input, queries, output, keys and values
    mlp = 2 * 4096 + 4 * 2 * 14336  # input, gate, its SiLU, up, their product
    assert found.kept == norms + attention + mlp + 7 * 2 * 16
    assert (found.first, found.input) == (2 * 4096, 2 * 4096)


def test_only_what_an_adapter_reads(made: Callable[..., Setup], packaged: Callable[..., Any]) -> None:
    """With adapters on q_proj and v_proj alone the MLP's inputs are not kept."""
    name = "mistralai/Mistral-7B-v0.1"
    every, two = (made(name, lora=lora) for lora in ({}, {"target_modules": ["q_proj", "v_proj"]}))
    all_of_it, less = (block(packaged(name), setup, 1.0).kept for setup in (every, two))
    assert all_of_it - less == 2 * 4096 + 2 * 14336 + 5 * 2 * 16


def test_a_block_of_phi_by_hand(made: Callable[..., Setup], packaged: Callable[..., Any]) -> None:
    """LayerNorm gives float32 under autocast, and a 4-bit layer gives what it was given."""
    found = block(packaged("microsoft/phi-2"), made(), 1.0)
    inputs = 4 * 2 * 2560  # of q, k, v and fc1, a copy in 16 bits for each
    attention = 2 * 2560 + 2 * 2560 + 2 * 2560 + 2 * 2 * 2560 + 4 * 32  # queries, output and its copy, keys and values
    gelu = 4 * 4 * 10240 + 2 * 10240
    assert found.kept == 8 + inputs + attention + gelu + 6 * 2 * 16
    assert (found.first, found.input) == (2 * 2560, 4 * 2560)
