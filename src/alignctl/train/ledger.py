"""Where every row went: kept, dropped or set aside, each with its reason and the first rows that it met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from alignctl.errors import DataError, Problem
from alignctl.recipe.schema import Data

FIRST = 3
HELD_OUT = "held out by data.eval_fraction"
OVERWEIGHT = "more than the source's weight"
BY_CHOICE = (HELD_OUT, OVERWEIGHT)


@dataclass
class Places:
    """How many rows something happened to, and where the first of them stand."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, places: Iterable[str], rows: int | None = None) -> None:
        """Count `places`; `rows` is how many they stand for where not each is listed."""
        places = list(places)
        self.rows += len(places) if rows is None else rows
        self.first += places[: FIRST - len(self.first)]

    def __str__(self) -> str:
        return f"{self.rows} (first: {', '.join(self.first)})" if self.first else str(self.rows)


Reasons = dict[str, Places]


def _count(reasons: Reasons, reason: str, places: Iterable[str], rows: int | None = None) -> None:
    found = reasons.setdefault(reason, Places())
    found.add(places, rows)
    if not found.rows:
        del reasons[reason]


@dataclass
class Ledger:
    """Rows in = kept + dropped + set aside.

    Dropped rows break a rule, and too many of them stop the run; rows set aside are left out because the recipe or the
    shape of the set says so.
    """

    rows: int = 0
    kept: int = 0
    dropped: Reasons = field(default_factory=dict)
    aside: Reasons = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        return sum(places.rows for places in self.dropped.values())

    def drop(self, reason: str, places: Iterable[str]) -> None:
        _count(self.dropped, reason, places)

    def set_aside(self, reason: str, places: Iterable[str], rows: int | None = None) -> None:
        _count(self.aside, reason, places, rows)

    def add(self, other: Ledger) -> None:
        """Count the rows of `other` too."""
        self.rows += other.rows
        self.kept += other.kept
        for mine, theirs in ((self.dropped, other.dropped), (self.aside, other.aside)):
            for reason, places in theirs.items():
                _count(mine, reason, places.first, places.rows)
        for name, rows in other.formats.items():
            self.formats[name] = self.formats.get(name, 0) + rows

    def summary(self) -> dict[str, Any]:
        """As ledger.json holds it."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": by_count(self.dropped),
            "set_aside": by_count(self.aside),
            "formats": self.formats,
        }


def by_count(reasons: Reasons) -> dict[str, Any]:
    """`reasons` for JSON, the commonest first."""
    return {reason: vars(places) for reason, places in sorted(reasons.items(), key=lambda item: -item[1].rows)}


def from_summary(values: dict[str, Any]) -> Ledger:
    """The ledger that `summary` was made of."""
    dropped, aside = (
        {reason: Places(**places) for reason, places in values[part].items()} for part in ("dropped", "set_aside")
    )
    return Ledger(values["rows"], values["kept"], dropped, aside, values["formats"])


def check(part: str, ledger: Ledger, data: Data, overlong: str) -> None:
    """Stop when more rows are lost than the recipe allows; `overlong` is the ledger's name for rows too long.

    Raises:
        DataError: more than `data.max_dropped` are dropped, none is left, or one is too long under `overlong: error`.
    """
    too_long = ledger.dropped.get(overlong)
    if too_long is not None and data.overlong == "error":
        what = f"rows longer than {data.max_length} tokens: {too_long}"
        raise DataError(Problem(part, what, "raise data.max_length, or data.overlong=drop"))
    considered = ledger.kept + ledger.lost + sum(ledger.aside[why].rows for why in BY_CHOICE if why in ledger.aside)
    if ledger.kept and ledger.lost <= data.max_dropped * considered:
        return
    worst = sorted(ledger.dropped.items(), key=lambda item: -item[1].rows)[:3]
    reasons = "; ".join(f"{reason}: {places}" for reason, places in worst)
    longer = ", raise data.max_length" if overlong in dict(worst) else ""
    much = f"more than data.max_dropped ({data.max_dropped:.0%})" if ledger.kept else "so none is left"
    raise DataError(
        Problem(
            part,
            f"{ledger.lost} of {considered} rows would be dropped, {much}" + (f": {reasons}" if reasons else ""),
            f"mend the rows{longer}, or raise data.max_dropped",
        )
    )
