"""What `check` and `inspect` share: a recipe's rows, encoded, with the libraries kept quiet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from alignctl import quiet
from alignctl.cli import signals
from alignctl.recipe import catalog
from alignctl.recipe.load import load
from alignctl.recipe.schema import Recipe

if TYPE_CHECKING:
    from alignctl.train.data import Rows
    from alignctl.train.tokens import Encoder


@dataclass(frozen=True)
class Opened:
    """A recipe's rows as the model will see them, and the stream to print to."""

    recipe: Recipe
    encoder: Encoder
    train: Rows
    held_out: Rows | None
    out: TextIO

    def parts(self) -> dict[str, Rows]:
        """The rows by their name in the ledger."""
        return {"train": self.train} | ({} if self.held_out is None else {"eval": self.held_out})


@contextlib.contextmanager
def opened(recipe: str, overrides: list[str] | None) -> Iterator[Opened]:
    """The rows of `recipe`, however many are dropped.

    Raises:
        AlignctlError: the recipe, its data or its tokenizer cannot be read.
    """
    loaded = load(catalog.find(recipe), overrides)
    with quiet.libraries(Path(os.devnull)) as out:
        from alignctl.train import data
        from alignctl.train.tokenizer import load_encoder
        from alignctl.train.translate import refused, translated

        signals.check()
        with translated():
            with refused():
                encoder = load_encoder(loaded.recipe)
            train, held_out = data.read(loaded.recipe, encoder)
            yield Opened(loaded.recipe, encoder, train, held_out, out)
