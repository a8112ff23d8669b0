"""Answers before and after, for the page: found in the run's samples and in its evaluations, and cut to fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from alignctl.report.gather import Run
from alignctl.report.measures import HELD_OUT, Evaluation
from alignctl.report.values import number, rows, table, text

# Characters of answers on one page, as they are written in HTML; what is over it is cut at one length for all.
ROOM = 1_800_000
# Prompts on one page.
MOST = 1000


@dataclass(frozen=True)
class Reply:
    """One answer: its text, its tokens, and whether it ended by itself."""

    label: str
    text: str
    tokens: int | None = None
    stopped: bool | None = None
    cut: bool = False


@dataclass(frozen=True)
class Asked:
    """One prompt with the answer that the data prefers and those of the models, in the order of the columns."""

    prompt: str
    preferred: str
    replies: tuple[Reply, ...]

    @property
    def changed(self) -> bool:
        return len({reply.text for reply in self.replies}) > 1

    @property
    def runs_on(self) -> bool:
        """Whether the tuned model's answer did not end by itself."""
        return any(reply.stopped is False for reply in self.replies[1:])

    @property
    def length(self) -> int:
        """How long the longest of the tuned model's answers is: tokens, or characters where tokens are unknown."""
        return max((len(r.text) if r.tokens is None else r.tokens for r in self.replies[1:]), default=0)


@dataclass(frozen=True)
class Answers:
    """The answers to one set of prompts; `total` is how many there are where not all are shown."""

    name: str
    source: str
    total: int
    asked: list[Asked]


def answers(run: Run, evaluations: list[Evaluation]) -> list[Answers]:
    """All sets of answers that the folder holds, cut so that the page stays small."""
    found = [
        (each.name, f"evaluations/{each.name}.json", [_evaluated(row) for row in rows(each.raw.get("answers"))])
        for each in evaluations
    ]
    if not any(name == HELD_OUT and asked for name, _, asked in found):
        found.insert(0, (HELD_OUT, "samples.jsonl", [_sampled(row) for row in run.samples]))
    kept = [(name, source, asked) for name, source, asked in found if asked]
    room = ROOM // max(1, len(kept))
    return [Answers(name, source, len(asked), fitted(asked[:MOST], room)) for name, source, asked in kept]


def _sampled(row: dict[str, Any]) -> Asked:
    """A row of samples.jsonl."""
    replies = tuple(
        _reply(
            when, {"text": row.get(when), "tokens": row.get(f"{when}_tokens"), "stopped": row.get(f"{when}_stopped")}
        )
        for when in ("before", "after")
    )
    return Asked(text(row.get("prompt")), text(row.get("preferred")), replies)


def _evaluated(row: dict[str, Any]) -> Asked:
    """An answer of an evaluation."""
    labels = {"reference": "reference", "tuned": "trained", "drawn": "trained, drawn"}
    replies = tuple(_reply(label, table(row[key])) for key, label in labels.items() if key in row)
    return Asked(text(row.get("prompt")), text(row.get("preferred")), replies)


def _reply(label: str, values: dict[str, Any]) -> Reply:
    tokens, stopped = number(values.get("tokens")), values.get("stopped")
    return Reply(
        label,
        text(values.get("text")),
        None if tokens is None else int(tokens),
        stopped if isinstance(stopped, bool) else None,
    )


def fitted(asked: list[Asked], room: int) -> list[Asked]:
    """`asked` with every text longer than some limit cut there, so that all together take `room` bytes at most."""
    texts = [each for row in asked for each in (row.prompt, row.preferred, *(reply.text for reply in row.replies))]
    sizes = sorted(_size(each) for each in texts)
    left, limit = room, None
    for i, size in enumerate(sizes):
        share = left // (len(sizes) - i)
        if size > share:
            limit = share
            break
        left -= size
    return asked if limit is None else [_cut(row, limit) for row in asked]


def _size(given: str) -> int:
    """Bytes of `given` in HTML."""
    escaped = sum(given.count(c) for c in "<>&'\"")
    return len(given.encode("utf-8", "replace")) + 4 * escaped


def _shortened(given: str, limit: int) -> str:
    """As much of `given` as takes `limit` bytes in HTML."""
    if _size(given) <= limit:
        return given
    end = max(1, len(given) * limit // _size(given))
    while _size(given[:end]) > limit and end > 1:
        end -= max(1, end // 20)
    return given[:end] + "…"


def _cut(row: Asked, limit: int) -> Asked:
    replies = tuple(
        replace(reply, text=_shortened(reply.text, limit), cut=_size(reply.text) > limit) for reply in row.replies
    )
    return Asked(_shortened(row.prompt, limit), _shortened(row.preferred, limit), replies)
