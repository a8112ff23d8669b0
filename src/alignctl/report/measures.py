"""Held-out numbers in one shape, whether an evaluation measured them or the run itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from alignctl.report.gather import Run
from alignctl.report.values import dig, interval, number, rows, table, text

# The evaluation of the rows that the recipe held out.
HELD_OUT = "held-out"
_GROUPS = ("preferences", "likelihood", "answers", "drift", "forgetting", "judges", "tasks")


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval where there is one, and for a difference its p-value where there is one."""

    value: float
    interval: tuple[float, float] | None = None
    p: float | None = None


@dataclass(frozen=True)
class Measure:
    """One number before and after training; `better` says which way is better, where one is."""

    name: str
    label: str
    group: str = ""
    unit: str = ""
    n: int | None = None
    better: str | None = None
    reference: Estimate | None = None
    tuned: Estimate | None = None
    difference: Estimate | None = None


@dataclass(frozen=True)
class Judged:
    """What a judge said of answers before and after."""

    judge: str
    n: int
    wins: int
    ties: int
    losses: int
    win_rate: Estimate | None


@dataclass(frozen=True)
class Evaluation:
    """One set of held-out rows, measured before and after training."""

    name: str
    verdict: str
    reason: str
    data: str = ""
    against: str = ""
    measures: list[Measure] = field(default_factory=list)
    judges: list[Judged] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    def find(self, name: str) -> Measure | None:
        return next((measure for measure in self.measures if measure.name == name), None)

    def groups(self) -> list[tuple[str, list[Measure]]]:
        """The measures under the name of their group, in the order in which a reader asks."""
        names = sorted({m.group for m in self.measures}, key=lambda g: (_GROUPS.index(g) if g in _GROUPS else 99, g))
        return [(name or "numbers", [m for m in self.measures if m.group == name]) for name in names]


def evaluations(run: Run) -> list[Evaluation]:
    """Everything that was measured on held-out rows, the recipe's own first."""
    found = [_evaluation(values) for values in run.evaluations if values]
    if not any(each.name == HELD_OUT for each in found) and "before" in run.summary:
        found.append(_own(run))
    return sorted(found, key=lambda each: (each.name != HELD_OUT, each.name))


def _estimate(value: object) -> Estimate | None:
    found = number(dig(value, "value"))
    return None if found is None else Estimate(found, interval(dig(value, "interval")), number(dig(value, "p")))


def _count(value: object) -> int:
    return int(number(value) or 0)


def _evaluation(values: dict[str, Any]) -> Evaluation:
    data, against = table(values.get("data")), table(values.get("against"))
    measured = text(data.get("path"))
    if number(data.get("rows")) is not None:
        measured = f"{_count(data['rows']):,} rows of {measured}" if measured else f"{_count(data['rows']):,} rows"
    return Evaluation(
        name=text(values.get("name")) or HELD_OUT,
        verdict=text(values.get("verdict")),
        reason=text(values.get("reason")),
        data=measured,
        against=_reference(text(against.get("what")), text(against.get("name"))),
        measures=[_measure(row) for row in rows(values.get("numbers"))],
        judges=[_judged(row) for row in rows(values.get("judges"))],
        raw=values,
    )


def _measure(row: dict[str, Any]) -> Measure:
    name = text(row.get("name"))
    n = number(row.get("n"))
    return Measure(
        name=name,
        label=text(row.get("label")) or name.replace("_", " "),
        group=text(row.get("group")),
        unit=text(row.get("unit")),
        n=None if n is None else int(n),
        better=text(row.get("better")) or None,
        reference=_estimate(row.get("reference")),
        tuned=_estimate(row.get("tuned")),
        difference=_estimate(row.get("difference")),
    )


def _judged(row: dict[str, Any]) -> Judged:
    n, wins, ties, losses = (_count(row.get(key)) for key in ("n", "wins", "ties", "losses"))
    return Judged(text(row.get("judge")), n, wins, ties, losses, _estimate(row.get("win_rate")))


# key in summary.json, label, group, unit, which way is better
_OWN = (
    ("reward_accuracy", "reward accuracy", "preferences", "share", "higher"),
    ("margin", "reward margin", "preferences", "", "higher"),
    ("nll", "negative log-likelihood a token", "likelihood", "nats", "lower"),
    ("loss", "loss", "likelihood", "", "lower"),
    ("chosen_logps_per_token", "chosen log-prob a token", "drift", "nats", None),
    ("rejected_logps_per_token", "rejected log-prob a token", "drift", "nats", None),
)


def _reference(what: str, name: str) -> str:
    """What an evaluation's reference is, and its name."""
    word = {"start": "where training started", "base": "the base", "run": "the run"}.get(what, "")
    return ", ".join(part for part in (word, name) if part)


def _own(run: Run) -> Evaluation:
    """What the run measured itself: summary.json."""
    summary = run.summary
    measures = [_of_summary(summary, *row) for row in _OWN if number(dig(summary, "after", row[0])) is not None]
    measures += _of_answers(table(summary.get("samples")))
    kept = number(dig(run.ledger, "eval", "kept"))
    data = "" if kept is None else f"{int(kept):,} rows held out"
    return Evaluation(HELD_OUT, text(summary.get("verdict")), _reason(summary), data, measures=measures)


def _reason(summary: dict[str, Any]) -> str:
    """Why summary.json's verdict is what it is."""
    if summary.get("reason"):
        return text(summary["reason"])
    difference, spread = number(summary.get("difference")), interval(summary.get("difference_interval"))
    if difference is None or spread is None:
        return ""
    return f"{text(summary.get('measure'))} {difference:+.3f}, 95 % interval {spread[0]:+.3f} to {spread[1]:+.3f}"


def _of_summary(summary: dict[str, Any], key: str, label: str, group: str, unit: str, better: str | None) -> Measure:
    def side(when: str) -> Estimate | None:
        value = number(dig(summary, when, key))
        return None if value is None else Estimate(value, interval(dig(summary, when, f"{key}_interval")))

    n = number(dig(summary, "after", "n"))
    return Measure(
        name=key,
        label=label,
        group=group,
        unit=unit,
        n=None if n is None else int(n),
        better=better,
        reference=side("before"),
        tuned=side("after"),
        difference=_gain(summary, key),
    )


def _gain(summary: dict[str, Any], key: str) -> Estimate | None:
    """The paired difference of the one number that the verdict is about; of SFT it is written as a fall."""
    gain, spread = number(summary.get("difference")), interval(summary.get("difference_interval"))
    if gain is None or spread is None or key not in ("margin", "nll"):
        return None
    return Estimate(gain, spread) if key == "margin" else Estimate(-gain, (-spread[1], -spread[0]))


def _of_answers(samples: dict[str, Any]) -> Iterable[Measure]:
    rows_of = (
        ("mean_tokens", "answer length", "tokens", None),
        ("stop_rate", "answers that end by themselves", "share", "higher"),
    )
    n = number(samples.get("n"))
    for key, label, unit, better in rows_of if n else ():
        sides = [number(dig(samples, key, when)) for when in ("before", "after")]
        before, after = (None if side is None else Estimate(side) for side in sides)
        yield Measure(key, label, "answers", unit, int(n or 0), better, before, after)
