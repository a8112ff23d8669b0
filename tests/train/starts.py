"""What a gate before the first step is asked with, and what it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from alignctl.errors import DivergedError
from alignctl.recipe.schema import Recipe
from alignctl.train.gates import Gates, Result
from alignctl.train.preflight import Built

LONG = (2, 5)
ROWS = [
    {
        "prompt": f"What is {i} plus one?" + " Think about it first, and then answer." * (i in LONG),
        "chosen": f"It is {i + 1}." * (i + 1),
        "rejected": f"Perhaps {i}, or so.",
    }
    for i in range(6)
]


def make_recipe(method: str, base: Path, rows: Path, **sections: Any) -> Recipe:
    """An adapter of rank 4 in float32, trained with four rows a pass; sections are merged in, None takes one away."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": [{"path": str(rows), **({"answer": "chosen"} if method == "sft" else {})}]},
        "training": {"learning_rate": 1e-4},
        method: {},
    }
    for name, section in sections.items():
        values[name] = None if section is None else {**values.get(name, {}), **section}
    return Recipe.model_validate({name: section for name, section in values.items() if section is not None})


def around(model: nn.Module, gates: Gates, **values: Any) -> Any:
    """What a gate sees that looks at the model alone."""
    return SimpleNamespace(trainer=SimpleNamespace(model=model), gates=gates, **values)


def shift(model: nn.Module, part: str, *, by: float = 0.1) -> None:
    """Add random numbers to the weights whose name holds `part`."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in [p for name, p in model.named_parameters() if part in name]:
            parameter.add_(torch.randn_like(parameter) * by)


def stopped(gate: Callable[[Built], None], built: Any, said: str) -> Result:
    """What `gate` left when it stopped the run saying `said`."""
    with pytest.raises(DivergedError, match=said) as error:
        gate(built)
    found: Result = built.gates.results[gate.__name__]
    assert found.verdict == "stopped" and str(error.value).startswith(f"gate.{gate.__name__}: {found.said} — ")
    return found


def passed(gate: Callable[[Built], None], built: Any) -> Result:
    """What `gate` left when it found nothing."""
    gate(built)
    found: Result = built.gates.results[gate.__name__]
    assert found.verdict == "passed"
    return found
