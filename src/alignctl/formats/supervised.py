"""Shapes of sets for supervised fine-tuning: one function a shape, from a raw row to a canonical one."""

from __future__ import annotations

from alignctl.formats import rows
from alignctl.formats.rows import Canonical, Format, Row, assistant, messages, text, user


def chosen_dialogue(row: Canonical) -> Canonical:
    """A canonical preference row as a row for SFT: the prompt and the chosen answer."""
    return {"messages": [*row["prompt"], *row["chosen"]]}


def _dialogue(row: Row) -> Canonical:
    return {"messages": rows.with_system(row, messages(row, "messages"))}


def _conversations(row: Row) -> Canonical:
    return {"messages": rows.with_system(row, messages(row, "conversations"))}


def _prompt_completion(row: Row) -> Canonical:
    if isinstance(row.get("prompt"), list):
        return {"messages": rows.with_system(row, [*messages(row, "prompt"), *messages(row, "completion")])}
    turns = [user(text(row, "prompt")), assistant(text(row, "completion"))]
    return {"messages": rows.with_system(row, turns)}


def _alpaca(row: Row) -> Canonical:
    return {"messages": [*rows.instruction(row), assistant(text(row, "output"))]}


def _text(row: Row) -> Canonical:
    return {"text": text(row, "text")}


SUPERVISED = (
    Format("messages", "messages", ("messages",), lambda row: True, _dialogue),
    Format(
        "prompt-completion", "prompt and completion", ("prompt", "completion"), lambda row: True, _prompt_completion
    ),
    Format("alpaca", "instruction, input and output", ("instruction", "output"), lambda row: True, _alpaca),
    Format("sharegpt", "conversations", ("conversations",), lambda row: True, _conversations),
    Format("text", "plain text", ("text",), lambda row: True, _text),
)
