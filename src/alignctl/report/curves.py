"""The lines of metrics.jsonl as curves, and what is normal in each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from alignctl import drift
from alignctl.report.gather import Run
from alignctl.report.values import dig, number

LN2 = math.log(2)
Pick = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Line:
    """One curve, `[n]` steps and values; `colour` counts through the palette, and `dots` are few and far between."""

    label: str
    colour: int
    steps: list[float]
    values: list[float]
    dots: bool = False


@dataclass(frozen=True)
class Curve:
    """One plot: its lines, a level that means something, the range that is normal, and a sentence about it."""

    key: str
    title: str
    unit: str
    lines: list[Line]
    level: tuple[float, str] | None = None
    normal: tuple[float, float] | None = None
    note: str = ""

    @property
    def noisy(self) -> bool:
        """Whether a mean over neighbours tells more than the values."""
        return self.key not in ("lr", "memory")

    @property
    def alternative(self) -> str:
        """The plot in words."""
        said = [
            f"{line.label} from {line.values[0]:.3g} to {line.values[-1]:.3g} over {len(line.values)} points"
            for line in self.lines
        ]
        return f"{self.title} against step: {'; '.join(said)}"


@dataclass(frozen=True)
class _Shape:
    """What a plot is made of: keys of metrics.jsonl with their labels."""

    key: str
    title: str
    unit: str
    lines: list[tuple[str, Pick]]
    level: tuple[float, str] | None = None
    normal: tuple[float, float] | None = None
    note: str = ""
    dots: list[tuple[str, Pick]] = field(default_factory=list)


def curves(run: Run) -> list[Curve]:
    """Every curve that the run's log has values for."""
    out = []
    for shape in _shapes(run):
        lines = [_line(run, label, i, pick) for i, (label, pick) in enumerate(shape.lines)]
        lines += [_line(run, label, 1 + i, pick, dots=True) for i, (label, pick) in enumerate(shape.dots)]
        drawn = [line for line in lines if line.values]
        if drawn:
            note = f"{shape.note} {_not_finite(run, shape.key)}".strip()
            out.append(Curve(shape.key, shape.title, shape.unit, drawn, shape.level, shape.normal, note))
    return out


def overlaid(runs: list[Run], names: list[str]) -> list[Curve]:
    """The curves of several runs in one plot each: those that mean the same in all of them."""
    out = []
    for key, title, unit, pick_of in _shared(runs):
        lines = [_line(run, name, i, pick_of(run)) for i, (run, name) in enumerate(zip(runs, names, strict=True))]
        drawn = [line for line in lines if line.values]
        if drawn:
            note = "Each method has a loss of its own." if key == "loss" and len({r.method for r in runs}) > 1 else ""
            normal = (drift.LIMIT, 0.0) if key == "drift" else None
            out.append(Curve(key, title, unit, drawn, None, normal, note))
    return out


def _shared(runs: list[Run]) -> Iterator[tuple[str, str, str, Callable[[Run], Pick]]]:
    methods = {run.method for run in runs}
    yield "loss", "Loss", "loss", lambda run: _of("loss")
    if methods <= {"dpo", "orpo"}:
        yield "accuracy", "Reward accuracy", "share", lambda run: _of("rewards/accuracies")
        yield "drift", "Chosen answers, likelier or not", "nats a token", lambda run: drifts(run, "chosen")
    if len(methods) == 1 and methods <= {"dpo", "orpo"}:
        unit = "nats an answer" if "dpo" in methods else "nats a token"
        yield "margin", "Reward margin / beta", unit, lambda run: _over("rewards/margins", run.beta)
    if methods == {"sft"}:
        yield "token-accuracy", "Token accuracy", "share", lambda run: _of("mean_token_accuracy")
    yield "grad-norm", "Gradient norm", "norm", lambda run: _of("grad_norm")
    yield "speed", "Throughput", "tokens a second", lambda run: _of("tokens_per_second")
    yield "memory", "Peak memory", "GiB", lambda run: _of("peak_memory_gib")


def _of(key: str) -> Pick:
    return lambda row: number(row.get(key))


def _over(key: str, by: object) -> Pick:
    found = number(by)
    return lambda row: None if not found or (v := number(row.get(key))) is None else v / found


def _shapes(run: Run) -> list[_Shape]:
    preferences = [] if run.method == "sft" else _preferences(run)
    tokens = (
        []
        if run.method != "sft"
        else [
            _Shape(
                "token-accuracy",
                "Token accuracy",
                "share",
                [_trained("mean_token_accuracy")],
                note="Share of trained tokens that the model itself would have written next.",
            )
        ]
    )
    return [_loss(run), *preferences, *tokens, *_machine()]


