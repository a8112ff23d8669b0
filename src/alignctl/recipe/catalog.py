"""The recipes and chat templates that ship with alignctl."""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from alignctl.errors import Problem, RecipeError


@cache
def folder() -> Path:
    """The built-in recipes: inside the wheel, or at the top of a source tree."""
    packaged = Path(str(resources.files("alignctl"))) / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes"


@cache
def templates() -> list[str]:
    """Names of the built-in chat templates."""
    return sorted(p.name.removesuffix(".jinja") for p in _template_folder().glob("*.jinja"))


def template(name: str) -> str:
    """The Jinja source of a built-in chat template."""
    return (_template_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def _template_folder() -> Path:
    return Path(str(resources.files("alignctl.recipe"))) / "templates"


def names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(p.stem for p in folder().glob("*.yaml"))


@dataclass(frozen=True)
class Entry:
    """One built-in recipe: its file and the comment that heads it, a line each."""

    path: Path
    header: list[str]

    @property
    def summary(self) -> str:
        return self.header[0] if self.header else ""

    @property
    def needs(self) -> str:
        return next((line.removeprefix("Needs: ") for line in self.header if line.startswith("Needs: ")), "")


def entry(name: str) -> Entry:
    """The built-in recipe called `name`.

    Raises:
        RecipeError: there is none.
    """
    path = folder() / f"{name.removesuffix('.yaml')}.yaml"
    if path.parent != folder() or not path.is_file():
        raise RecipeError(Problem(name, "no built-in recipe has this name", suggestion(name)))
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line.lstrip("# ").rstrip() for line in _leading(lines)]
    return Entry(path, header)


def _leading(lines: list[str]) -> list[str]:
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:count]


def find(recipe: str) -> Path:
    """A recipe argument as a path: a file that exists, or else a built-in recipe's name."""
    path = Path(recipe)
    if path.is_file() or path.suffix or "/" in recipe:
        return path
    return entry(recipe).path


def suggestion(recipe: str) -> str:
    """The way out when `recipe` is neither a file nor a built-in name."""
    near = difflib.get_close_matches(Path(recipe).stem, names(), 1)
    return f"did you mean {near[0]}?" if near else "`alignctl recipes` lists the built-in ones"


def copy(name: str, destination: Path) -> Path:
    """Copy a built-in recipe to a file or into a folder; returns the new file.

    Raises:
        RecipeError: there is no such recipe, the file exists, or it cannot be written.
    """
    source = entry(name).path
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise RecipeError(Problem(str(target), "exists already", "give another name"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise RecipeError(Problem(str(target), f"cannot be written: {error.strerror}", "give another place")) from error
    return target
