"""`alignctl compare`: runs beside each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from alignctl import rundir
from alignctl.errors import Problem, RecipeError
from alignctl.terminal import as_json as json_text
from alignctl.terminal import harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from alignctl.report.comparison import Comparison, Set

# Answers that the terminal shows, and characters of each.
ANSWERS = 2
LONGEST = 300


def command(runs: list[Path], page: Path | None, *, as_json: bool) -> None:
    """Compare `runs` with the first of them.

    Raises:
        RecipeError: they cannot be compared, or the page cannot be written.
    """
    from alignctl.report import comparison

    found = comparison.compare(runs)
    if page is not None:
        _write(page, found)
    if as_json:
        typer.echo(json_text(_values(found)))
    else:
        _show(found)
        if page is not None:
            typer.echo(harmless(f"\n{page}"))


def _values(found: Comparison) -> dict[str, object]:
    values = asdict(found)
    del values["curves"]
    for shown, known in zip(values["sets"], found.sets, strict=True):
        for row, each in zip(shown["rows"], known.rows, strict=True):
            row["verdicts"] = each.verdicts
    return values


def _write(page: Path, found: Comparison) -> None:
    from alignctl.report import html

    try:
        rundir.write_text(page, html.comparison(found))
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise RecipeError(Problem(f"--html {page}", what, "give another file")) from error


def _show(found: Comparison) -> None:
    from alignctl.report.display import console

    out = console()
    for note in found.notes:
        out.print(_text(f"note: {note}"))
    for each in found.sets:
        _numbers(out, found, each)
        out.print()
    _section(out, "recipe", found.names, found.recipe or [("the same in every key", [""] * len(found.names))])
    out.print()
    _section(out, "cost", found.names, [(row.label, row.texts) for row in found.cost])
    for each in found.sets:
        _answers(out, found.names, each)


def _text(given: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(harmless(given), style)


def _grid(*headings: str) -> Table:
    from alignctl.report.display import grid

    return grid(*headings)


def _numbers(out: Console, found: Comparison, each: Set) -> None:
    """Numbers of every run, and paired differences from the first, with 95 % intervals."""
    from alignctl.report import display, shown

    table = _grid(f"{each.name}: {each.data}", "run", "value", f"from {found.names[0]}", "")
    for row in each.rows:
        differences = ["", *(shown.difference(value, row.unit) for value in row.differences)]
        for i, name in enumerate(found.names):
            verdict = ["", *row.verdicts][i]
            label = f"{row.label} (n = {row.n})" if i == 0 else ""
            cells = [label, name, shown.estimate(row.values[i], row.unit), differences[i]]
            table.add_row(*map(_text, cells), _text(verdict, display.STYLES.get(verdict, "")))
    out.print(table)


def _section(out: Console, heading: str, names: list[str], rows: Iterable[tuple[str, list[str]]]) -> None:
    table = _grid(heading, *names)
    for label, values in rows:
        table.add_row(_text(label), *map(_text, values))
    out.print(table)


def _answers(out: Console, names: list[str], each: Set) -> None:
    """The first prompts whose answers differ."""
    for asked in [one for one in each.answers if one.changed][:ANSWERS]:
        out.print()
        out.print(_text(asked.prompt, "bold"))
        table = _grid()
        table.show_header = False
        for name, reply in zip(names, asked.replies, strict=True):
            text = " ".join(reply.text.split())
            table.add_row(_text(name, "bold"), _text(text if len(text) <= LONGEST else text[:LONGEST] + "…"))
        out.print(table)
