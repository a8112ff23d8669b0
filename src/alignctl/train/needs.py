"""What a run needs to be installed, and what is said when it is not: the doctor and the trainers use the same words.

Light: it must answer where the heavy libraries cannot be imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from alignctl.errors import Problem

INSTALL = "pip install"


def python() -> Problem | None:
    """What is wrong with this Python, by the installed package's own metadata."""
    wanted = SpecifierSet(importlib.metadata.metadata("alignctl")["Requires-Python"] or "")
    if platform.python_version() in wanted:
        return None
    what = f"Python {platform.python_version()} runs, and alignctl needs {wanted}"
    return Problem("python", what, "make a new environment with such a Python")


def requirements() -> list[Requirement]:
    """What the installed package says that it needs, without its extras."""
    given = map(Requirement, importlib.metadata.requires("alignctl") or [])
    return [each for each in given if each.marker is None or each.marker.evaluate({"extra": ""})]


def version(name: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package(wanted: Requirement) -> Problem | None:
    """What is wrong with a package: it is not installed, or in a version that is not supported."""
    found = version(wanted.name)
    if found is not None and wanted.specifier.contains(found, prereleases=True):
        return None
    what = "is not installed" if found is None else f"{found} is installed, and alignctl needs {wanted.specifier}"
    return Problem(wanted.name, what, f"{INSTALL} '{wanted.name}{wanted.specifier}'")


def bitsandbytes() -> Problem | None:
    """What is said to a recipe with a `quantization:` section where bitsandbytes is missing."""
    return _module(
        "quantization.load_in_4bit", "bitsandbytes", f"{INSTALL} bitsandbytes, or take the `quantization:` section away"
    )


def tracker(name: str) -> Problem | None:
    """What is said to a recipe whose tracker is missing."""
    return None if name == "none" else _module("logging.report_to", name, f"{INSTALL} {name}")


def _module(where: str, name: str, way_out: str) -> Problem | None:
    if importlib.util.find_spec(name) is not None:
        return None
    return Problem(where, f"{name} is not installed", way_out)


def behind(error: ImportError) -> Problem | None:
    """The package that an import error is about, where alignctl needs it and it is missing or of another version."""
    top = (error.name or "").partition(".")[0]
    names = {each.name: each for each in requirements()} | {"yaml": Requirement("pyyaml")}
    return package(names[top]) if top in names else None
