"""Several runs beside each other: recipes, the same held-out rows, the same prompts, curves and cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignctl.errors import Problem, RecipeError
from alignctl.report import curves, heldout, shown, view
from alignctl.report.answers import ROOM, Asked, Reply, fitted
from alignctl.report.gather import Run, gather
from alignctl.report.heldout import Measured, Replied
from alignctl.report.measures import HELD_OUT, Estimate
from alignctl.report.values import dig, number, table, text

Columns = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One number of every run, and its paired difference of each further run from the first, row by row."""

    name: str
    label: str
    unit: str
    n: int
    better: str | None
    values: list[Estimate | None]
    differences: list[Estimate | None]

    @property
    def verdicts(self) -> list[str]:
        """What each difference says: `better`, `worse`, `no evidence`, or nothing where no way is better."""
        return [_verdict(each, self.better) for each in self.differences]


@dataclass(frozen=True)
class Set:
    """One set of held-out rows that every run was measured on."""

    name: str
    fingerprint: str
    data: str
    rows: list[Row]
    answers: list[Asked]


@dataclass(frozen=True)
class Cost:
    """What a run took of one thing, by run; `texts` is for readers."""

    label: str
    values: list[float | None]
    texts: list[str]


@dataclass(frozen=True)
class Comparison:
    """Two or more runs; the first is what the others are held against."""

    names: list[str]
    paths: list[str]
    methods: list[str]
    statuses: list[str]
    notes: list[str]
    recipe: list[tuple[str, list[str]]]
    sets: list[Set]
    cost: list[Cost]
    curves: list[curves.Curve] = field(repr=False)


def compare(paths: list[Path]) -> Comparison:
    """The runs in the folders `paths`.

    Raises:
        RecipeError: there are fewer than two, one is no run, or they were measured on different rows.
    """
    folders = {path.resolve(): path for path in paths}
    if len(folders) < 2:
        raise RecipeError(Problem("compare", "there is nothing to compare with", "name two runs or more"))
    runs = [gather(path) for path in folders.values()]
    names = _names(runs)
    return Comparison(
        names=names,
        paths=[str(run.path) for run in runs],
        methods=[run.method for run in runs],
        statuses=[run.status for run in runs],
        notes=_notes(runs, names),
        recipe=recipes(runs),
        sets=_sets(runs, names),
        cost=_cost(runs),
        curves=curves.overlaid(runs, names),
    )


