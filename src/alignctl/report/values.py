"""Values out of files that may hold anything: asked for by path and kind, and None where they are something else."""

from __future__ import annotations

import math
from typing import Any


def dig(value: object, *keys: str) -> Any:
    """What stands under `keys`, one below the other; None where a key or a table is missing."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def table(value: object) -> dict[str, Any]:
    """`value` when it is a table, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows(value: object) -> list[dict[str, Any]]:
    """The tables in `value` when it is a list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def number(value: object) -> float | None:
    """`value` when it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def numbers(value: object) -> list[float]:
    """`value` when it is a list of finite numbers, else an empty one."""
    found = [number(each) for each in value] if isinstance(value, list) else []
    return [each for each in found if each is not None] if None not in found else []


def text(value: object) -> str:
    """`value` as text; nothing for what is missing."""
    return "" if value is None else str(value)


def interval(value: object) -> tuple[float, float] | None:
    """`value` when it is a pair of finite numbers."""
    found = numbers(value)
    return (found[0], found[1]) if len(found) == 2 else None
