"""The recipe's `data` section to encoded training and held-out rows, with a ledger of every row."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from alignctl.errors import DataError, Problem
from alignctl.formats import Canonical
from alignctl.recipe.schema import Recipe, Source
from alignctl.train import tokens
from alignctl.train.encode import PAIR_COLUMNS, ROW_COLUMNS, EncodedSource, encode
from alignctl.train.ledger import FIRST, HELD_OUT, OVERWEIGHT, Ledger, Places, by_count, check
from alignctl.train.tokens import Encoder

PERCENTILES = (5, 50, 95, 99, 100)
# Bars of a histogram of lengths.
BINS = 40
Ids = dict[str, list[int]]


@dataclass(frozen=True)
class Rows:
    """Encoded rows: `order[i]` is the number of row i in the `table` of all sources, which stays on disk."""

    table: pyarrow.Table
    order: numpy.ndarray
    ledger: Ledger
    sources: Sequence[EncodedSource]

    def __len__(self) -> int:
        return len(self.order)

    @property
    def id_columns(self) -> tuple[str, ...]:
        return PAIR_COLUMNS if "chosen_ids" in self.table.column_names else ROW_COLUMNS

    def column(self, name: str) -> numpy.ndarray:
        """The numbers in a column, in the order of the rows."""
        return self.table[name].to_numpy()[self.order]

    def lengths(self, name: str) -> numpy.ndarray:
        """How many ids each row has in the column `name`."""
        return pyarrow.compute.list_value_length(self.table[name]).to_numpy()[self.order]

    def sizes(self) -> numpy.ndarray:
        """How many ids each row has: prompt, chosen and rejected together, or its one sequence."""
        columns = self.id_columns if "labels" not in self.id_columns else self.id_columns[:1]
        return numpy.sum([self.lengths(name) for name in columns], axis=0)

    def longest(self) -> int:
        """The row with the most ids."""
        return int(self.sizes().argmax())

    def encoded(self, i: int) -> Ids:
        """The ids of row `i`."""
        return self.table.select(self.id_columns).slice(self.order[i], 1).to_pylist()[0]

    def canonical(self, i: int) -> Canonical:
        """Row `i` as messages."""
        out: Canonical = json.loads(self.table["canonical"][int(self.order[i])].as_py())
        return out

    def place(self, i: numpy.integer | int) -> str:
        """Where row `i` stands in its source."""
        return str(self.table["place"][int(self.order[i])].as_py())

    def some(self, numbers: Sequence[int]) -> Rows:
        """The rows `numbers` alone."""
        return Rows(self.table, self.order[list(numbers)], self.ledger, self.sources)

    def find(self, place: str) -> int | None:
        """The first row that stands at `place`."""
        numbers = numpy.flatnonzero(pyarrow.compute.equal(self.table["place"], place).to_numpy())
        found = numpy.flatnonzero(numpy.isin(self.order, numbers))
        return int(found[0]) if len(found) else None

    def dataset(self, more: Mapping[str, numpy.ndarray] | None = None) -> Any:
        """The ids as a `datasets.Dataset`, read from disk when they are asked for; and `more` columns of numbers."""
        from datasets import Dataset
        from datasets.table import InMemoryTable

        table = self.table.select(self.id_columns)
        for name, values in (more or {}).items():
            column = numpy.zeros(table.num_rows, dtype=values.dtype)
            column[self.order] = values
            table = table.append_column(name, pyarrow.array(column))
        whole = Dataset(InMemoryTable(table), fingerprint=self.fingerprint)
        return whole.select(self.order, new_fingerprint=f"{self.fingerprint[:32]}-ordered")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the ids of every row, in order."""
        return hashlib.sha256(self.column("digest").tobytes()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """As ledger.json holds it: the ledger, and what can be counted over the kept rows."""
        out = self.ledger.summary() | {"sources": [_source(part) for part in self.sources]}
        if not len(self):
            return out
        lengths = {name: self.lengths(name) for name in self.id_columns if name != "labels"}
        total = int(sum(values.sum() for values in lengths.values()))
        out |= {
            "cut": by_count(self.cut()),
            "duplicates": vars(self.duplicates()),
            "near_duplicates": vars(self.near_duplicates()),
            "tokens": {name.removesuffix("_ids"): _percentiles(values) for name, values in lengths.items()},
            "lengths": _histogram({name.removesuffix("_ids"): values for name, values in lengths.items()}),
            "supervised_share": round(int(self.column("supervised").sum()) / total, 4),
            "fingerprint": self.fingerprint,
        }
        if "chosen_ids" in lengths:
            longer = float(numpy.mean(lengths["chosen_ids"] > lengths["rejected_ids"]))
            out |= {"chosen_longer": round(longer, 4), "ties": vars(self.ties())}
            out["same_words"] = vars(self.same_words())
        return out

    def cut(self) -> dict[str, Places]:
        """Rows of which a part was left out to make them fit."""
        reasons = self.column("cut")
        return {str(reason): self.places(reasons == reason) for reason in numpy.unique(reasons) if reason}

    def duplicates(self) -> Places:
        """Rows with the ids of an earlier one."""
        return self.places(_repeated(self.column("digest")))

    def near_duplicates(self) -> Places:
        """Rows that say what an earlier one says but for case, punctuation and spacing."""
        return self.places(_repeated(self.column("likeness")) & ~_repeated(self.column("digest")))

    def same_words(self) -> Places:
        """Pairs whose answers differ in case, punctuation and spacing only."""
        return self.places(self.column("same_words"))

    def ties(self) -> Places:
        """Rows whose scores are equal."""
        return self.places(self.column("score_gap") == 0)

    def places(self, which: numpy.ndarray) -> Places:
        """How many rows `which` (a mask over the rows) holds, and the first of them."""
        found = numpy.flatnonzero(which)
        return Places(len(found), [self.place(i) for i in found[:FIRST]])


def _repeated(values: numpy.ndarray) -> numpy.ndarray:
    """True where a value stood earlier in `values`."""
    out = numpy.ones(len(values), dtype=bool)
    out[numpy.unique(values, return_index=True)[1]] = False
    return out


def _percentiles(values: numpy.ndarray) -> dict[str, int]:
    return {f"p{p}": int(numpy.percentile(values, p)) for p in PERCENTILES}


def _histogram(lengths: dict[str, numpy.ndarray]) -> dict[str, Any]:
    """How many rows have how many tokens: counts between the same whole `edges` for every side, and the means."""
    longest = max(int(values.max()) for values in lengths.values())
    width = max(1, -(-longest // BINS))
    edges = numpy.arange(0, longest + width + 1, width)
    return {
        "edges": edges.tolist(),
        "counts": {side: numpy.histogram(values, edges)[0].tolist() for side, values in lengths.items()},
        "mean": {side: round(float(values.mean()), 2) for side, values in lengths.items()},
    }


def _source(part: EncodedSource) -> dict[str, Any]:
    return {"path": part.path, "format": part.shape.name, **part.ledger.summary(), "cache": part.cache}


def prepare(recipe: Recipe, encoder: Encoder) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows.

    Raises:
        DataError: a row cannot be read, or too many rows are dropped.
        MachineError: the hub cannot be reached, or the cache cannot be written.
    """
    train, held_out = read(recipe, encoder)
    check_lost(recipe, train, held_out)
    return train, held_out


def check_lost(recipe: Recipe, train: Rows, held_out: Rows | None) -> None:
    """Stop when more rows are dropped than the recipe allows.

    Raises:
        DataError: too many are, or none is left.
    """
    for part, rows in (("data.train", train), ("data.eval", held_out)):
        if rows is not None:
            check(part, rows.ledger, recipe.data, tokens.OVERLONG)


def read(recipe: Recipe, encoder: Encoder) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows, however many are dropped."""
    data = recipe.data
    train = _mixed(recipe, encoder, data.train)
    if data.eval:
        held_out = _mixed(recipe, encoder, data.eval)
        return _disjoint(train, held_out), held_out
    if data.eval_fraction and len(train):
        return _split(train, data.eval_fraction, recipe.training.seed)
    return train, None


def _mixed(recipe: Recipe, encoder: Encoder, given: list[Source]) -> Rows:
    """The rows of every source: by weight where there are weights, shuffled where there are several sources."""
    parts = [encode(source, recipe.method, encoder, recipe.data, recipe.training.seed) for source in given]
    total = Ledger()
    for part in parts:
        total.add(part.ledger)
    shuffle = random.Random(recipe.training.seed)
    order, start = [], 0
    for part, size in zip(parts, _sizes(given, [part.table.num_rows for part in parts]), strict=True):
        numbers = range(start, start + part.table.num_rows)
        order += sorted(shuffle.sample(numbers, size))
        start += part.table.num_rows
    if len(parts) > 1:
        shuffle.shuffle(order)
    total.set_aside(OVERWEIGHT, [], total.kept - len(order))
    total.kept = len(order)
    table = pyarrow.concat_tables([part.table for part in parts])
    return Rows(table, numpy.array(order, dtype=numpy.int64), total, parts)


def _sizes(given: list[Source], rows: list[int]) -> list[int]:
    """How many rows of each source are taken: all, or as many as keep the weights."""
    weights = [source.weight for source in given if source.weight is not None]
    if not weights:
        return rows
    scale = min(n / weight for n, weight in zip(rows, weights, strict=True))
    return [min(n, round(weight * scale)) for n, weight in zip(rows, weights, strict=True)]


def _disjoint(train: Rows, held_out: Rows) -> Rows:
    """`train` without the prompts of `held_out`."""
    seen = numpy.isin(train.column("key"), held_out.column("key"))
    if not seen.any():
        return train
    found = train.places(seen)
    train.ledger.drop("prompt is in the held-out rows", [train.place(i) for i in numpy.flatnonzero(seen)])
    train.ledger.kept -= found.rows
    return Rows(train.table, train.order[~seen], train.ledger, train.sources)


def _split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """`rows` in two, so that no prompt stands on both sides."""
    keys = sorted({int(key) for key in rows.column("key")})
    random.Random(seed).shuffle(keys)
    held = keys[: max(1, round(fraction * len(keys)))]
    if len(held) == len(keys):
        what = f"{fraction} of {len(keys)} different prompts leaves none to train on"
        raise DataError(Problem("data.eval_fraction", what, "lower it, or name `data.eval`"))
    out = numpy.isin(rows.column("key"), held)
    count = int(out.sum())
    formats = rows.ledger.formats
    held_out = Rows(rows.table, rows.order[out], Ledger(rows=count, kept=count, formats=formats), rows.sources)
    rows.ledger.set_aside(HELD_OUT, [], count)
    rows.ledger.kept -= count
    return Rows(rows.table, rows.order[~out], rows.ledger, rows.sources), held_out
