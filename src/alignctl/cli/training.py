"""The training commands: everything light before the heavy wing is imported."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from alignctl import quiet
from alignctl.cli import signals
from alignctl.errors import Interrupted, Problem, RecipeError
from alignctl.recipe import catalog
from alignctl.recipe.load import Loaded, load
from alignctl.rundir import RunDir, now


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
    loaded = load(catalog.find(recipe), overrides, method)
    if resume and overwrite:
        raise RecipeError(Problem("--resume", "and --overwrite contradict each other", "keep one of them"))
    run = RunDir(output or Path("runs") / (f"{loaded.name}-smoke" if smoke else loaded.name))
    checkpoint, killed, last = None, False, None
    if resume:
        checkpoint = _checkpoint(run, loaded)
        killed, last = run.status == "killed", next(reversed(run.metrics()), None)
        run.claim()
        run.cut_metrics(int(checkpoint.name.removeprefix("step-")))
        run.update(status="running", resumed_from=checkpoint.name)
    else:
        run.create({"command": _command_line()}, overwrite=overwrite or (smoke and output is None))
    # One process trains on one GPU; with several in sight the Trainer would ask for DataParallel, which TRL refuses.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with _recorded(run), quiet.libraries(run / "logs" / "libraries.log") as user:
        from alignctl.train import fit, machine
        from alignctl.train.display import Display

        signals.check()
        display = Display(user)
        if killed:
            display.say(machine.killed(last))
        fit.fit(loaded, run, display, smoke=smoke, resume=checkpoint)


def _checkpoint(run: RunDir, loaded: Loaded) -> Path:
    """The checkpoint that `--resume` goes on from.

    Raises:
        RecipeError: there is none, the run is finished, or it was made by another recipe.
    """
    if not run.record:
        raise RecipeError(Problem(str(run.path), "is no run", "--output DIR names the run to go on with"))
    if run.record["status"] == "finished":
        raise RecipeError(Problem(str(run.path), "is finished already", "--output DIR to train again"))
    if not run.checkpoints():
        raise RecipeError(Problem(str(run.path), "has no checkpoint to go on from", "start it without --resume"))
    if (run / "recipe.yaml").read_text(encoding="utf-8") != loaded.text():
        way_out = f"resume with {run / 'recipe.yaml'}, or train anew with --output DIR"
        raise RecipeError(Problem(str(run.path), "was made by another recipe than this one is now", way_out))
    return run.checkpoints()[-1]


@contextlib.contextmanager
def _recorded(run: RunDir) -> Iterator[None]:
    """Write to run.json how the block inside ended, when it did not end well."""
    try:
        yield
    except (Exception, Interrupted) as error:
        cause = signals.behind(error)
        status = "interrupted" if isinstance(cause, Interrupted) else "failed"
        with contextlib.suppress(OSError):  # on a full disk the first error is the one to tell
            run.update(status=status, why=str(cause), ended=now())
        raise


def _command_line() -> str:
    """This command as it can be typed again, without the options that make no sense twice."""
    once = {"--overwrite", "--resume"}
    return shlex.join(["alignctl", *(word for word in sys.argv[1:] if word not in once)])
