"""`alignctl verify`: is what a run saved what it trained?"""

from __future__ import annotations

from pathlib import Path

from alignctl import quiet, secrets
from alignctl.errors import Problem, RecipeError, VerifyError
from alignctl.recipe import schema
from alignctl.recipe.load import load
from alignctl.rundir import STAND_IN, RunDir


def command(folder: Path) -> None:
    """Look at the saved model of the run in `folder`, as its training did at its end.

    Raises:
        RecipeError: it is no run, or has saved no model.
        VerifyError: the saved model is not the trained one; run.json says so from then on.
    """
    run = RunDir(folder)
    if not run.record:
        raise RecipeError(Problem(str(folder), "is no run", "give the folder that --output named"))
    if not (run / "model").is_dir() or not (run / "logs" / "live.json").is_file():
        raise RecipeError(Problem(str(folder), f"has saved no model (status: {run.status})", "train it to its end"))
    recipe = load(run / "recipe.yaml").recipe
    if Path(recipe.model.name_or_path).absolute().is_relative_to((run / STAND_IN).absolute()):
        raise RecipeError(Problem(str(folder), "was a smoke run, whose stand-in model is gone", "verify a real run"))
    run.claim()
    before = run.record.get("gates", {})
    passed = all(before.get(name, {}).get("verdict") in ("passed", "warned") for name in ("saved", "reload"))
    written = (run / "model" / "README.md").is_file()  # the last thing before the saved model is looked at
    with secrets.kept_out(run.path), quiet.libraries(run / "logs" / "libraries.log") as user:
        from alignctl.train import verify
        from alignctl.train.display import Display
        from alignctl.train.gates import Gates

        display = Display(user)
        gates = Gates(recipe.model_copy(update={"gates": schema.Gates()}), run, display.say)
        try:
            with display.waiting("looking at the saved model"), verify.begin(run) as reloading:
                verify.scan(run, gates)
                verify.reload(run, gates, reloading)
        except VerifyError as error:
            run.update(status="failed", why=str(error))
            raise
        if written and not passed and run.record["status"] == "failed":
            run.update(status="finished", why=None)
        display.gates({name: found for name, found in gates.results.items() if name in ("saved", "reload")})