def _trained(key: str) -> tuple[str, Pick]:
    return ("training rows", _of(key))


def _held_out(key: str) -> list[tuple[str, Pick]]:
    return [("held-out rows", _of(f"eval_{key}"))]


def _loss(run: Run) -> _Shape:
    plain = run.method == "dpo" and dig(run.recipe, "dpo", "loss_type") in (None, "sigmoid")
    note = "ln 2 is what guessing gives: there the run starts, and a loss that stays there has learned nothing."
    level = (LN2, "ln 2") if plain else None
    return _Shape("loss", "Loss", "loss", [_trained("loss")], level, note=note if plain else "", dots=_held_out("loss"))


def _preferences(run: Run) -> list[_Shape]:
    beta = number(run.beta)
    units = "" if beta is None else f"Rewards are in units of beta ({beta:g}). "
    sides = [("chosen", _of("rewards/chosen")), ("rejected", _of("rewards/rejected"))]
    return [
        _Shape("rewards", "Rewards", "reward", sides, note=f"{units}What counts is the distance between the two."),
        _Shape(
            "margins",
            "Reward margin",
            "chosen − rejected",
            [_trained("rewards/margins")],
            (0.0, "no preference"),
            note="How much more the model prefers the chosen answer.",
            dots=_held_out("rewards/margins"),
        ),
        _Shape(
            "accuracy",
            "Reward accuracy",
            "share of pairs",
            [_trained("rewards/accuracies")],
            (0.5, "guessing"),
            note="Pairs whose chosen answer has the higher reward. A batch is few pairs, so single steps jump; "
            "the first step of DPO counts its ties as wrong.",
            dots=_held_out("rewards/accuracies"),
        ),
        _Shape(
            "drift",
            "Answers, likelier or not",
            "nats a token",
            [(s, drifts(run, s)) for s in _SIDES],
            (0.0, "as before training"),
            (drift.LIMIT, 0.0),
            "That chosen answers become a little unlikelier too is normal (the shaded range): rejected answers fall "
            f"further, and that is what is learned. A chosen line that stays below {drift.LIMIT:g} is not.",
        ),
    ]


_SIDES = ("chosen", "rejected")


def drifts(run: Run, side: str) -> Pick:
    """How a log line's answers of one side compare with the start, in nats a token.

    Against the reference for DPO, with the mean length that ledger.json knows; against the first log line for ORPO.
    """
    if run.method == "dpo":
        beta, tokens = number(run.beta), number(dig(run.ledger, "train", "lengths", "mean", side))
        if not beta or not tokens:
            return lambda row: None
        known = (beta, tokens)
        return lambda row: None if (v := number(row.get(f"rewards/{side}"))) is None else drift.of_dpo(v, *known)
    key = f"logps/{side}"
    first = next((v for row in run.metrics if (v := number(row.get(key))) is not None), 0.0)
    return lambda row: None if (v := number(row.get(key))) is None else v - first


def _machine() -> list[_Shape]:
    return [
        _Shape(
            "grad-norm",
            "Gradient norm",
            "norm before clipping",
            [("norm", _of("grad_norm"))],
            note="Single peaks are clipped and harmless; a rise that does not end is not.",
        ),
        _Shape("lr", "Learning rate", "learning rate", [("learning rate", _of("lr"))]),
        _Shape("memory", "Peak memory", "GiB", [("device", _of("peak_memory_gib")), ("host", _host)]),
        _Shape("speed", "Throughput", "tokens a second", [("tokens a second", _of("tokens_per_second"))]),
    ]


def _host(row: dict[str, Any]) -> float | None:
    """Peak memory of the host where the device has a memory of its own."""
    host = number(row.get("peak_host_gib"))
    return None if host == number(row.get("peak_memory_gib")) else host


def _line(run: Run, label: str, colour: int, pick: Pick, *, dots: bool = False) -> Line:
    points = [
        (step, value)
        for row in run.metrics
        if (step := number(row.get("step"))) is not None and (value := pick(row)) is not None
    ]
    return Line(label, colour, [step for step, _ in points], [value for _, value in points], dots)


def _not_finite(run: Run, curve: str) -> str:
    """How many values of a curve that must be finite were not."""
    key = {"loss": "loss", "grad-norm": "grad_norm"}.get(curve)
    logged = [row[key] for row in run.metrics if isinstance(row.get(key), int | float)] if key else []
    broken = sum(number(value) is None for value in logged)
    return f"{broken} of {len(logged)} logged values are not finite." if broken else ""
