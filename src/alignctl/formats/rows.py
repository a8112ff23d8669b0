"""Rows, messages, and what is said of a row that cannot be read.

A preference row becomes `{"prompt": [messages], "chosen": [message], "rejected": [message]}`, where the prompt holds
the whole history and each answer is one assistant message. A row for SFT becomes `{"messages": [messages]}`, or
`{"text": str}` for plain text. A message is `{"role": "system" | "user" | "assistant", "content": str}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, str]
Canonical = dict[str, Any]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_KEYS = (("role", "content"), ("from", "value"))


class RowError(ValueError):
    """A row that cannot be read; the message says which column, what was found and what was expected."""


class Dropped(Exception):
    """A row that is read well and breaks a rule; `reason` is its name in the ledger."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Format:
    """A shape: its name in a recipe, what it is, the columns that it needs, whether a row has it, and how it is read.

    `per_answer` shapes hold one scored answer a row; rows of one prompt are brought together before they are read.
    """

    name: str
    what: str
    columns: tuple[str, ...]
    fits: Callable[[Row], bool]
    read: Callable[[Row], Canonical]
    per_answer: bool = False

    def matches(self, row: Row) -> bool:
        """Whether `row` has the columns, with values of the kinds that this shape has."""
        return all(row.get(column) is not None for column in self.columns) and self.fits(row)


def text(row: Row, column: str) -> str:
    """The string in `column`."""
    if column not in row:
        raise RowError(f"`{column}` is missing, expected a string")
    return as_text(row[column], f"`{column}` is")


def as_text(value: object, found: str) -> str:
    """`value`, which must be a string of whole characters; `found` begins the error's sentence."""
    if not isinstance(value, str):
        raise RowError(f"{found} {kind(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{found} no text: character {error.start + 1} is half of a surrogate pair") from error
    return value


def number(value: object, found: str) -> float:
    """`value` as a finite number; a string of digits (CSV has no others) counts."""
    try:
        out = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        out = math.nan
    if not math.isfinite(out):
        shown = repr(value)[:40] if isinstance(value, float | str) else kind(value)
        raise RowError(f"{found} {shown}, expected a number")
    return out


def messages(row: Row, column: str) -> list[Message]:
    """The messages in `column`, each with a known role and text."""
    value = row.get(column)
    if not isinstance(value, list) or not value:
        found = kind(value) if column in row else "missing"
        raise RowError(f"`{column}` is {found}, expected a list of messages")
    return [as_message(item, f"`{column}[{i}]`") for i, item in enumerate(value)]


def as_message(item: object, where: str) -> Message:
    """A `{role, content}` or `{from, value}` object as a message."""
    keys = next((k for k in _KEYS if isinstance(item, Mapping) and k[0] in item), None)
    if keys is None or not isinstance(item, Mapping):
        raise RowError(f"{where} is {kind(item)}, expected {{role, content}} or {{from, value}}")
    role, content = item.get(keys[0]), item.get(keys[1])
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowError(f"{where} has role {role!r:.40}, expected one of {', '.join(ROLES)}")
    return {"role": ROLES[role.lower()], "content": as_text(content, f"{where} has {keys[1]} that is")}


def kind(value: object) -> str:
    """What `value` is, in words."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "an empty list" if not value else f"a list of {kind(value[0])}"
    return {str: "a string", bool: "true/false", int: "a number", float: "a number"}.get(type(value), "an object")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def with_system(row: Row, turns: list[Message]) -> list[Message]:
    """`turns` after the `system` column, where the row has one and `turns` does not begin with a system message."""
    if not row.get("system") or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": text(row, "system")}, *turns]


def instruction(row: Row) -> list[Message]:
    """Alpaca's question: `instruction` and, where there is one, `input` under it; after `history` and `system`."""
    question = text(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{text(row, 'input')}"
    return with_system(row, [*_history(row), user(question)])


def _history(row: Row) -> list[Message]:
    """`history`: a list of [question, answer] pairs, or absent."""
    given = row.get("history") or []
    if not isinstance(given, list | tuple):
        raise RowError(f"`history` is {kind(given)}, expected a list of [question, answer]")
    turns: list[Message] = []
    for i, exchange in enumerate(given):
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise RowError(f"`history[{i}]` is {kind(exchange)}, expected [question, answer]")
        question, answer = (as_text(part, f"`history[{i}]` holds") for part in exchange)
        turns += [user(question), assistant(answer)]
    return turns
