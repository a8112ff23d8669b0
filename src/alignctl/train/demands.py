"""What one recipe asks of this machine, in the words that its training would stop with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignctl.errors import AlignctlError
from alignctl.recipe.schema import Recipe
from alignctl.train.checkup import Check, State, asked


def examine(recipe: Recipe, here: list[Check]) -> list[Check]:
    """Every demand of `recipe` that can be told without loading its model; `here` is what the machine has.

    Where the trainers cannot be imported, that comes first.
    """

    def dtype() -> Check:
        from alignctl.train import machine

        return _stops("recipe.dtype", lambda: str(machine.detect().precision(recipe.model.dtype)))

    def tracker() -> Check:
        from alignctl.train import trackers

        def found() -> str:
            trackers.check(recipe)
            return recipe.logging.report_to

        return _stops("recipe.tracker", found)

    def optimizer() -> Check:
        from alignctl.train import arguments, machine

        wanted, taken = recipe.training.optim, arguments.optimizer(recipe, machine.detect())
        if wanted == taken:
            return Check("recipe.optimizer", "ok", wanted)
        cost = f"{taken} takes its place, and keeps its states in 32 bits"
        return Check("recipe.optimizer", "gap", f"{wanted} needs CUDA", cost, "a GPU, or leave it so")

    importable = all(check.state == "ok" for check in here if check.name == "imports")
    computing = (dtype, tracker, optimizer) if importable else ()
    checks = [check for ask in computing for check in asked(ask)]
    four_bits = [_as_demand(check) for check in here if check.name == "bitsandbytes"]
    return [*checks, *(four_bits if recipe.quantization else []), *asked(lambda: model(recipe, here))]


def _stops(name: str, ask: Callable[[], str]) -> Check:
    """What the trainer's own question answers, or stops with."""
    try:
        return Check(name, "ok", ask().removeprefix("torch."))
    except AlignctlError as error:
        (problem,) = error.problems
        return Check(name, "broken", problem.what, "this recipe stops before its first step", problem.way_out)


def _as_demand(check: Check) -> Check:
    """A gap of the machine that this recipe cannot do with."""
    state: State = "ok" if check.state == "ok" else "broken"
    return Check("recipe.quantization", state, check.found, check.cost, check.way_out)


def model(recipe: Recipe, here: list[Check]) -> Check:
    """Whether the recipe's model is on this machine, or can be fetched."""
    from alignctl.train import pypi

    name, revision = recipe.model.name_or_path, recipe.model.revision
    if name.startswith(pypi.SCHEME):
        at = pypi.cache_folder() / name.removeprefix(pypi.SCHEME).replace("==", "-")
        return Check("recipe.model", "ok", f"{name} is in {at}" if at.is_dir() else f"{name} comes from PyPI")
    if Path(name).expanduser().is_dir():
        return Check("recipe.model", "ok", f"the folder {name}")
    if name.startswith((".", "/", "~")):
        return Check("recipe.model", "broken", f"no such folder {name}", "there is nothing to train", "mend the path")
    if _is_cached(name, revision):
        return Check("recipe.model", "ok", f"{name} is in the hub's cache")
    hub = next((check for check in here if check.name == "hub"), None)
    if hub is not None and hub.state == "ok":
        return Check("recipe.model", "ok", f"{name} is not in the cache, and is fetched from the hub")
    found, way_out = f"{name} is neither a folder nor in the cache", hub.way_out if hub else "give a local folder"
    return Check("recipe.model", "broken", found, "without the hub there is nothing to train", way_out)


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
