"""The table of built-in recipes."""

from __future__ import annotations

import typer

from alignctl.recipe import catalog, load

HEAD = ("recipe", "method", "model", "needs")


def show_all() -> None:
    """Print name, method, model and needs of every built-in recipe, a line each."""
    rows = [HEAD]
    for name in catalog.names():
        entry = catalog.entry(name)
        recipe = load.load(entry.path).recipe
        rows.append((name, recipe.method, recipe.model.name_or_path, entry.needs))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
