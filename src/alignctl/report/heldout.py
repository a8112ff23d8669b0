"""What a run made of held-out rows, row by row: those that its recipe held out, or those of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from alignctl.report.gather import Run
from alignctl.report.values import dig, number, numbers, rows, table, text


@dataclass(frozen=True)
class Replied:
    """The tuned model's answer to a prompt, and the one that the data prefers."""

    text: str
    preferred: str
    tokens: int | None
    stopped: bool | None


@dataclass(frozen=True)
class Measured:
    """Scores row by row under the tuned model, by name, and answers by prompt."""

    columns: dict[str, list[float]]
    replies: dict[str, Replied]
    data: str = ""


def own(run: Run) -> Measured:
    """The rows that the recipe held out, after training."""
    replies = {
        text(row.get("prompt")): _replied(row, row.get("after"), row.get("after_tokens"), row.get("after_stopped"))
        for row in run.samples
    }
    return Measured(_columns(dig(run.scores, "after", "scores")), replies)


def evaluated(run: Run, name: str) -> Measured:
    """The rows of the evaluation `name`."""
    values = next(each for each in run.evaluations if each.get("name") == name)
    replies = {}
    for row in rows(values.get("answers")):
        tuned = table(row.get("tuned"))
        replies[text(row.get("prompt"))] = _replied(row, tuned.get("text"), tuned.get("tokens"), tuned.get("stopped"))
    return Measured(_columns(dig(values, "rows", "tuned")), replies, text(dig(values, "data", "path")))


def _columns(values: object) -> dict[str, list[float]]:
    return {name: numbers(column) for name, column in table(values).items()}


def _replied(row: dict[str, Any], given: object, tokens: object, stopped: object) -> Replied:
    count = number(tokens)
    return Replied(
        text(given),
        text(row.get("preferred")),
        None if count is None else int(count),
        stopped if isinstance(stopped, bool) else None,
    )


def shared(runs: list[Run]) -> list[tuple[str, str]]:
    """Names and fingerprints of the evaluations that every run has on the same rows."""
    found = [
        {(text(each.get("name")), text(dig(each, "data", "fingerprint"))) for each in run.evaluations} for run in runs
    ]
    return sorted(each for each in set.intersection(*found) if all(each))


def files(run: Run) -> tuple[str, ...]:
    """Where the held-out rows came from: the sources of `data.eval`, or of `data.train` where a share is held out."""
    return tuple(text(row.get("path")) for row in rows(dig(run.ledger, "eval", "sources")))


def describe(run: Run) -> str:
    """The held-out rows in words."""
    count = number(dig(run.record, "data", "eval", "rows"))
    named = ", ".join(PurePath(path).name if path.startswith("/") else path for path in files(run))
    if count is None:
        return "no rows"
    return f"{count:,.0f} rows" + (f" of {named}" if named else "")
