"""Shapes of data sets: one function a shape, from a raw row to canonical rows.

A preference row becomes `{"prompt": [messages], "chosen": [message], "rejected": [message]}`, where the prompt holds
the whole history and each answer is one assistant message. A row for SFT becomes `{"messages": [messages]}`.
A message is `{"role": "system" | "user" | "assistant", "content": str}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, str]
Canonical = dict[str, list[Message]]

ROLES = ("system", "user", "assistant")


class RowError(ValueError):
    """A row that cannot be read; the message says which column, what was found and what was expected."""


@dataclass(frozen=True)
class Format:
    """A shape: its name, the columns that it needs, whether a row has it, and how it is read."""

    name: str
    columns: tuple[str, ...]
    fits: Callable[[Row], bool]
    read: Callable[[Row], Canonical]


def text(row: Row, column: str) -> str:
    """The string in `column`."""
    return _text(row.get(column), f"`{column}` is")


def _text(value: object, found: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{found} {_kind(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{found} no text: character {error.start + 1} is half of a surrogate pair") from error
    return value


def messages(row: Row, column: str) -> list[Message]:
    """The messages in `column`, each with a known role and text."""
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise RowError(f"`{column}` is {_kind(value)}, expected a list of messages")
    return [_message(item, f"`{column}[{i}]`") for i, item in enumerate(value)]


def _message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{where} is {_kind(item)}, expected {{role, content}}")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise RowError(f"{where} has role {role!r}, expected one of {', '.join(ROLES)}")
    return {"role": role, "content": _text(content, f"{where} has content that is")}


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, list | tuple):
        return "an empty list" if not value else f"a list of {_kind(value[0])}"
    return {str: "a string", bool: "true/false", int: "a number", float: "a number"}.get(type(value), "an object")


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _with_system(row: Row, turns: list[Message]) -> list[Message]:
    """`turns` after the `system` column, where the row has one and `turns` does not begin with a system message."""
    if not row.get("system") or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": text(row, "system")}, *turns]


def _strings(row: Row) -> Canonical:
    return {
        "prompt": _with_system(row, [_user(text(row, "prompt"))]),
        "chosen": [_assistant(text(row, "chosen"))],
        "rejected": [_assistant(text(row, "rejected"))],
    }


def _conversations(row: Row) -> Canonical:
    """Answers as message lists; `prompt` is a list, a string that repeats the first user turn, or absent."""
    chosen, rejected = messages(row, "chosen"), messages(row, "rejected")
    prompt = messages(row, "prompt") if isinstance(row.get("prompt"), list) else []
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise RowError(f"`{column}` ends with the role {side[-1]['role']}, expected assistant")
    if chosen[:-1] != rejected[:-1]:
        raise RowError("`chosen` and `rejected` differ before their last message, expected one common history")
    history = chosen[:-1]
    if prompt and history[: len(prompt)] != prompt:
        history = [*prompt, *history]
    if not history:
        history = [_user(text(row, "prompt"))]
    return {"prompt": _with_system(row, history), "chosen": [chosen[-1]], "rejected": [rejected[-1]]}


def chosen_dialogue(row: Canonical) -> Canonical:
    """A canonical preference row as a row for SFT: the prompt and the chosen answer."""
    return {"messages": [*row["prompt"], *row["chosen"]]}


def _dialogue(row: Row) -> Canonical:
    return {"messages": _with_system(row, messages(row, "messages"))}


def _prompt_completion(row: Row) -> Canonical:
    if isinstance(row.get("prompt"), list):
        return {"messages": _with_system(row, [*messages(row, "prompt"), *messages(row, "completion")])}
    return {"messages": _with_system(row, [_user(text(row, "prompt")), _assistant(text(row, "completion"))])}


PREFERENCE = (
    Format(
        "prompt, chosen and rejected as strings",
        ("prompt", "chosen", "rejected"),
        lambda row: isinstance(row.get("chosen"), str) and "prompt" in row,
        _strings,
    ),
    Format(
        "chosen and rejected as messages",
        ("chosen", "rejected"),
        lambda row: isinstance(row.get("chosen"), list),
        _conversations,
    ),
)
SFT = (
    Format("messages", ("messages",), lambda row: "messages" in row, _dialogue),
    Format(
        "prompt and completion",
        ("prompt", "completion"),
        lambda row: "prompt" in row and "completion" in row,
        _prompt_completion,
    ),
)


def detect(row: Row, *, preference: bool) -> Format:
    """The format of `row`, among those of preference sets or those for SFT.

    Raises:
        RowError: no known format has these columns with these kinds of values; the message lists them.
    """
    known = PREFERENCE if preference else SFT
    for candidate in known:
        if candidate.fits(row) and all(column in row for column in candidate.columns):
            return candidate
    expected = " or ".join(f"“{candidate.name}”" for candidate in known)
    found = ", ".join(f"`{column}` ({_kind(value)})" for column, value in row.items()) or "none"
    raise RowError(f"columns are {found}, expected {expected}")
