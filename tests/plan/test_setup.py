"""How a recipe holds and trains its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignctl.plan import setup
from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape
from alignctl.recipe.schema import Recipe

Made = Callable[..., Setup]
PLAIN = {"lora": None, "quantization": None}


def test_what_is_trained(made: Made) -> None:
    assert made().trains == "adapter on 4 bits" and made(quantization=None).trains == "adapter"
    assert made(**PLAIN).trains == "all"


def test_formats(made: Made) -> None:
    half, whole = made(), made(model={"dtype": "float32"})
    assert (half.compute, half.stored, half.autocast) == (2, 2, True)
    assert (whole.compute, whole.stored, whole.autocast) == (4, 4, False)
    assert (made(**PLAIN).compute, made(**PLAIN).stored) == (2, 4)


def test_the_reference(made: Made) -> None:
    assert made().reference == "adapter off" and made(**PLAIN).reference == "second model"
    assert made(model={"adapter": "runs/x"}).reference == "second adapter"
    assert made(method="orpo").reference == made(method="sft").reference == "none"


def test_layers_with_an_adapter(made: Made) -> None:
    assert len(made().targets) == 6
    named = made(lora={"target_modules": ["q_proj", "fc2"], "r": 4, "use_dora": True})
    assert ([each.name for each in named.targets], named.rank, named.dora) == (["q_proj", "fc2"], 4, True)


def test_an_adapter_that_training_goes_on_from(made: Made, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"r": 64, "target_modules": ["dense"]}
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = made(model={"adapter": str(tmp_path)}, lora=None)
    assert (found.rank, [each.name for each in found.targets]) == (64, ["dense"])


def test_an_adapter_that_is_not_there_yet(
    made: Made, recipe: Callable[..., Recipe], packaged: Callable[[str], Shape]
) -> None:
    found = recipe(model={"adapter": "runs/later"}, lora=None)
    (note,) = setup.notes(found, packaged("microsoft/phi-2"))
    assert note == "runs/later is not there yet: planned as an adapter of r 16 on every linear layer"
    assert made(model={"adapter": "runs/later"}, lora=None).rank == 16


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "on_cpu"), [("auto", True, False), (True, True, True), (False, False, False)]
)
def test_recomputed_activations(
    recipe: Callable[..., Recipe], packaged: Callable[[str], Shape], wanted: bool | str, on_gpu: bool, on_cpu: bool
) -> None:
    made = recipe(training={"gradient_checkpointing": wanted})
    found = [setup.of(made, packaged("microsoft/phi-2"), cuda=cuda) for cuda in (True, False)]
    assert [each.checkpointing for each in found] == [on_gpu, on_cpu]
    assert [each.optimizer for each in found] == ["paged_adamw_8bit", "adamw_torch"]
