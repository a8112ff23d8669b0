"""What stands on the page of one run, in its order, as plain values."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignctl.report import shown
from alignctl.report.gather import Run
from alignctl.report.measures import Evaluation, Measure
from alignctl.report.values import dig, number, numbers, rows, table, text

_TONES = {"better": "good", "worse": "bad", "broken": "bad", "failed": "bad"}
# As `alignctl eval` calls them, and as summary.json does.
_CARDS = (
    "reward_accuracy",
    "reward_margin",
    "margin",
    "nll",
    "chosen_logps_per_token",
    "tokens",
    "mean_tokens",
    "stop_rate",
    "general_perplexity",
)
MARKS = {"passed": "✓", "warned": "!", "stopped": "✗", "off": "–"}


@dataclass(frozen=True)
class Banner:
    """The verdict in one word, its tone, and the sentence that says why."""

    word: str
    tone: str
    reason: str


@dataclass(frozen=True)
class Card:
    """One key number."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Gate:
    """One gate's answer."""

    name: str
    verdict: str
    said: str
    value: str
    limit: str

    @property
    def mark(self) -> str:
        return MARKS.get(self.verdict, "?")


@dataclass(frozen=True)
class Part:
    """Where the rows of one part went."""

    name: str
    lines: list[tuple[str, str, str]]
    percentiles: list[str]
    sides: list[tuple[str, list[str]]]
    share: str
    lengths: dict[str, Any]


@dataclass(frozen=True)
class Memory:
    """Planned against measured peak memory, GiB."""

    planned: float | None
    measured: float | None
    lines: list[tuple[str, float]]


def banner(run: Run, evaluations: list[Evaluation]) -> Banner:
    """The verdict of a finished run, and what became of any other."""
    if run.status != "finished":
        why = text(run.record.get("why"))
        if run.status == "killed" and not why:
            why = "The process ended without a word: most likely it was killed, or the machine went down."
        return Banner(run.status, _TONES.get(run.status, "fair"), why)
    if evaluations:
        first = evaluations[0]
        return Banner(first.verdict or "measured", _TONES.get(first.verdict, "fair"), first.reason)
    return Banner("finished", "fair", text(run.summary.get("verdict")) or "Nothing was measured on held-out rows.")


def cards(run: Run, evaluations: list[Evaluation]) -> list[Card]:
    """The numbers that a reader asks for first."""
    found = [] if not evaluations else [evaluations[0].find(name) for name in _CARDS]
    out = [_card(measure) for measure in found if measure is not None and measure.tuned is not None]
    steps = [step for row in run.metrics if "loss" in row and (step := number(row.get("step"))) is not None]
    if steps:
        out.append(Card("steps", f"{steps[-1]:,.0f}", _rows(run)))
    seconds = number(run.record.get("seconds"))
    if seconds is not None:
        out.append(Card("time", shown.duration(seconds), _speed(run)))
    peak = peak_memory(run)
    if peak is not None:
        out.append(Card("peak memory", f"{peak:.2f} GiB", text(dig(run.record, "machine", "name"))))
    return out


def _card(measure: Measure) -> Card:
    assert measure.tuned is not None
    detail = []
    if measure.tuned.interval is not None:
        detail.append(" to ".join(shown.value(end, measure.unit) for end in measure.tuned.interval))
    if measure.reference is not None:
        detail.append(f"before: {shown.value(measure.reference.value, measure.unit)}")
    return Card(measure.label, shown.value(measure.tuned.value, measure.unit), " · ".join(detail))


def _rows(run: Run) -> str:
    kept = number(dig(run.record, "data", "train", "rows"))
    return "" if kept is None else f"{kept:,.0f} training rows"


def _speed(run: Run) -> str:
    found = sorted(v for row in run.metrics if (v := number(row.get("tokens_per_second"))) is not None)
    return f"{found[len(found) // 2]:,.0f} tokens a second" if found else ""


def peak_memory(run: Run) -> float | None:
    """The most memory that any log line names, GiB."""
    return max((v for row in run.metrics if (v := number(row.get("peak_memory_gib"))) is not None), default=None)


def gates(run: Run) -> list[Gate]:
    """The gates in the order in which they were asked."""
    return [
        Gate(
            text(name),
            text(dig(found, "verdict")),
            text(dig(found, "said")),
            _held(dig(found, "value")),
            _held(dig(found, "limit")),
        )
        for name, found in table(run.record.get("gates")).items()
    ]


def _held(value: object) -> str:
    found = number(value)
    return text(value) if found is None else f"{found:.6g}"


