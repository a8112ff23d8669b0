"""Where a model's `config.json` is: its folder, the packaged table, the hub's cache, or the hub."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.plan import shape
from alignctl.plan.shape import Shape
from alignctl.recipe.schema import Model

_KEY = "model.name_or_path"


def packaged() -> dict[str, dict[str, Any]]:
    """What the models of the built-in recipes say of their shape."""
    text = resources.files("alignctl.plan").joinpath("models.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def shape_of(model: Model, *, fetch: bool = True) -> Shape:
    """The shape of a recipe's model; no weights are read or fetched, and without `fetch` no config either.

    Raises:
        RecipeError: it has no config that can be read.
        MachineError: the hub does not have it, or cannot be reached.
    """
    name = model.name_or_path
    folder = Path(name).expanduser()
    if folder.is_dir() or name.startswith((".", "/", "~")):
        return shape.of(_read(folder / "config.json"), str(folder / "config.json"))
    known = packaged().get(name)
    if known is not None:
        return shape.of(known, name)
    if name.startswith("pypi:"):
        what = "a package shows its sizes only when it is unpacked"
        raise MachineError(Problem(_KEY, what, "run `alignctl check` once, then plan with the folder that it made"))
    return shape.of(_read((_from_hub if fetch else _from_cache)(name, model.revision)), name)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"{file} cannot be read: {error.strerror}"
        raise RecipeError(Problem(_KEY, what, "give a model folder or a hub name")) from error
    except ValueError as error:
        raise RecipeError(Problem(_KEY, f"{file} is not JSON: {error}", "fetch the model anew")) from error
    if not isinstance(found, dict):
        raise RecipeError(Problem(_KEY, f"{file} holds no object", "fetch the model anew"))
    return found


def _from_hub(name: str, revision: str | None) -> Path:
    """Its `config.json` alone, from the hub's cache or the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what = f"the hub has no {name}, or cannot be reached ({type(error).__name__})"
        way_out = "check the name and the network, log in for a gated model, or give a folder with its config.json"
        raise MachineError(Problem(_KEY, what, way_out)) from error


def _from_cache(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        found = None
    if isinstance(found, str):
        return Path(found)
    what = f"{name} is neither a folder nor in the hub's cache"
    raise MachineError(Problem(_KEY, what, "`alignctl plan` on the recipe fetches its config"))
