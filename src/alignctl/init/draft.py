"""A recipe that is being written: every value with the reason beside it."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import Any

from alignctl.recipe import tree
from alignctl.terminal import harmless

WIDTH = 118


@dataclass(frozen=True)
class Choice:
    """A value and why it is that one."""

    value: Any
    why: str = ""


Draft = dict[str, dict[str, Choice]]


def text(draft: Draft, head: list[str], tail: list[str]) -> str:
    """`draft` as YAML, `head` and `tail` as comments around it; reads back as the same values."""
    lines = [part for line in head for part in _comment(line)]
    for section, choices in draft.items():
        lines += [f"{section}:", *_section(choices)] if choices else [f"{section}: {{}}"]
    lines += [part for line in tail for part in _comment(line)]
    return "\n".join(lines) + "\n"


def values(draft: Draft) -> dict[str, Any]:
    """The recipe's values alone."""
    return {section: {key: choice.value for key, choice in choices.items()} for section, choices in draft.items()}


def _section(choices: dict[str, Choice]) -> list[str]:
    lines = []
    for key, choice in choices.items():
        line, why = f"  {key}: {shown(choice.value)}", _one_line(choice.why)
        if why and len(line) + len(why) + 4 <= WIDTH:
            lines.append(f"{line}  # {why}")
        else:
            lines += [f"  # {part}" for part in textwrap.wrap(why, WIDTH - 4)] + [line]
    return lines


def shown(value: Any) -> str:
    """`value` on one line of YAML."""
    if isinstance(value, float) and 0 < value < 1e-3:
        return re.sub(r"\.?0*e-0*", "e-", f"{value:.15e}", count=1)
    return tree.inline(value)


def _comment(line: str) -> list[str]:
    return [f"# {part}" for part in textwrap.wrap(_one_line(line), WIDTH)] or ["#"]


def _one_line(text: str) -> str:
    return " ".join(harmless(text).split())
