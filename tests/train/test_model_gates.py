"""The gates of a model's layers: what has an adapter, what is in 4 bits, what is trained, and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from starts import around, make_recipe, passed, stopped
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from alignctl.train import preflight, standin
from alignctl.train.gates import Gates, Result
from alignctl.train.preflight import Built

Make = Callable[..., Built]
MakeGates = Callable[..., Gates]


def small(kind: str, **extra: Any) -> PreTrainedModel:
    """A model of the architecture `kind` with two blocks."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    set_seed(0)
    given = shape | {"num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None, **extra}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))


def adapted(model: PreTrainedModel, targets: str | list[str]) -> PeftModel:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))


# --- targets ------------------------------------------------------------------------------------------------------


def test_every_linear_layer_has_an_adapter(make: Make) -> None:
    found = passed(preflight.targets, make())
    kinds = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert found == Result("passed", f"14 adapters, on {kinds} of all 2 blocks", 14, 14)


def test_all_weights_need_no_adapter(make: Make) -> None:
    assert "without adapters" in passed(preflight.targets, make(lora=None)).said


def test_a_name_that_hits_nothing(make: Make) -> None:
    built = make(lora={"target_modules": ["q_proj", "qproj", "Wqkv"]})
    found = stopped(preflight.targets, built, "no layer of the model is called Wqkv, qproj — .*all-linear")
    assert found.value == "Wqkv"


def test_a_name_is_no_ending_of_another(make_gates: MakeGates) -> None:
    """PEFT matches whole names between dots, so `proj` is not `q_proj`."""
    model = adapted(small("llama"), ["q_proj"])
    model.peft_config["default"].target_modules = {"q_proj", "proj"}
    stopped(preflight.targets, around(model, make_gates()), "no layer of the model is called proj ")


def test_an_adapter_in_some_layers_only(make: Make) -> None:
    built = make(lora={"target_modules": ["q_proj", "v_proj"]})
    block = built.trainer.model.get_base_model().model.layers[1].self_attn
    block.v_proj = block.v_proj.base_layer
    found = stopped(preflight.targets, built, "v_proj has an adapter in 1 of 2 layers")
    assert (found.value, found.limit) == (1, 2)


def test_one_of_all_layers_has_no_adapter(make: Make) -> None:
    """PEFT makes the layers' whole names of `all-linear`."""
    built = make()
    block = built.trainer.model.get_base_model().model.layers[1].self_attn
    block.v_proj = block.v_proj.base_layer
    said = r"1 of 14 layers that get an adapter have none, such as model\.layers\.1\.self_attn\.v_proj — report it"
    found = stopped(preflight.targets, built, said)
    assert (found.value, found.limit) == (13, 14)


def test_all_layers_of_a_name_have_no_adapter(make: Make) -> None:
    built = make(lora={"target_modules": ["q_proj", "v_proj"]})
    for block in built.trainer.model.get_base_model().model.layers:
        block.self_attn.v_proj = block.self_attn.v_proj.base_layer
    found = stopped(preflight.targets, built, r"2 of 4 layers that get an adapter have none, such as .*0.*v_proj")
    assert (found.value, found.limit) == (2, 4)


def test_the_head_and_the_embedding_can_be_asked_for(make_gates: MakeGates) -> None:
    model = adapted(small("llama"), ["q_proj", "lm_head", "embed_tokens"])
    passed(preflight.targets, around(model, make_gates()))


def test_a_pattern_that_hits_some_layers_only(make: Make) -> None:
    built = make(lora={"target_modules": r".*layers\.0\.self_attn\.q_proj"})
    stopped(preflight.targets, built, "q_proj has an adapter in 1 of 2 layers")


def test_a_block_without_adapters(make_gates: MakeGates) -> None:
    """Its layers go by another name, as in models whose blocks alternate."""
    base = small("llama")
    other = base.model.layers[1].self_attn
    other.query = other.q_proj
    del other.q_proj
    found = stopped(preflight.targets, around(adapted(base, ["q_proj"]), make_gates()), "1 of 2 blocks have no adapter")
    assert (found.value, found.limit) == (1, 2)


def test_transposed_layers_count(make_gates: MakeGates) -> None:
    """GPT-2's are Conv1D; a block has a c_proj in its attention and another one behind it."""
    gates = make_gates()
    model = adapted(small("gpt2", n_layer=2, n_head=4, n_embd=32), "all-linear")
    found = passed(preflight.targets, around(model, gates))
    assert (found.value, found.limit) == (8, 8) and found.said.startswith("8 adapters, on c_attn, c_fc, c_proj")
    model = adapted(small("gpt2", n_layer=2, n_head=4, n_embd=32), ["c_attn", "c_proj"])
    inner = model.get_base_model().transformer.h[0].mlp
    inner.c_proj = inner.c_proj.base_layer
    stopped(preflight.targets, around(model, gates), "c_proj has an adapter in 1 of 2 layers")


def test_one_of_two_layers_of_a_name_can_be_asked_for(make_gates: MakeGates) -> None:
    model = adapted(small("gpt2", n_layer=2, n_head=4, n_embd=32), ["attn.c_proj"])
    found = passed(preflight.targets, around(model, make_gates()))
    assert found == Result("passed", "2 adapters, on c_proj of all 2 blocks", 2, 2)


