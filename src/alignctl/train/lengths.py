"""How long the rows are, for their plan."""

from __future__ import annotations

from collections.abc import Iterable

from alignctl.plan.data import Lengths, Row
from alignctl.recipe.schema import Recipe
from alignctl.train.data import Rows


def of(recipe: Recipe, rows: Rows) -> Lengths:
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
