"""`alignctl runs`: what is in a folder of runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from alignctl.errors import Problem, RecipeError
from alignctl.terminal import as_json as json_text
from alignctl.terminal import harmless

if TYPE_CHECKING:
    from alignctl.report.listing import Row


def command(folder: Path, *, as_json: bool) -> None:
    """List the runs below `folder`.

    Raises:
        RecipeError: there is no such folder.
    """
    from alignctl.report.listing import listing

    if not folder.is_dir():
        raise RecipeError(Problem(str(folder), "is no folder", "alignctl runs DIR names the one that holds the runs"))
    rows = listing(folder)
    if as_json:
        typer.echo(json_text([asdict(row) for row in rows]))
    elif rows:
        _show(rows, folder)
    else:
        typer.echo(harmless(f"no runs in {folder}"))


def _show(rows: list[Row], folder: Path) -> None:
    """One line a run, and what is odd about some of them."""
    from rich.text import Text

    from alignctl.report import display, shown

    out = display.console()
    sft = any(row.nll is not None for row in rows)
    table = display.grid(
        "run",
        "status",
        "method",
        "model",
        "data",
        "verdict",
        "accuracy",
        "margin",
        *(["nll"] if sft else []),
        "time",
        "started",
    )
    for row in rows:
        numbers = [(row.accuracy, "{:.3f}"), (row.margin, "{:.3f}"), *([(row.nll, "{:.3f}")] if sft else [])]
        table.add_row(
            Text(harmless(_below(row.path, folder)), "bold"),
            Text(harmless(row.status), display.STYLES.get(row.status, "")),
            *(Text(harmless(each)) for each in (row.method, row.model, row.data, row.verdict)),
            *("" if value is None else form.format(value) for value, form in numbers),
            "" if row.seconds is None else shown.duration(row.seconds),
            harmless(shown.moment(row.started)),
        )
    out.print(table)
    for row in rows:
        if row.note:
            name, said = _below(row.path, folder), " ".join(row.note.split())
            out.print(Text.assemble((harmless(name), "bold"), f": {harmless(said)}"))


def _below(path: str, folder: Path) -> str:
    return "." if Path(path) == folder else str(Path(path).relative_to(folder))
