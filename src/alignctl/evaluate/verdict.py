"""Did it get better? One word, and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignctl.evaluate import generation
from alignctl.evaluate.generation import Answer

Word = Literal["better", "no evidence", "worse", "broken"]

# Answers have collapsed when this share of their word pairs is new or less, and it was so much more before …
DISTINCT = 0.5
DISTINCT_FALL = 0.2
# … or when so many fewer of them end.
STOP_FALL = 0.5
# General text has become so many times less likely, a token: a model that was only taught a manner stays near 1.
PERPLEXITY_RISE = 2.0


@dataclass(frozen=True)
class Verdict:
    """The word, and one sentence that says why."""

    word: Word
    reason: str


@dataclass(frozen=True)
class Voice:
    """What one source of evidence says, by itself."""

    word: Word
    said: str


def collapsed(before: Sequence[Answer], after: Sequence[Answer]) -> str:
    """How answers have fallen apart between `before` and `after`; empty when they have not."""
    old, new = generation.summary(before), generation.summary(after)
    if new["distinct_2"] < DISTINCT and new["distinct_2"] < old["distinct_2"] - DISTINCT_FALL:
        shares = f"{new['distinct_2']:.0%} of their word pairs are new, {old['distinct_2']:.0%} before"
        return f"answers repeat themselves: {shares}"
    if new["stop_rate"] <= old["stop_rate"] - STOP_FALL:
        return f"answers no longer end: {new['stop_rate']:.0%} do, {old['stop_rate']:.0%} did before"
    return ""


def preference(found: dict[str, Any]) -> Voice:
    """What `scores.verdict` found, as a voice."""
    low, high = found["difference_interval"]
    said = f"{found['measure']} {found['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    return Voice(found["verdict"], said)


def conclude(broken: Sequence[str], voices: Sequence[Voice]) -> Verdict:
    """What is broken decides; then any voice for worse, then any for better."""
    if broken:
        return Verdict("broken", "; ".join(broken))
    for word in ("worse", "better"):
        heard = [voice.said for voice in voices if voice.word == word]
        if heard:
            return Verdict(word, "; ".join(heard))
    return Verdict("no evidence", "; ".join(voice.said for voice in voices) or "nothing was measured that could tell")
