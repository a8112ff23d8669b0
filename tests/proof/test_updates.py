"""Single weights: rounded as in training, and updated as PEFT does it, also where a layer is stored transposed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from alignctl.proof import shards, updates
from alignctl.proof.shards import Checkpoint

SHAPES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}


def saved(kind: str, folder: Path) -> tuple[PreTrainedModel, Checkpoint]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=64, **SHAPES[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), shards.opened(str(folder), None)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_a_rounded_weight_is_the_loaded_one_bit_for_bit(
    tmp_path: Path, kind: str, quant_type: str, double: bool
) -> None:
    plain, source = saved(kind, tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double)
    kept = updates.four_bit(plain.config, config, trusted=False)
    given = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    assert len(kept) == {"llama": 14, "gpt2": 8}[kind] and "lm_head" not in kept
    for layer, transposed in kept.items():
        weight = source.read(str(source.find(f"{layer}.weight", plain.base_model_prefix)))
        found = updates.rounded(weight, config, torch.bfloat16, torch.device("cpu"), transposed=transposed)
        stored = loaded.get_submodule(layer).weight
        live = dequantize_4bit(stored.data, stored.quant_state)
        assert transposed == (kind == "gpt2")
        assert torch.equal(found, live.T if transposed else live)
        assert not torch.equal(found.float(), weight)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"c_attn": 32}}])
def test_a_layer_that_is_stored_transposed_is_updated(tmp_path: Path, more: dict) -> None:
    plain, source = saved("gpt2", tmp_path / "base")
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **more)
    live = get_peft_model(plain, adapter).eval()
    live.save_pretrained(tmp_path / "adapter")
    found = updates.updates(tmp_path / "adapter", plain.config, trusted=False)
    assert len(found.layers) == 8
    for layer in found.layers:
        name = str(source.find(f"{layer}.weight", "transformer"))
        adapted = live.get_base_model().get_submodule(layer)
        x = torch.randn(3, adapted.in_features)
        expected = adapted(x) - adapted.get_base_layer().bias
        assert torch.allclose(x @ found.merged(layer, source.read(name)), expected, atol=1e-5)
        assert not torch.allclose(x @ source.read(name), expected, atol=1e-2)


def test_a_model_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(updates.RecipeError, match=r"has no .safetensors weights"):
        shards.opened(str(tmp_path), None)
