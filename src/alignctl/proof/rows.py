"""The rows that a run is evaluated on: those that it held out, or others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy

from alignctl import formats
from alignctl.errors import AlignctlError, DataError, Problem
from alignctl.formats import Canonical
from alignctl.proof.likelihood import Line, answered
from alignctl.proof.trained import Trained
from alignctl.recipe.schema import Recipe, Source
from alignctl.train import data, files, sources
from alignctl.train.data import Rows

HELD_OUT = "held-out"
_LOOKED_AT = 100


@dataclass(frozen=True)
class Asked:
    """Rows to evaluate on. `overlap` is how many training rows ask one of their prompts; None where it is not known."""

    name: str
    path: str
    rows: Rows
    overlap: int | None

    @property
    def pairs(self) -> bool:
        return "chosen_ids" in self.rows.id_columns

    @property
    def prompts(self) -> numpy.ndarray:
        """Which prompt each row asks, `[n]`: equal numbers are equal prompts."""
        return self.rows.column("key")

    def lines(self) -> list[tuple[Line, ...]]:
        """What is scored of each row: chosen and rejected answer, or all of its answers."""
        encoded = [self.rows.encoded(i) for i in range(len(self.rows))]
        if self.pairs:
            sides = ("chosen_ids", "rejected_ids")
            return [tuple(answered(row["prompt_ids"], row[side]) for side in sides) for row in encoded]
        return [(Line(row["input_ids"], row["labels"]),) for row in encoded]

    def questions(self, count: int) -> list[tuple[int, Canonical]]:
        """The first `count` rows that ask a prompt which none before them asked, with their numbers."""
        seen: set[int] = set()
        found: list[tuple[int, Canonical]] = []
        for i, key in enumerate(self.prompts.tolist()):
            if len(found) == count:
                break
            row = self.rows.canonical(i)
            if key not in seen and "text" not in row:
                seen.add(key)
                found.append((i, row))
        return found

    def described(self) -> dict[str, Any]:
        """As an evaluation holds it."""
        return {
            "path": self.path,
            "rows": len(self.rows),
            "prompts": len(numpy.unique(self.prompts)),
            "fingerprint": self.rows.fingerprint,
        }


def read(trained: Trained, given: str | None) -> Asked:
    """The rows that the run held out, or those of `given`, a path or hub name.

    Raises:
        DataError: none are left, or the held-out rows are no longer those of the run.
    """
    asked = _held_out(trained) if given is None else _other(trained, given)
    if not len(asked.rows):
        raise DataError(Problem(asked.path, "holds no row to evaluate on", "alignctl check says where they went"))
    return asked


def _held_out(trained: Trained) -> Asked:
    recipe = trained.recipe
    if recipe.data.eval is None and recipe.data.eval_fraction is None:
        raise DataError(Problem(str(trained.run.path), "held no rows out", "--data FILE names rows to evaluate on"))
    if recipe.data.eval is not None:
        rows = data.read(_reading(recipe, recipe.data.eval), trained.encoder)[0]
        path = ", ".join(source.path for source in recipe.data.eval)
    else:
        _, held_out = data.read(recipe, trained.encoder)
        assert held_out is not None
        rows, path = held_out, f"{recipe.data.eval_fraction:g} of the prompts of data.train"
    then = trained.run.record.get("data", {}).get("eval", {}).get("fingerprint")
    if then not in (None, rows.fingerprint if len(rows) else None):
        what, way_out = "is not what the run held out", "put the old file back, or name rows with --data"
        raise DataError(Problem(path, what, way_out))
    return Asked(HELD_OUT, path, rows, 0)


def _other(trained: Trained, given: str) -> Asked:
    path = str(Path(given).expanduser().absolute()) if Path(given).expanduser().exists() else given
    recipe, source = trained.recipe, Source(path=path)
    if recipe.method == "sft" and _holds_pairs(source):
        recipe = Recipe.model_validate(recipe.model_dump(exclude={"sft"}) | {"dpo": {}})
    rows = data.read(_reading(recipe, [source]), trained.encoder)[0]
    word = hashlib.sha256(path.encode()).hexdigest()[:6]
    return Asked(f"{Path(path).name.split('.')[0]}-{word}", path, rows, _overlap(trained, rows))


def _reading(recipe: Recipe, given: list[Source]) -> Recipe:
    """`recipe` with `given` as its rows, and none held out."""
    changes = {"train": given, "eval": None, "eval_fraction": None}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def _holds_pairs(source: Source) -> bool:
    if not sources.is_local(source.path):
        return False
    raw = [row for file in sources.files(source) for row in islice(files.rows(file), _LOOKED_AT)]
    return any(shape.matches(row.values) for shape in formats.PREFERENCE for row in raw)


def _overlap(trained: Trained, rows: Rows) -> int | None:
    """Training rows that ask a prompt of `rows`; None where the training rows are gone."""
    try:
        train, _ = data.read(trained.recipe, trained.encoder)
    except AlignctlError:
        return None
    return int(numpy.isin(train.column("key"), rows.column("key")).sum())
