"""Fixtures of the recipe room: a small recipe to vary, and its problems with short places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignctl.errors import RecipeError
from alignctl.recipe.load import Loaded, load

MINIMAL: dict[str, str | None] = {
    "model": "{name_or_path: org/model}",
    "data": "{train: [{path: org/rows}]}",
    "training": "{learning_rate: 1e-5}",
    "dpo": "{}",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, so that no file of the repository is found by chance."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(here: Path) -> Callable[..., Path]:
    """Write a text to a file of the test's folder."""

    def write(text: str, name: str = "r.yaml") -> Path:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def minimal() -> Callable[..., str]:
    """A recipe of one line a section: model 1, data 2, training 3, dpo 4; `None` leaves a section out."""

    def minimal(**sections: str | None) -> str:
        parts = {**MINIMAL, **sections}
        return "".join(f"{key}: {value}\n" for key, value in parts.items() if value is not None)

    return minimal


@pytest.fixture
def problems(here: Path) -> Callable[..., list[str]]:
    """Load a recipe that must be refused; its problems, with places relative to the test's folder."""

    def problems(path: Path, *overrides: str, method: str | None = None) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(path, list(overrides), method)
        return [str(problem).replace(f"{here}/", "") for problem in caught.value.problems]

    return problems


@pytest.fixture
def refused(
    write: Callable[..., Path], minimal: Callable[..., str], problems: Callable[..., list[str]]
) -> Callable[..., list[str]]:
    """The problems of the small recipe with other sections."""

    def refused(*overrides: str, method: str | None = None, **sections: str | None) -> list[str]:
        return problems(write(minimal(**sections)), *overrides, method=method)

    return refused


@pytest.fixture
def accepted(write: Callable[..., Path], minimal: Callable[..., str]) -> Callable[..., Loaded]:
    """The small recipe with other sections, loaded."""

    def accepted(*overrides: str, method: str | None = None, **sections: str | None) -> Loaded:
        return load(write(minimal(**sections)), list(overrides), method)

    return accepted
