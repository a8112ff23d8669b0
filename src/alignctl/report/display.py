"""Tables for a terminal."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from alignctl.terminal import harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STYLES = {
    "finished": "green",
    "better": "green",
    "failed": "red",
    "broken": "red",
    "worse": "red",
    "killed": "yellow",
    "interrupted": "yellow",
    "foreign": "dim",
}
# Columns where nobody looks: on a pipe, lines are for other programs.
_PIPE = 200


def console() -> Console:
    """Standard output, as wide as the terminal."""
    from rich.console import Console

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPE
    return Console(highlight=False, width=width)


def grid(*headings: str) -> Table:
    """A table without lines in which long words are broken, never cut."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings or ("", ""):
        table.add_column(Text(harmless(heading)), overflow="fold")
    return table
