"""What a person sees of a run: a table, a progress bar (plain lines on a pipe), and the outcome."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from alignctl.terminal import harmless
from alignctl.train.gates import Result

_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/margins", "margin", "{:.3f}"),
    ("rewards/accuracies", "accuracy", "{:.2f}"),
    ("pairs_per_second", "{unit}/s", "{:.2f}"),
    ("peak_memory_gib", "GiB", "{:.2f}"),
)
# Rich would send what the libraries print through its live display, past the log that it belongs in.
_OWN_STREAM: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}
_MARKS = {"passed": ("✓", "green"), "warned": ("!", "yellow"), "stopped": ("✗", "red"), "off": ("–", "dim")}
_COLOURS = {"better": "green", "no evidence": "yellow", "worse": "red", "broken": "red"}


def _grid(columns: int) -> Table:
    """A table without lines in which long words are broken, never cut."""
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column(overflow="fold")
    return table


class Display:
    """Prints one run to one stream."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False, width=None if stream.isatty() else 120)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._lines, self._unit = 0, "rows"

    def say(self, line: str) -> None:
        """One line."""
        self.console.print(Text(harmless(line)))

    def facts(self, rows: dict[str, str]) -> None:
        """The table of what will run."""
        table = _grid(2)
        for name, value in rows.items():
            table.add_row(Text(name, style="bold"), Text(harmless(value)))
        self.console.print(table)
        self.console.print()

    def gates(self, results: dict[str, Result]) -> None:
        """One line a gate."""
        table = _grid(3)
        for name, found in results.items():
            mark, style = _MARKS[found.verdict]
            table.add_row(Text(mark, style), Text(f"gate.{name}", style="bold"), Text(harmless(found.said)))
        self.console.print(table)
        self.console.print()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner, or one plain line, while something takes its time."""
        if self.console.is_terminal:
            spinner = Spinner("dots", Text(harmless(what)))
            with Live(spinner, console=self.console, transient=True, **_OWN_STREAM):
                yield
        else:
            self.say(f"{what} …")
            yield

    @contextmanager
    def training(self, unit: str) -> Iterator[None]:
        """The progress of the steps inside the block; `unit` is what a row is called."""
        self._lines, self._unit = 0, unit
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[now]}"))
        with Progress(*columns, console=self.console, **_OWN_STREAM) as self._progress:
            self._task = self._progress.add_task("step", total=None, now="")
            yield
        self._progress = None

    def step(self, row: dict[str, Any], steps: int) -> None:
        """One row of metrics."""
        if "loss" not in row:
            return
        eta = str(timedelta(seconds=round(row["eta_seconds"])))
        parts = [f"{name.format(unit=self._unit)} {form.format(row[key])}" for key, name, form in _SHOWN if key in row]
        now = "  ".join([*parts, f"eta {eta}"])
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=row["step"], total=steps, now=now)
        elif row["step"] * 20 // steps > self._lines or row["step"] in (1, steps):
            self._lines = row["step"] * 20 // steps
            self.say(f"step {row['step']}/{steps}  {now}")

    def outcome(self, verdict: str, reason: str, rows: list[tuple[str, str, str]]) -> None:
        """The verdict, and the numbers before and after."""
        self.console.print()
        self.console.print(Text.assemble((verdict, f"bold {_COLOURS.get(verdict, '')}"), f": {reason}"))
        table = Table("held-out", "before", "after", box=None, padding=(0, 2), header_style="bold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def answers(self, samples: list[dict[str, Any]]) -> None:
        """Answers before and after, side by side by prompt."""
        for sample in samples:
            self.console.print()
            self.console.print(Text(harmless(sample["prompt"]), style="bold"))
            table = _grid(3)
            for when, style in (("before", "dim"), ("after", "")):
                text = " ".join(harmless(sample[when]).split())
                shown = text if len(text) <= 300 else text[:300] + "…"
                table.add_row("", Text(when, style="bold"), Text(shown, style))
            self.console.print(table)

    def next(self, commands: list[tuple[str, str]]) -> None:
        """Commands to go on with."""
        self.console.print()
        table = _grid(2)
        for command, what in commands:
            table.add_row(Text(harmless(command), style="cyan"), Text(what))
        self.console.print(table)
