"""`alignctl doctor`: what this machine has for training, what each gap costs, and the way out."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from alignctl import quiet
from alignctl.cli import signals
from alignctl.errors import MachineError
from alignctl.recipe import catalog
from alignctl.recipe.load import load
from alignctl.terminal import as_json as json_text
from alignctl.terminal import harmless

if TYPE_CHECKING:
    from rich.console import Console

    from alignctl.train.checkup import Check

MARKS = {"ok": ("✓", "green"), "gap": ("!", "bold yellow"), "broken": ("✗", "bold red")}


def command(recipe: str | None, overrides: list[str] | None, *, as_json: bool) -> None:
    """Print every check.

    Raises:
        MachineError: training cannot work, or not that of `recipe`.
    """
    loaded = None if recipe is None else load(catalog.find(recipe), overrides)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # as the training commands do
    with quiet.libraries(Path(os.devnull)) as out:
        from alignctl.train import checkup, demands
        from alignctl.train.display import Display

        checks = checkup.examine()
        signals.check()
        if loaded is not None:
            checks += demands.examine(loaded.recipe, checks)
        broken = [check for check in checks if check.state == "broken"]
        if as_json:
            out.write(json_text({"works": not broken, "checks": [asdict(check) for check in checks]}) + "\n")
        else:
            _show(Display(out).console, checks, loaded.recipe.method if loaded else None)
        out.flush()
    if broken:
        raise MachineError(*(check.problem() for check in broken))


def _show(console: Console, checks: list[Check], method: str | None) -> None:
    """One line a check, a gap with what it costs and the way out; packages that are as they should be on one line."""
    from rich.text import Text

    fine = [check for check in checks if check.name.startswith("package.") and check.state == "ok"]
    for check in checks:
        if check in fine:
            if check is fine[0]:
                versions = ", ".join(f"{each.name.removeprefix('package.')} {each.found}" for each in fine)
                console.print(Text.assemble(("✓ ", "green"), ("packages", "bold"), f"  {versions}"))
            continue
        mark, style = MARKS[check.state]
        console.print(Text.assemble((f"{mark} ", style), (check.name, "bold"), f"  {harmless(check.found)}"))
        for line in (check.cost, check.way_out and f"→ {check.way_out}"):
            if line:
                console.print(Text(f"    {harmless(line)}"))
    console.print()
    what = f"this recipe's {method.upper()}" if method else "training"
    broken = sum(check.state == "broken" for check in checks)
    gaps = sum(check.state == "gap" for check in checks)
    said = f"{what} cannot work on this machine" if broken else f"{what} works on this machine"
    console.print(Text(f"{said}; gaps: {gaps}, broken: {broken}", "red" if broken else "green"))
