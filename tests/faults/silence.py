"""Rows of silent faults, and what a run said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

LN2 = 0.6931471805599453
WORDS = ["tea", "rain", "bread", "stone", "river", "lamp", "cloud", "wheel"]


def rows_of(count: int, chosen: Callable[[int], str], rejected: Callable[[int], str]) -> list[Row]:
    return [{"prompt": f"Say {i}.", "chosen": chosen(i), "rejected": rejected(i)} for i in range(count)]


def read(ran: Any, name: str) -> Any:
    text = (ran.folder / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def logged(ran: Any, name: str) -> list[float]:
    return [row[name] for row in read(ran, "metrics.jsonl") if name in row]


def findings(ran: Any) -> dict[str, Row]:
    """The findings of the data doctor that warn, by name."""
    return {finding["name"]: finding for finding in read(ran, "ledger.json")["findings"] if finding["warns"]}


def printed(ran: Any) -> str:
    """What a run printed, in one line."""
    return " ".join(ran.out.split())


def better(i: int) -> str:
    return f"{WORDS[i % 4]} {WORDS[(i + 1) % 4]}"


def worse(i: int) -> str:
    return f"{WORDS[4 + i % 4]} {WORDS[4 + (i + 1) % 4]}"
