"""Bytes of what stays, beside the modules and optimizers that hold it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from alignctl.plan import shape, weights
from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape

PHI, MISTRAL = "microsoft/phi-2", "mistralai/Mistral-7B-v0.1"


def held(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("size", [(64, 96), (100, 128), (2560, 640)])
@pytest.mark.parametrize("double", [True, False])
def test_four_bits_to_the_byte(size: tuple[int, int], double: bool) -> None:
    layer = Linear4bit(size[1], size[0], bias=False, compute_dtype=torch.bfloat16)
    data = torch.randn(size, dtype=torch.bfloat16)
    layer.weight = Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=double)
    state = layer.to("cpu").weight.quant_state
    parts = [layer.weight, state.absmax, state.code]
    if double:
        parts += [state.offset, state.state2.absmax, state.state2.code]
    assert sum(part.nbytes for part in parts) == weights.nf4(size[0] * size[1], double=double)


def test_four_bits_by_hand(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    """A matrix of n weights: n/2 + n/64 + 4·n/(64·256) + 1024 + 4 + 64."""
    assert weights.nf4(2560 * 2560, double=True) == 3_276_800 + 102_400 + 1_600 + 1_092
    phi, mistral = packaged(PHI), packaged(MISTRAL)
    square, wide = 3_381_892, 2560 * 10240 // 2 + 409_600 + 6_400 + 1_092
    rest = 2_779_683_840 - 32 * 78_643_200
    assert weights.base(phi, made()) == {
        "weights in 4 bits": 32 * (4 * square + 2 * wide),
        "embeddings, head, norms": 2 * rest,
    }
    matrices = 4096 * 4096 * 2 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    four = matrices // 2 + matrices // 64 + matrices // 4096 + 7 * 1_092
    assert weights.base(mistral, made(MISTRAL))["weights in 4 bits"] == 32 * four


def small(**changes: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes))


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters(made: Callable[..., Setup], targets: str | list[str], dora: bool) -> None:
    plain = small()
    of = shape.of(plain.config.to_dict())
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=6, target_modules=targets, use_dora=dora))
    chosen = [each for each in of.linears() if targets == "all-linear" or each.name in targets]
    how = replace(made(), rank=6, targets=tuple(chosen), dora=dora)
    assert sorted(weights.adapters(how, 2)) == sorted(p.numel() for p in model.parameters() if p.requires_grad)


def stepped(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter]) -> list[Tensor]:
    """The optimizer's state after a step: what it holds beside counters and code books."""
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    names = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
    return [state[name] for state in optimizer.state.values() for name in names if name in state]


SIZES = [16, 4096, 5000, 70_000]


def test_the_state_of_adamw() -> None:
    tensors = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    found = stepped(torch.optim.AdamW(tensors), tensors)
    assert held(found) == weights.states(SIZES, "adamw_torch")[0] == 8 * sum(SIZES)


def test_the_state_of_adamw_in_8_bits() -> None:
    tensors = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    optimizer = AdamW8bit(tensors)
    for index, tensor in enumerate(tensors):
        optimizer.init_state(optimizer.param_groups[0], tensor, 0, index)
    names = ("state1", "state2", "absmax1", "absmax2")
    found = [state[name] for state in optimizer.state.values() for name in names if name in state]
    assert held(found) == weights.states(SIZES, "adamw_8bit")[0]
    # In float32 below 4,096 numbers; else a byte and, for 256 of them, a float32; both twice.
    assert held(found) == 8 * 16 + 2 * (4096 + 4 * 16) + 2 * (5000 + 4 * 20) + 2 * (70_000 + 4 * 274)


def test_paged_states_are_apart_where_they_are_large() -> None:
    assert weights.states([99_999, 100_000], "paged_adamw_32bit") == (8 * 99_999, 8 * 100_000)
    assert weights.states([99_999, 100_000], "adamw_torch") == (8 * 199_999, 0)
    assert weights.states([1000], "sgd") == (0, 0) and weights.states([1000], "lion_32bit") == (4000, 0)


def test_all_trained_tensors_are_all_parameters(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    phi = packaged(PHI)
    assert sum(weights.trained(phi, made(lora=None, quantization=None))) == phi.parameters()