def test_experts_and_their_router_count(make_gates: MakeGates) -> None:
    """A block of Mixtral has four projections, one router, and all experts as one layer."""
    gates, experts = make_gates(), {"num_local_experts": 4, "num_key_value_heads": 2}
    model = adapted(small("mixtral", **experts), "all-linear")
    found = passed(preflight.targets, around(model, gates))
    assert found == Result(
        "passed", "12 adapters, on experts, gate, k_proj, o_proj, q_proj, v_proj of all 2 blocks", 12, 12
    )
    block = model.get_base_model().model.layers[1].self_attn
    block.k_proj = block.k_proj.base_layer
    stopped(preflight.targets, around(model, gates), "k_proj has an adapter in 1 of 2 layers")


def test_experts_without_an_adapter_are_noticed(make_gates: MakeGates) -> None:
    """PEFT's `all-linear` reaches the experts of Mixtral, and of no other mixture."""
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model = adapted(small("qwen2_moe", **experts), "all-linear")
    assert not any("lora" in name and ".experts." in name for name, _ in model.named_parameters())
    gates = make_gates()
    preflight.targets(around(model, gates))
    assert gates.results["targets"].said.endswith("; 4 tensors of experts have none")  # two in each of two blocks


# --- quantized ----------------------------------------------------------------------------------------------------


FOUR_BIT: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "quantization": {}}


def test_no_quantization_was_asked_for(make: Make) -> None:
    assert passed(preflight.quantized, make()).said == "not asked for"


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_every_layer_is_in_4_bits(make: Make, targets: str | list[str]) -> None:
    built = make(**FOUR_BIT, lora={"target_modules": targets})
    assert passed(preflight.quantized, built) == Result(
        "passed", "14 of 14 layers in 4 bits, computed in bfloat16", 14, 14
    )


def test_a_layer_that_is_left_wide(make: Make) -> None:
    built = make(**FOUR_BIT)
    attention = built.trainer.model.get_base_model().model.layers[1].self_attn
    attention.o_proj.base_layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    found = stopped(
        preflight.quantized, built, r"1 of 14 layers are not stored in 4 bits, .*layers\.1\.self_attn\.o_proj"
    )
    assert (found.value, found.limit) == (13, 14)


def test_all_layers_are_left_wide(make: Make) -> None:
    built = make()
    wanted = built.recipe.model_copy(update={"quantization": make(**FOUR_BIT).recipe.quantization})
    found = stopped(
        preflight.quantized, around(built.trainer.model, built.gates, recipe=wanted), "14 of 14 layers are not stored"
    )
    assert (found.value, found.limit) == (0, 14)


def test_4_bits_computed_in_another_dtype(make: Make) -> None:
    built = make(**FOUR_BIT)
    layers = [module for module in built.trainer.model.modules() if isinstance(module, Linear4bit)]
    layers[3].compute_dtype = torch.float32
    found = stopped(preflight.quantized, built, "compute in bfloat16, float32 instead of bfloat16")
    assert found.limit == "bfloat16"
    for layer in layers:
        layer.compute_dtype = torch.float32
    assert stopped(preflight.quantized, built, "compute in float32 instead of bfloat16").value == "float32"


def test_4_bits_computed_as_the_recipe_says(make: Make) -> None:
    built = make(model={"dtype": "bfloat16"}, quantization={"bnb_4bit_compute_dtype": "float32"})
    assert passed(preflight.quantized, built).said.endswith("computed in float32")


def test_experts_that_are_left_wide(make: Make, tmp_path: Path) -> None:
    standin.stand_in(make_recipe("dpo", Path("mixtral"), tmp_path), tmp_path / "mixtral")
    built = make(
        model={"name_or_path": str(tmp_path / "mixtral" / "model"), "dtype": "bfloat16"},
        quantization={},
        lora={"target_modules": ["q_proj"]},
    )
    wide = {name: p for name, p in built.trainer.model.named_parameters() if "experts" in name}
    assert {p.dtype for p in wide.values()} == {torch.bfloat16}
    found = stopped(preflight.quantized, built, "4 tensors of experts are not stored in 4 bits, such as .*gate_up_proj")
    assert (found.value, found.limit) == (0, 4)


def test_a_convolution_is_no_expert() -> None:
    """Models with state-space or linear attention layers have one in each of them."""
    assert preflight.experts(nn.Conv1d(8, 8, 4, groups=8)) == []


# --- trainable ----------------------------------------------------------------------------------------------------


def test_what_is_trained_is_counted(make: Make) -> None:
    """Rank 4 on layers of 64 x 64 (two), 64 x 32 (two), 64 x 128 (two) and 128 x 64, in two blocks."""
    weights = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert passed(preflight.trainable, make()) == Result(
        "passed", f"{weights:,} weights in 28 tensors, float32", weights
    )
    assert weights == 8192


def test_nothing_is_trained(make: Make) -> None:
    built = make()
    built.trainer.model.requires_grad_(False)
    assert stopped(preflight.trainable, built, "no weight of the model is trained").value == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_tensor_is_trained_in_16_bits(make: Make, dtype: torch.dtype) -> None:
    built, short = make(), str(dtype).removeprefix("torch.")
    parameter = next(p for p in built.trainer.model.parameters() if p.requires_grad)
    parameter.data = parameter.data.to(dtype)
    found = stopped(preflight.trainable, built, f"1 of 28 trained tensors are {short}")
    assert (found.value, found.limit) == (short, "float32")


def test_frozen_weights_may_have_16_bits(make: Make) -> None:
    built = make(model={"dtype": "bfloat16"})
    assert torch.bfloat16 in {p.dtype for p in built.trainer.model.parameters()}
    passed(preflight.trainable, built)
