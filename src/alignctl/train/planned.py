"""The plan of a run that is about to start: its model's own config, its own rows, its own device."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import Trainer

from alignctl.errors import RecipeError
from alignctl.plan import estimate, shape
from alignctl.plan.data import Lengths, Row
from alignctl.plan.estimate import Plan, Target
from alignctl.recipe.schema import Recipe
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
    return estimate.of(recipe, of, lengths(recipe, rows), target)


def lengths(recipe: Recipe, rows: Rows) -> Lengths:
    """Of the rows themselves."""
    size = recipe.training.per_device_train_batch_size
    longest = [int(i) for i in rows.sizes().argsort(kind="stable")[::-1][:size]]
    columns = [rows.lengths(name) for name in rows.id_columns if name != "labels"]
    means = (round(float(column.mean())) for column in columns)
    return Lengths(tuple(_row(column[i] for column in columns) for i in longest), _row(means), len(rows), "the rows")


def _row(sides: Iterable[int]) -> Row:
    """Prompt, chosen and rejected, or all of a dialogue."""
    found = [int(side) for side in sides]
    return Row(0, *found) if len(found) == 1 else Row(*found)
