"""The training commands: everything light before the heavy wing is imported."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from alignctl import quiet, secrets
from alignctl.cli import signals
from alignctl.errors import Interrupted, Problem, RecipeError
from alignctl.recipe import catalog, tree
from alignctl.recipe.load import Loaded, load
from alignctl.rundir import RunDir, now
from alignctl.terminal import harmless


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
    # One process trains on one GPU; with several in sight the Trainer would ask for DataParallel, which TRL refuses.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    checkpoint, killed, last = None, False, None
    try:
        if resume:
            checkpoint = _checkpoint(run, loaded, smoke=smoke)
            killed, last = run.status == "killed", next(reversed(run.metrics()), None)
            run.go_on(checkpoint)
        else:
            run.create({"command": _command_line()}, overwrite=overwrite or (smoke and output is None))
        with secrets.kept_out(run.path), _recorded(run), quiet.libraries(run / "logs" / "libraries.log") as user:
            from alignctl.train import fit, machine, record
            from alignctl.train.display import Display
            from alignctl.train.gates import Gates

            signals.check()
            display = Display(user)
            if killed:
                display.say(machine.killed(last, run.record.get("memory", {})))
            if checkpoint is not None and loaded.recipe.gates.resume:
                record.check(run, checkpoint, Gates(loaded.recipe, run, display.say))
            fit.fit(loaded, run, display, smoke=smoke, resume=checkpoint)
    finally:
        run.release()


def _checkpoint(run: RunDir, loaded: Loaded, *, smoke: bool) -> Path:
    """The checkpoint that `--resume` goes on from; the run is claimed.

    Raises:
        RecipeError: there is none, the run is finished or being written, or it was made by another recipe.
    """
    if not run.record:
        raise RecipeError(Problem(str(run.path), "is no run", "--output DIR names the run to go on with"))
    run.claim()
    if run.status == "finished":
        raise RecipeError(Problem(str(run.path), "is finished already", "--output DIR to train again"))
    if smoke:
        raise RecipeError(Problem("--resume", "and --smoke contradict each other", "start the smoke run anew"))
    if not run.checkpoints():
        way_out = f"start it {'with --overwrite' if run.trained else 'without --resume'}"
        raise RecipeError(Problem(str(run.path), "has no checkpoint to go on from", way_out))
    before = tree.read(run / "recipe.yaml").values
    if before | {"gates": None} != loaded.resolved() | {"gates": None}:  # a gate may be switched off on the way
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
        stopped = _with_way_out(cause, run) if isinstance(cause, Interrupted) else None
        with contextlib.suppress(OSError):  # on a full disk the first error is the one to tell
            run.update(status="interrupted" if stopped else "failed", why=str(stopped or cause), ended=now())
        _report(run)
        if stopped is not None:
            raise stopped from error
        raise


def _report(run: RunDir) -> None:
    """The page of a run that did not end well, where there is a log to show."""
    if (run / "metrics.jsonl").is_file():
        from alignctl.report import html

        print(harmless(html.made(run.path)))


def _with_way_out(stopped: Interrupted, run: RunDir) -> Interrupted:
    """A run that was stopped at once says what it goes on from, too."""
    (problem,) = stopped.problems
    if problem.way_out or not run.checkpoints():
        return stopped
    what = f"{problem.what}; the last checkpoint is {run.checkpoints()[-1].name}"
    way_out = f"{run.record['command']} --resume"
    return Interrupted(stopped.exit_code - 128, Problem(str(run.path), what, way_out))


def _command_line() -> str:
    """This command as it can be typed again, without the options that make no sense twice."""
    once = {"--overwrite", "--resume"}
    return shlex.join(["alignctl", *(secrets.hide(word) for word in sys.argv[1:] if word not in once)])
