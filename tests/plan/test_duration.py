"""Operations of a pass, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from alignctl.plan import duration, gpus
from alignctl.plan.activations import Batch
from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape
from alignctl.recipe.schema import Recipe

MISTRAL = "mistralai/Mistral-7B-v0.1"
BATCH = Batch(rows=2, longest=512, tokens=768, keys=1024, supervised=512)
MATRICES = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
ATTENTION = 4 * 32 * 4096 * 256  # a token sees half of 512 keys
HEAD = 2 * 512 * 32000 * 4096


def test_a_pass_of_dpo(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    once = 768 * (2 * MATRICES + ATTENTION)
    small = 768 * 2 * 41_943_040
    assert duration.work(packaged(MISTRAL), made(MISTRAL), BATCH).parts == {
        "forward": once + small + HEAD,
        "reference's pass": once + HEAD,
        "recomputed": once + small,
        "backward": once + 768 * ATTENTION + 2 * small + HEAD,
    }


def test_all_weights_take_a_third_product(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    full = replace(made(MISTRAL, "sft", lora=None, quantization=None), checkpointing=False)
    found = duration.work(packaged(MISTRAL), full, BATCH)
    once = 768 * (2 * MATRICES + ATTENTION)
    assert found.parts["backward"] == once + 768 * ATTENTION + 3 * HEAD
    assert found.parts["gradients of all weights"] == 768 * 2 * MATRICES
    assert list(found.parts) == ["forward", "backward", "gradients of all weights"]


def test_seconds(packaged: Callable[[str], Shape], made: Callable[..., Setup]) -> None:
    found = duration.work(packaged(MISTRAL), made(MISTRAL), BATCH)
    gpu = gpus.GPUS[0]
    assert duration.seconds(found, gpu) == pytest.approx(found.total / (0.3 * 97.5e12))
    assert duration.seconds(found, replace(gpu, efficiency=0.6)) == pytest.approx(found.total / (0.6 * 97.5e12))


@pytest.mark.parametrize(
    ("training", "rows", "passes"),
    [
        ({}, 9, 3),
        ({"num_train_epochs": 2.0}, 9, 6),
        ({"num_train_epochs": 0.5}, 16, 2),
        ({"max_steps": 5, "gradient_accumulation_steps": 3}, None, 15),
        ({}, None, None),
    ],
)
def test_passes(
    recipe: Callable[..., Recipe], training: dict[str, float], rows: int | None, passes: int | None
) -> None:
    assert duration.passes(recipe(training=training), rows) == passes