def _names(runs: list[Run]) -> list[str]:
    """The folders' names, or their paths where two have one name."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run.path) for run in runs]


def _notes(runs: list[Run], names: list[str]) -> list[str]:
    notes = [
        f"{name} is {run.status}: {text(run.record.get('why')) or 'its numbers are not final'}"
        for run, name in zip(runs, names, strict=True)
        if run.status != "finished"
    ]
    if len({(run.method, run.beta) for run in runs}) > 1 and "sft" not in {run.method for run in runs}:
        notes.append(
            "Rewards are in units of beta, and each method has its own; so preferences are compared by the mean "
            "log-probability a token of the chosen and the rejected answer."
        )
    for run, name in zip(runs, names, strict=True):
        notes += [f"{name}: cannot read {line}" for line in run.unread]
    return notes


def recipes(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The keys in which the recipes differ, dotted, with the value of each run; a dash where it has no such key."""
    flat = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    found = [(key, [values.get(key, "–") for values in flat]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _flat(values: dict[str, Any], above: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{above}{key}.")
        elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
            out |= _flat({str(i): each for i, each in enumerate(value)}, f"{above}{key}.")
        else:
            out[f"{above}{key}"] = _yaml(value)
    return out


def _yaml(value: object) -> str:
    """A value as a recipe spells it."""
    if value is None:
        return "null"
    return text(value).lower() if isinstance(value, bool) else text(value)


def _sets(runs: list[Run], names: list[str]) -> list[Set]:
    """Every set of held-out rows that all runs were measured on, the recipe's own first.

    Raises:
        RecipeError: the runs held out different rows, and share no evaluation.
    """
    own = [text(dig(run.record, "data", "eval", "fingerprint")) for run in runs]
    found = []
    if len(set(own)) == 1 and own[0]:
        found.append(_set(HELD_OUT, own[0], [heldout.own(run) for run in runs], runs))
    for name, fingerprint in heldout.shared(runs):
        if fingerprint != own[0] or not found:
            found.append(_set(name, fingerprint, [heldout.evaluated(run, name) for run in runs], runs))
    if not found and len({each for each in own if each}) > 1:
        raise RecipeError(_different(runs, names, own))
    return found


def _different(runs: list[Run], names: list[str], own: list[str]) -> Problem:
    """The held-out sets by name, and how to get numbers of one set."""
    said = "; ".join(
        f"{name} on {heldout.describe(run)} (fingerprint {print_[:12] or 'none'})"
        for run, name, print_ in zip(runs, names, own, strict=True)
    )
    files = {heldout.files(run) for run in runs}
    why = " The file is one, its tokens are not: another tokenizer, template or max_length." if len(files) == 1 else ""
    commands = " and ".join(f"alignctl eval {run.path} --data FILE" for run in runs)
    return Problem("compare", f"the runs were measured on different held-out rows: {said}.{why}", commands)


def _set(name: str, fingerprint: str, measured: list[Measured], runs: list[Run]) -> Set:
    return Set(
        name,
        fingerprint,
        heldout.describe(runs[0]) if name == HELD_OUT else measured[0].data,
        rows(measured, runs),
        _answers([each.replies for each in measured], runs),
    )


def rows(measured: list[Measured], runs: list[Run]) -> list[Row]:
    """Numbers of every run on the same rows, with paired differences from the first run."""
    columns = [each.columns for each in measured]
    out = [
        row
        for name, label, unit, better, column, share in _MEASURES
        if (row := _row(name, label, unit, better, [column(each) for each in columns], share=share)) is not None
    ]
    if _same_rewards(runs):
        picked = [
            [b - a for a, b in zip(c.get("rejected_rewards", []), c.get("chosen_rewards", []), strict=False)]
            for c in columns
        ]
        rights = [[_right(m) for m in margins] for margins in picked]
        out += [
            row
            for row in (
                _row("reward_accuracy", "reward accuracy", "share", "higher", rights, share=True),
                _row("margin", "reward margin", "", "higher", picked),
            )
            if row is not None
        ]
    return out + _answer_rows([each.replies for each in measured])


def _same_rewards(runs: list[Run]) -> bool:
    """Whether rewards mean the same in all runs: one method, one beta, one reference."""
    kinds = {
        (
            run.method,
            text(run.beta),
            text(run.record.get("reference")),
            text(dig(run.record, "model", "base_fingerprint")),
        )
        for run in runs
    }
    return len(kinds) == 1


def _right(margin: float) -> float:
    """A pair told apart; a tie is half."""
    return 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0


def _margins(columns: Columns) -> list[float]:
    """How much likelier a token of the chosen answer is than one of the rejected, nats; `[n]`."""
    sides = (columns.get(f"{side}_logps_per_token", []) for side in ("chosen", "rejected"))
    return [chosen - rejected for chosen, rejected in zip(*sides, strict=False)]


_MEASURES: tuple[tuple[str, str, str, str | None, Callable[[Columns], list[float]], bool], ...] = (
    (
        "accuracy_per_token",
        "length-normalised accuracy",
        "share",
        "higher",
        lambda c: [_right(margin) for margin in _margins(c)],
        True,
    ),
    ("margin_per_token", "length-normalised margin", "nats", "higher", _margins, False),
    (
        "chosen_logps_per_token",
        "chosen log-prob a token",
        "nats",
        None,
        lambda c: c.get("chosen_logps_per_token", []),
        False,
    ),
    ("nll", "negative log-likelihood a token", "nats", "lower", lambda c: c.get("nll", []), False),
)


def _row(
    name: str, label: str, unit: str, better: str | None, columns: list[list[float]], *, share: bool = False
) -> Row | None:
    """A number from one value a row and run, `[n]` each; a run without values, or with other rows, has none."""
    n = len(columns[0]) or max(map(len, columns))
    if not n:
        return None
    whole = [column if len(column) == n else [] for column in columns]
    values = [_share(column) if share else _mean(column) for column in whole]
    differences = [_mean([b - a for a, b in zip(whole[0], column, strict=False)]) for column in whole[1:]]
    return Row(name, label, unit, n, better, values, differences)


def _mean(column: list[float]) -> Estimate | None:
    if not column:
        return None
    import numpy

    from alignctl.statistics import bootstrap_mean

    values = numpy.array(column)
    return Estimate(float(values.mean()), bootstrap_mean(values))


def _share(column: list[float]) -> Estimate | None:
    if not column:
        return None
    from alignctl.statistics import wilson

    return Estimate(sum(column) / len(column), wilson(sum(column), len(column)))


def _verdict(difference: Estimate | None, better: str | None) -> str:
    if difference is None or difference.interval is None or better is None:
        return ""
    from alignctl.statistics import verdict

    low, high = difference.interval
    return verdict((low, high) if better == "higher" else (-high, -low))


def _answer_rows(replies: list[dict[str, Replied]]) -> list[Row]:
    """Length and end of the answers to the prompts that all runs were asked."""
    prompts = _shared_prompts(replies)
    tokens = [[_plain(each[prompt].tokens) for prompt in prompts] for each in replies]
    stops = [[_plain(each[prompt].stopped) for prompt in prompts] for each in replies]
    found = (
        _row("answer_tokens", "answer length", "tokens", None, [_whole(each) for each in tokens]),
        _row("stop_rate", "answers that end by themselves", "share", "higher", [_whole(e) for e in stops], share=True),
    )
    return [row for row in found if row is not None]


def _plain(value: float | None) -> float | None:
    return None if value is None else float(value)


def _whole(column: list[float | None]) -> list[float]:
    found = [value for value in column if value is not None]
    return found if len(found) == len(column) else []


def _shared_prompts(replies: list[dict[str, Replied]]) -> list[str]:
    return [prompt for prompt in replies[0] if all(prompt in each for each in replies[1:])]


def _answers(replies: list[dict[str, Replied]], runs: list[Run]) -> list[Asked]:
    """The same prompts' answers, a run a column."""
    names = _names(runs)
    found = [
        Asked(
            prompt,
            replies[0][prompt].preferred,
            tuple(
                Reply(name, each[prompt].text, each[prompt].tokens, each[prompt].stopped)
                for name, each in zip(names, replies, strict=True)
            ),
        )
        for prompt in _shared_prompts(replies)
    ]
    return fitted(found, ROOM)


def _cost(runs: list[Run]) -> list[Cost]:
    kinds: tuple[tuple[str, Callable[[Run], float | None], Callable[[float | None], str]], ...] = (
        ("time", lambda run: number(run.record.get("seconds")), shown.duration),
        ("steps", lambda run: _last(run, "step"), _whole_number),
        ("training rows", lambda run: number(dig(run.record, "data", "train", "rows")), _whole_number),
        ("tokens of the rows seen", _tokens, _whole_number),
        ("peak memory", view.peak_memory, lambda gib: "–" if gib is None else f"{gib:.2f} GiB"),
        ("trained weights", lambda run: number(dig(run.record, "model", "trainable")), _whole_number),
    )
    out = []
    for label, ask, form in kinds:
        values = [ask(run) for run in runs]
        out.append(Cost(label, values, [form(value) for value in values]))
    machines = [text(dig(run.record, "machine", "name")) or "–" for run in runs]
    return [*out, Cost("machine", [None] * len(runs), machines)]


def _whole_number(found: float | None) -> str:
    return "–" if found is None else f"{found:,.0f}"


def _last(run: Run, key: str) -> float | None:
    return next((v for row in reversed(run.metrics) if (v := number(row.get(key))) is not None), None)


def _tokens(run: Run) -> float | None:
    """Tokens of the rows that were trained on, a prompt counted once: the ledger's mean row times the rows seen."""
    means = [number(mean) for mean in table(dig(run.ledger, "train", "lengths", "mean")).values()]
    rows, epochs = number(dig(run.record, "data", "train", "rows")), _last(run, "epoch")
    if not means or None in means or rows is None or epochs is None:
        return None
    return sum(mean for mean in means if mean is not None) * rows * epochs