def gate_counts(found: list[Gate]) -> str:
    """How many gates said what."""
    counts = {verdict: sum(gate.verdict == verdict for gate in found) for verdict in MARKS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def parts(run: Run) -> list[Part]:
    """The ledger of training and of held-out rows."""
    return [_part(name, run.ledger[name]) for name in ("train", "eval") if isinstance(run.ledger.get(name), dict)]


def _part(name: str, ledger: dict[str, Any]) -> Part:
    tokens = table(ledger.get("tokens"))
    percentiles = list(table(next(iter(tokens.values()), {})))
    sides = [(side, [_count(dig(values, p)) for p in percentiles]) for side, values in tokens.items()]
    return Part(name, _lines(name, ledger), percentiles, sides, _share(ledger), _lengths(ledger))


def _count(value: object) -> str:
    found = number(value)
    return "" if found is None else f"{found:,.0f}"


def _lines(name: str, ledger: dict[str, Any]) -> list[tuple[str, str, str]]:
    out = [(_count(ledger.get("rows")), f"rows in {name}", "")]
    for key, what, sign in (("set_aside", "set aside", "−"), ("dropped", "dropped", "−")):
        out += [_reason(what, sign, reason, found) for reason, found in table(ledger.get(key)).items()]
    out.append((_count(ledger.get("kept")), "kept", ""))
    out += [_reason("cut", "", reason, found) for reason, found in table(ledger.get("cut")).items()]
    for key, what in (("duplicates", "duplicates"), ("near_duplicates", "near duplicates"), ("ties", "ties")):
        if number(dig(ledger, key, "rows")):
            out.append(_reason("of them", "", what, ledger[key]))
    return out


def _reason(what: str, sign: str, reason: str, found: object) -> tuple[str, str, str]:
    first = dig(found, "first")
    places = ", ".join(map(text, first)) if isinstance(first, list) else ""
    return (f"{sign}{_count(dig(found, 'rows'))}", f"{what}: {reason}", places)


def _share(ledger: dict[str, Any]) -> str:
    share, longer = number(ledger.get("supervised_share")), number(ledger.get("chosen_longer"))
    said = [] if share is None else [f"{share:.1%} of the tokens are trained"]
    if longer is not None:
        said.append(f"the chosen answer is the longer one in {longer:.1%}")
    return "; ".join(said)


def _lengths(ledger: dict[str, Any]) -> dict[str, Any]:
    """The histogram of lengths where it is whole: edges, and as many counts but one a side."""
    edges = numbers(dig(ledger, "lengths", "edges"))
    counts = {side: numbers(v) for side, v in table(dig(ledger, "lengths", "counts")).items()}
    whole = {side: v for side, v in counts.items() if len(v) == len(edges) - 1 and v}
    return {"edges": edges, "counts": whole} if whole else {}


def findings(run: Run) -> list[tuple[str, str, str]]:
    """What `alignctl check` finds odd about the rows: name, what, and what it means."""
    return [
        (text(row.get("name")), text(row.get("said")), text(row.get("meaning")))
        for row in rows(run.ledger.get("findings"))
        if row.get("warns")
    ]


def sources(run: Run) -> list[str]:
    """Where the rows came from."""
    found = [text(row.get("path")) for part in ("train", "eval") for row in rows(dig(run.ledger, part, "sources"))]
    return list(dict.fromkeys(path for path in found if path))


def memory(run: Run) -> Memory | None:
    """What was planned and what it took; None where neither is known."""
    noted = table(run.record.get("memory"))
    measured = number(noted.get("measured_gib"))
    lines = [(text(row.get("name")), number(row.get("bytes"))) for row in rows(noted.get("lines"))]
    found = Memory(
        number(noted.get("planned_gib")),
        peak_memory(run) if measured is None else measured,
        [(name, size / 2**30) for name, size in lines if size is not None],
    )
    return found if found.planned is not None or found.measured is not None else None


def facts(run: Run) -> list[tuple[str, str]]:
    """What ran, where and on what."""
    record, model = run.record, table(run.record.get("model"))
    machine = table(record.get("machine"))
    trainable, total = number(model.get("trainable")), number(model.get("parameters"))
    beta = number(run.beta)
    revision = text(model.get("revision") or model.get("commit"))
    found = [
        ("method", run.method + ("" if beta is None else f", beta {beta:g}")),
        ("model", text(model.get("name_or_path") or dig(run.recipe, "model", "name_or_path"))),
        ("revision", revision),
        ("trained", "" if trainable is None or not total else f"{trainable:,.0f} of {total:,.0f} weights"),
        ("adapter", text(model.get("adapter"))),
        ("reference", text(record.get("reference"))),
        ("data", ", ".join(sources(run))),
        ("machine", ", ".join(filter(None, (text(machine.get("name")), text(machine.get("dtype")))))),
        ("engine", _engine(table(record.get("engine")))),
        ("started", shown.moment(text(record.get("started")))),
        ("resumed from", text(record.get("resumed_from"))),
    ]
    return [(name, value) for name, value in found if value]


def _engine(engine: dict[str, Any]) -> str:
    if not engine:
        return ""
    packed, padded = number(engine.get("packed_tokens")), number(engine.get("padded_tokens"))
    if not engine.get("packed"):
        return f"padded: {text(engine.get('why'))}"
    return (
        "packed"
        if packed is None or padded is None
        else f"packed: {packed:,.0f} tokens in the first batch instead of {padded:,.0f}"
    )


def commands(run: Run) -> list[tuple[str, str]]:
    """What runs the same again: the command as it was typed, and one that needs nothing but this folder."""
    typed = text(run.record.get("command"))
    out = [("as it was started", typed)] if typed else []
    model = text(dig(run.recipe, "model", "name_or_path"))
    if run.recipe and not Path(model).absolute().is_relative_to((run.path / "stand-in").absolute()):
        recipe, again = (shlex.quote(str(each)) for each in (run.path / "recipe.yaml", f"{run.path}-again"))
        out.append(("from the recipe in its folder", f"alignctl {run.method} {recipe} --output {again}"))
    return out


def pins(run: Run) -> list[tuple[str, str]]:
    """What decides whether the numbers come out the same again."""
    record = run.record
    data = [
        (f"{name} rows", f"{_count(dig(found, 'rows'))}, SHA-256 of their ids {text(dig(found, 'fingerprint'))[:16]}")
        for name, found in table(record.get("data")).items()
        if dig(found, "fingerprint")
    ]
    found = [
        ("seed", text(record.get("seed"))),
        ("git commit", text(record.get("git"))),
        ("base weights", text(dig(record, "model", "base_fingerprint"))[:16]),
        ("template", text(dig(record, "template", "sha256"))[:16]),
        *data,
        *((name, text(version)) for name, version in table(record.get("versions")).items()),
    ]
    return [(name, value) for name, value in found if value]
