"""`alignctl report`: the page of one run."""

from __future__ import annotations

from pathlib import Path

import typer

from alignctl.errors import Problem, RecipeError
from alignctl.terminal import harmless


def command(folder: Path) -> None:
    """Write the page, and print where it is.

    Raises:
        RecipeError: the folder holds no run, or cannot be written.
    """
    from alignctl.report import html

    try:
        written = html.write(folder)
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise RecipeError(Problem(str(folder / html.NAME), what, "copy the run to a folder that can be")) from error
    typer.echo(harmless(str(written)))
