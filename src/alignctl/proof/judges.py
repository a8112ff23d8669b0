"""Who answers better? Judges of two answers to the same prompt: a reward model, an endpoint, or a rule in Python.

Each prompt is judged once and kept in `evaluations/judgments.jsonl`: an evaluation that was interrupted, or is
repeated, goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy

from alignctl import secrets, statistics
from alignctl.evaluate.numbers import Estimate
from alignctl.evaluate.verdict import Voice
from alignctl.formats import Message
from alignctl.train.display import Display

FILE = "judgments.jsonl"
Result = Literal["win", "tie", "loss", "unreadable"]
_POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True)
class Match:
    """A prompt, and what reference and tuned model answered."""

    prompt: list[Message]
    reference: str
    tuned: str


class Judge(Protocol):
    """Compares answers. `identity` changes whenever its judgments may; `together` is how many it hears at a time."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def together(self) -> int: ...

    def compare(self, match: Match) -> Result:
        """What the tuned answer gets against the reference's."""


@dataclass(frozen=True)
class Score:
    """Wins, ties and losses of the tuned model's answers; a tie counts half of a win."""

    judge: str
    n: int
    wins: int
    ties: int
    losses: int
    unreadable: int
    win_rate: Estimate | None

    def voice(self) -> Voice:
        """What the win rate says, against one half."""
        if self.win_rate is None:
            return Voice("no evidence", f"{self.judge} judged nothing")
        low, high = self.win_rate.interval
        said = f"{self.judge} gives them {self.win_rate.value:.0%} of {self.n}, 95 % interval {low:.0%} to {high:.0%}"
        return Voice(statistics.verdict((low - 0.5, high - 0.5)), said)


def ask(judge: Judge, matches: Sequence[Match], folder: Path, display: Display) -> Score:
    """Judge every match that has not been judged before, and count."""
    kept = _kept(folder / FILE)
    keys = [_key(judge, match) for match in matches]
    left = {key: match for key, match in zip(keys, matches, strict=True) if key not in kept}
    with display.waiting(f"{judge.name} judges {len(left)} of {len(matches)} answers"):
        for key, result in _judged(judge, left):
            _keep(folder / FILE, {"key": key, "judge": judge.name, "result": result})
            kept[key] = result
    return count(judge.name, [kept[key] for key in keys])


def _judged(judge: Judge, left: dict[str, Match]) -> Iterator[tuple[str, Result]]:
    with ThreadPoolExecutor(judge.together) as pool:
        waiting = {pool.submit(judge.compare, match): key for key, match in left.items()}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def count(name: str, results: Sequence[Result]) -> Score:
    """The score of `results`, one a prompt; what could not be read counts for nobody."""
    points = numpy.array([_POINTS[result] for result in results if result in _POINTS])
    rate = None
    if len(points):
        rate = Estimate(float(points.mean()), statistics.share_interval(points, numpy.arange(len(points))))
    counts = {kind: sum(result == kind for result in results) for kind in ("win", "tie", "loss", "unreadable")}
    return Score(name, len(points), counts["win"], counts["tie"], counts["loss"], counts["unreadable"], rate)


def _key(judge: Judge, match: Match) -> str:
    text = json.dumps([judge.identity, match.prompt, match.reference, match.tuned])
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(file: Path) -> dict[str, Result]:
    """Judgments by key; a line that was being written when the process was killed is left out."""
    found: dict[str, Result] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["key"]] = row["result"]
    return found


def _keep(file: Path, row: dict[str, str]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(secrets.hidden(row)) + "\n")
        out.flush()
        os.fsync(out.fileno())
