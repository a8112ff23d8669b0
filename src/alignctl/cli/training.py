"""The training commands: everything light before the heavy wing is imported."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from alignctl.errors import Problem, RecipeError


def command(
    method: str,
    recipe: str,
    overrides: list[str] | None,
    output: Path | None,
    *,
    resume: bool,
    overwrite: bool,
    smoke: bool,
) -> None:
    """Check the recipe, claim the run folder, and train."""
    from alignctl import quiet
    from alignctl.recipe import catalog
    from alignctl.recipe.load import load
    from alignctl.rundir import RunDir

    loaded = load(catalog.find(recipe), overrides, method)
    if resume and overwrite:
        raise RecipeError(Problem("--resume", "and --overwrite contradict each other", "keep one of them"))
    run = RunDir(output or Path("runs") / (f"{loaded.name}-smoke" if smoke else loaded.name))
    if resume and not run.record:
        raise RecipeError(Problem(str(run.path), "is no run", "--output DIR names the run to go on with"))
    if not resume:
        run.create({"command": _command_line()}, overwrite=overwrite or (smoke and output is None))
    with quiet.libraries(run / "logs" / "libraries.log") as user:
        from alignctl.train import fit
        from alignctl.train.display import Display

        checkpoint = fit.checkpoint_of(run, loaded) if resume else None
        if checkpoint is not None:
            run.update(status="running", resumed_from=checkpoint.name)
        fit.fit(loaded, run, Display(user), smoke=smoke, resume=checkpoint)


def _command_line() -> str:
    """This command as it can be typed again, without the options that make no sense twice."""
    once = {"--overwrite", "--resume"}
    return shlex.join(["alignctl", *(word for word in sys.argv[1:] if word not in once)])
