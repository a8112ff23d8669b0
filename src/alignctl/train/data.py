"""The recipe's `data` section to encoded training and held-out rows, with a ledger of every row."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
from datasets import Dataset

from alignctl import formats
from alignctl.errors import DataError, Problem
from alignctl.formats import Canonical, Message
from alignctl.recipe.schema import Data, Recipe, Source
from alignctl.train import sources, tokens
from alignctl.train.sources import RawRow
from alignctl.train.tokens import Encoder

PERCENTILES = (5, 50, 95, 100)


@dataclass
class Ledger:
    """How many rows came in, and where each of them went."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        return sum(map(len, self.dropped.values()))

    def summary(self) -> dict[str, Any]:
        """As ledger.json holds it: counts, and the first three rows of each reason."""
        reasons = {
            reason: {"rows": len(places), "first": places[:3]}
            for reason, places in sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        }
        return {"rows": self.rows, "kept": self.kept, "dropped": reasons, "formats": dict(self.formats)}


@dataclass(frozen=True)
class Rows:
    """Canonical rows and, side by side, their ids."""

    canonical: list[Canonical]
    encoded: list[dict[str, list[int]]]
    ledger: Ledger

    def dataset(self) -> Dataset:
        return Dataset.from_list(self.encoded)

    def summary(self) -> dict[str, Any]:
        """The ledger with length percentiles, the supervised share, and a fingerprint of the ids."""
        if not self.encoded:
            return self.ledger.summary()
        columns = [c for c in self.encoded[0] if c != "labels"]
        lengths = {c.removesuffix("_ids"): [len(row[c]) for row in self.encoded] for c in columns}
        total = sum(sum(values) for values in lengths.values())
        return self.ledger.summary() | {
            "tokens": {
                name: {f"p{p}": int(numpy.percentile(values, p)) for p in PERCENTILES}
                for name, values in lengths.items()
            },
            "supervised_share": round(sum(map(tokens.supervised, self.encoded)) / total, 4),
            "fingerprint": hashlib.sha256(json.dumps(self.encoded).encode()).hexdigest(),
        }


def prompt_key(row: Canonical) -> str:
    """The prompt of a row, without case and spacing; rows with one key stay on one side of a split."""
    messages: list[Message] = row.get("prompt") or [m for m in row["messages"] if m["role"] != "assistant"]
    return " ".join(" ".join(m["content"] for m in messages).lower().split())


def prepare(recipe: Recipe, encoder: Encoder) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows.

    Raises:
        DataError: a row cannot be read, or too many rows are dropped.
    """
    data = recipe.data
    train = _read(data.train, recipe.method)
    held_out = _read(data.eval, recipe.method) if data.eval else []
    if data.eval_fraction:
        train, held_out = _split(train, data.eval_fraction, recipe.training.seed)
    encode = _Encode(encoder, data, tokens.dialogue if recipe.method == "sft" else tokens.pair)
    eval_rows = encode(held_out, set()) if held_out else None
    train_rows = encode(train, {prompt_key(row) for _, row, _ in held_out})
    for part, rows in (("data.train", train_rows), ("data.eval", eval_rows)):
        if rows is not None:
            _check(part, rows.ledger, data)
    return train_rows, eval_rows


Read = tuple[RawRow, Canonical, str]


def _read(given: list[Source], method: str) -> list[Read]:
    out: list[Read] = []
    for source in given:
        rows = sources.read(source)
        try:
            shape = formats.detect(rows[0].values, preference=method != "sft" or source.answer is not None)
        except formats.RowError as error:
            hint = "; for a preference set, `answer: chosen`" if method == "sft" else ""
            raise DataError(Problem(rows[0].place, str(error), f"rename the columns{hint}")) from error
        canonical = [_canonical(shape, row) for row in rows]
        if method == "sft" and source.answer is not None:
            canonical = [formats.chosen_dialogue(row) for row in canonical]
        out += [(raw, row, shape.name) for raw, row in zip(rows, canonical, strict=True)]
    return out


def _canonical(shape: formats.Format, row: RawRow) -> Canonical:
    try:
        return shape.read(row.values)
    except formats.RowError as error:
        raise DataError(
            Problem(row.place, str(error), f"the first row has the format “{shape.name}”; mend or remove this one")
        ) from error


def _split(rows: list[Read], fraction: float, seed: int) -> tuple[list[Read], list[Read]]:
    keys = sorted({prompt_key(row) for _, row, _ in rows})
    random.Random(seed).shuffle(keys)
    held = set(keys[: max(1, round(fraction * len(keys)))])
    if len(held) == len(keys):
        what = f"{fraction} of {len(keys)} different prompts leaves none to train on"
        raise DataError(Problem("data.eval_fraction", what, "lower it, or name `data.eval`"))
    return [r for r in rows if prompt_key(r[1]) not in held], [r for r in rows if prompt_key(r[1]) in held]


@dataclass(frozen=True)
class _Encode:
    encoder: Encoder
    data: Data
    rule: Callable[[Encoder, Canonical, int], dict[str, list[int]]]

    def __call__(self, rows: list[Read], held_out: set[str]) -> Rows:
        out = Rows([], [], Ledger(rows=len(rows)))
        for raw, row, shape in rows:
            out.ledger.formats[shape] += 1
            try:
                if held_out and prompt_key(row) in held_out:
                    raise tokens.Dropped("prompt is in the held-out rows")
                encoded = self.rule(self.encoder, row, self.data.max_length)
            except tokens.Dropped as dropped:
                out.ledger.dropped[dropped.reason].append(raw.place)
                continue
            out.canonical.append(row)
            out.encoded.append(encoded)
        out.ledger.kept = len(out.encoded)
        return out


def _check(part: str, ledger: Ledger, data: Data) -> None:
    overlong = ledger.dropped.get("longer than max_length", [])
    if overlong and data.overlong == "error":
        raise DataError(
            Problem(
                part,
                f"rows longer than {data.max_length} tokens: {len(overlong)} (first: {', '.join(overlong[:3])})",
                "raise data.max_length, or data.overlong=drop",
            )
        )
    if ledger.kept and ledger.lost <= data.max_dropped * ledger.rows:
        return
    worst = sorted(ledger.dropped.items(), key=lambda item: -len(item[1]))[:3]
    reasons = "; ".join(f"{reason}: {len(rows)} (first: {', '.join(rows[:3])})" for reason, rows in worst)
    much = f"more than data.max_dropped ({data.max_dropped:.0%})" if ledger.kept else "so none is left"
    raise DataError(
        Problem(
            part,
            f"{ledger.lost} of {ledger.rows} rows would be dropped, {much}: {reasons}",
            "mend the rows, or raise data.max_length or data.max_dropped",
        )
    )
