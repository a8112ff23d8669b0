"""Shapes of data sets: one function a shape, from a raw row to a canonical row; and which shape a row has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignctl.formats.preference import PREFERENCE, SCORES
from alignctl.formats.rows import Canonical, Dropped, Format, Message, Row, RowError, kind
from alignctl.formats.supervised import SUPERVISED, chosen_dialogue

__all__ = [
    "PREFERENCE",
    "SUPERVISED",
    "Canonical",
    "Dropped",
    "Format",
    "Message",
    "Row",
    "RowError",
    "chosen_dialogue",
    "detect",
    "named",
    "read",
    "renamed",
]


def named(name: str) -> Format:
    """The format that a recipe calls `name`."""
    return next(candidate for candidate in (*PREFERENCE, *SUPERVISED) if candidate.name == name)


def detect(rows: Sequence[Row], *, preference: bool) -> Format:
    """The format of a set that begins with `rows`, among those of preference sets or those for SFT.

    The first row that has any known shape decides.

    Raises:
        RowError: no format fits, or more than one does; the message lists what was found and what is known.
    """
    known = PREFERENCE if preference else SUPERVISED
    for row in rows:
        fitting = [candidate for candidate in known if candidate.matches(row)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            both = " and ".join(f"`format: {candidate.name}` ({candidate.what})" for candidate in fitting)
            raise RowError(f"the columns fit {both}; say which in the recipe")
    near = [c for c in known if all(column in rows[0] for column in c.columns) and _is_broken(rows[0], c)]
    if near:
        read(max(near, key=lambda c: len(c.columns)), rows[0])
    hint = _hint(rows[0]) if preference else ""
    expected = ", ".join(candidate.name for candidate in known)
    raise RowError(f"columns are {_columns(rows[0])}, which is none of the shapes {expected}{hint}")


def _is_broken(row: Row, shape: Format) -> bool:
    """Whether a column of `shape` holds what no shape has there."""
    return any(not isinstance(row[column], str | list | Mapping) for column in shape.columns)


def _columns(row: Row) -> str:
    return ", ".join(f"`{column}` ({kind(value)})" for column, value in row.items()) or "none"


def _hint(row: Row) -> str:
    if "prompt" not in row and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        return " (the column with the question is named by `columns: {prompt: …}`)"
    return ""


def read(shape: Format, row: Row) -> Canonical:
    """`row` as a canonical row.

    Raises:
        RowError: it has another shape, or a column does not hold what it should.
        Dropped: it breaks a rule.
    """
    known = PREFERENCE if shape in PREFERENCE else SUPERVISED
    other = None if shape.matches(row) else next((c for c in known if c is not shape and c.matches(row)), None)
    if other is not None:
        raise RowError(f"has another shape: {other.name} ({other.what})")
    missing = [column for column in shape.columns if column not in row]
    if missing:
        raise RowError(f"`{missing[0]}` is missing; columns are {_columns(row)}")
    null = [column for column in shape.columns if row[column] is None]
    if null:
        raise RowError(f"`{null[0]}` is null, expected a value")
    return shape.read(row)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """`row` with the recipe's `columns` (our name: theirs) under our names; a score may stand inside `completions`.

    Raises:
        RowError: the row has no such column.
    """
    if not columns:
        return row
    inner = columns.get("score")
    out: dict[str, Any] = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    out = {**{column: value for column, value in row.items() if column not in columns.values()}, **out}
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing == [inner] and isinstance(out.get("completions"), list):
        out["completions"] = [_scored(item, str(inner), i) for i, item in enumerate(out["completions"])]
    elif missing:
        raise RowError(f"`columns` names `{missing[0]}`, but the columns are {', '.join(map(str, row))}")
    return out


def _scored(item: Any, inner: str, i: int) -> dict[str, Any]:
    if not isinstance(item, Mapping) or inner not in item:
        raise RowError(f"`completions[{i}]` is without `{inner}`, which `columns` names")
    return {**{column: value for column, value in item.items() if column not in SCORES}, SCORES[0]: item[inner]}
