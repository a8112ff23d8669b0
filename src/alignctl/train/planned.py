"""The plan of a run that is about to start: its model's own config, its own rows, its own device."""

from __future__ import annotations

from transformers import Trainer

from alignctl.errors import RecipeError
from alignctl.plan import estimate, shape
from alignctl.plan.estimate import Plan, Target
from alignctl.recipe.schema import Recipe
from alignctl.train import lengths
from alignctl.train.data import Rows
from alignctl.train.parts import Parts, engine


def plan(recipe: Recipe, parts: Parts, trainer: Trainer, rows: Rows) -> Plan | None:
    """What the run will take; None for an architecture whose config has other names for its sizes."""
    try:
        of = shape.of(trainer.model.config.to_dict())
    except RecipeError:
        return None
    precision, packed = str(parts.precision).removeprefix("torch."), engine(recipe, trainer) == "packed"
    target = Target(cuda=parts.machine.kind == "cuda", dtype=precision, packed=packed)
    return estimate.of(recipe, of, lengths.of(recipe, rows), target)
