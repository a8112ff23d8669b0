"""What to change when a run does not fit, in order of least harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignctl.recipe.schema import Recipe

Changes = dict[str, Any]
_SHORTEST = 256
_FOUR_BITS = {"load_in_4bit": True}
_ADAPTER = {"r": 16, "lora_alpha": 32}


@dataclass(frozen=True)
class Fix:
    """One change: the keys, what it costs, and the bytes that are needed with it and all those before it."""

    changes: Changes
    cost: str
    needed: int

    def __str__(self) -> str:
        return " ".join(f"{key}={_text(value)}" for key, value in self.changes.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(each)}" for key, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def until_it_fits(recipe: Recipe, memory: int, needs: Callable[[Recipe], int]) -> list[Fix]:
    """Changes, each on top of those before it, until the recipe `needs` no more than `memory`, or none is left.

    A change that saves nothing is left out.
    """
    out: list[Fix] = []
    least = needs(recipe)
    for change, cost in _IN_ORDER:
        while least > memory and (changes := change(recipe)):
            changed = changed_by(recipe, changes)
            needed = needs(changed)
            if needed >= least:
                break
            out.append(Fix(changes, cost, needed))
            recipe, least = changed, needed
    return out


def changed_by(recipe: Recipe, changes: Changes) -> Recipe:
    """`recipe` with `changes`."""
    values = recipe.model_dump(exclude_none=True)
    for dotted, value in changes.items():
        section, _, key = dotted.partition(".")
        values[section] = {**values.get(section, {}), key: value} if key else value
    return Recipe.model_validate(values)


def together(fixes: list[Fix]) -> Changes:
    """All changes as one."""
    return {key: value for fix in fixes for key, value in fix.changes.items()}


def _recomputed(recipe: Recipe) -> Changes:
    done = recipe.training.gradient_checkpointing is True
    return {} if done else {"training.gradient_checkpointing": True}


def _smaller_batch(recipe: Recipe) -> Changes:
    """The next smaller batch that makes the same update with more passes."""
    batch, passes = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    smaller = next((size for size in range(batch // 2, 0, -1) if batch % size == 0), None)
    if smaller is None:
        return {}
    key = "training.gradient_accumulation_steps"
    return {"training.per_device_train_batch_size": smaller, key: passes * batch // smaller}


def _small_states(recipe: Recipe) -> Changes:
    adamw = "adamw" in recipe.training.optim and "8bit" not in recipe.training.optim
    return {"training.optim": "paged_adamw_8bit"} if adamw else {}


def _four_bits(recipe: Recipe) -> Changes:
    return {"quantization": _FOUR_BITS} if recipe.trains_adapter and recipe.quantization is None else {}


def _adapter(recipe: Recipe) -> Changes:
    return {} if recipe.trains_adapter else {"lora": _ADAPTER}


def _shorter(recipe: Recipe) -> Changes:
    half = recipe.data.max_length // 2
    return {"data.max_length": half} if half >= _SHORTEST else {}


_IN_ORDER = (
    (_recomputed, "the same result, about a third slower"),
    (_smaller_batch, "the same update, in more passes"),
    (_small_states, "the optimizer's moments in 8 bits"),
    (_adapter, "an adapter is trained instead of all weights; it wants about ten times the learning rate"),
    (_four_bits, "frozen weights are rounded to 4 bits"),
    (_shorter, "longer rows are dropped"),
)
