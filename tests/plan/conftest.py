"""Shapes and setups that the tests of the plan share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignctl.plan import config, setup, shape
from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape
from alignctl.recipe.schema import Recipe

PHI, MISTRAL = "microsoft/phi-2", "mistralai/Mistral-7B-v0.1"


@pytest.fixture
def packaged() -> Callable[[str], Shape]:
    """The shape of a model in the packaged table."""
    return lambda name: shape.of(config.packaged()[name])


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """A QLoRA recipe for DPO of Phi-2; sections are merged in, None takes one away."""

    def build(method: str = "dpo", **sections: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"name_or_path": PHI, "dtype": "bfloat16"},
            "quantization": {},
            "lora": {},
            "data": {"train": [{"path": "none"}]},
            "training": {"learning_rate": 1e-4, "optim": "paged_adamw_8bit"},
            method: {},
        }
        for name, section in sections.items():
            values[name] = None if section is None else {**values.get(name, {}), **section}
        return Recipe.model_validate({name: section for name, section in values.items() if section is not None})

    return build


@pytest.fixture
def made(recipe: Callable[..., Recipe], packaged: Callable[[str], Shape]) -> Callable[..., Setup]:
    """The setup of such a recipe."""
    return lambda name=PHI, method="dpo", **sections: setup.of(recipe(method, **sections), packaged(name))
