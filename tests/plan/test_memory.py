"""The peak, beside a step of the real modules on tensors without numbers, which live as they would on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import simulated
from transformers import LlamaConfig, MistralConfig, PhiConfig, PreTrainedConfig

from alignctl.plan import memory, shape
from alignctl.plan.activations import Batch
from alignctl.plan.memory import total
from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape

HOW = {"qlora": "adapter on 4 bits", "lora": "adapter", "full": "all"}
PHI, MISTRAL = "microsoft/phi-2", "mistralai/Mistral-7B-v0.1"


def config(name: str, layers: int) -> PreTrainedConfig:
    if name == "mistral":
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000, "num_key_value_heads": 8}
        return MistralConfig(**sizes, num_hidden_layers=layers)
    if name == "smollm":  # its head is its embeddings
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
        return LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=layers)
    made = PhiConfig(hidden_size=2560, intermediate_size=10240, vocab_size=51200, num_hidden_layers=layers)
    made.rope_parameters["partial_rotary_factor"] = 0.4
    return made


def check(
    made: Setup, name: str, how: str, *, checkpointing: bool, layers: int, pairs: int, prompt: int, answer: int
) -> None:
    real = config(name, layers)
    of = shape.of(real.to_dict())
    reference = "second model" if how == "full" else "adapter off"
    targets = () if how == "full" else tuple(of.linears())
    setup = replace(made, trains=HOW[how], rank=16, targets=targets, checkpointing=checkpointing, reference=reference)
    setup = replace(setup, optimizer="sgd", accumulates=False)
    sides = pairs * 2 * (prompt + answer)
    batch = Batch(2 * pairs, prompt + answer, pairs * (prompt + 2 * answer), sides, pairs * 2 * answer)
    plan = memory.of(of, setup, batch)
    step = simulated.step(
        real, how, pairs=pairs, prompt=prompt, answer=answer, checkpointing=checkpointing, reference=True
    )
    # Beside the model stand the ids of the batch, and the allocator rounds every tensor up: half a MiB at most.
    assert total(memory.standing(of, setup)) == pytest.approx(step.model, rel=1e-3, abs=2**19)
    # The allocator rounds up, so small tensors weigh more; all else is the plan's.
    assert plan.allocated == pytest.approx(step.model + max(step.forward, step.reference, step.backward), rel=0.035)


@pytest.mark.parametrize(
    ("name", "how", "checkpointing"),
    [("mistral", "qlora", True), ("phi", "qlora", True), ("phi", "qlora", False), ("mistral", "full", True)],
)
def test_the_peak_of_a_step(made: Callable[..., Setup], name: str, how: str, checkpointing: bool) -> None:
    check(made(), name, how, checkpointing=checkpointing, layers=2, pairs=2, prompt=256, answer=256)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "phi", "smollm"])
@pytest.mark.parametrize("how", ["qlora", "lora", "full"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("pairs", "prompt", "answer"), [(1, 128, 256), (4, 512, 512)])
def test_the_peak_of_larger_steps(
    made: Callable[..., Setup], name: str, how: str, checkpointing: bool, pairs: int, prompt: int, answer: int
) -> None:
    check(made(), name, how, checkpointing=checkpointing, layers=4, pairs=pairs, prompt=prompt, answer=answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "phi"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_peak_of_whole_models(made: Callable[..., Setup], name: str, checkpointing: bool) -> None:
    check(made(), name, "qlora", checkpointing=checkpointing, layers=32, pairs=4, prompt=512, answer=512)


BATCH = Batch(rows=8, longest=1024, tokens=6144, keys=8192, supervised=4096)


def peak(of: Shape, setup: Setup, batch: Batch = BATCH) -> int:
    return memory.of(of, setup, batch).allocated


def test_lines_are_the_peak(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    plan = memory.of(packaged(PHI), made(), BATCH)
    assert plan.allocated == max(map(total, plan.phases.values())) == total(plan.phases[plan.phase])
    assert all(line.bytes > 0 for lines in plan.phases.values() for line in lines)
    assert plan.needed == plan.allocated + 2**29 + round(0.05 * plan.allocated)


def test_what_saves_memory_saves_it(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    phi, setup = packaged(PHI), made()
    assert peak(phi, setup) < peak(phi, replace(setup, checkpointing=False))
    assert peak(phi, setup) < peak(phi, replace(setup, trains="adapter"))
    assert peak(phi, setup) < peak(phi, setup, replace(BATCH, tokens=8192))
    full = made(lora=None, quantization=None, training={"optim": "adamw_torch"})
    assert peak(phi, replace(full, reference="none")) == peak(phi, full) - 4 * phi.parameters()


def test_full_weights_by_hand(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    """In float32: weights, reference, gradients, two moments, and AdamW's roots of one of them, all at the step."""
    phi = packaged(PHI)
    plan = memory.of(phi, made(lora=None, quantization=None, training={"optim": "adamw_torch"}), BATCH)
    assert total(plan.phases["optimizer step"]) == 4 * phi.parameters() * (1 + 1 + 1 + 2 + 1)


def test_a_cpu_has_nothing_around(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    plan = memory.of(packaged(PHI), replace(made(), cuda=False), BATCH)
    assert plan.around == [] and plan.needed == plan.allocated
