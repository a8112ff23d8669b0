"""The names that a recipe may use must be those of the installed TRL."""

from __future__ import annotations

import json
import runpy
from importlib import resources
from pathlib import Path

import pytest

from alignctl.errors import RecipeError
from alignctl.recipe import catalog, load

ROOT = Path(__file__).parents[2]


def test_names_are_those_of_the_pinned_trl() -> None:
    current = runpy.run_path(str(ROOT / "scripts" / "trl_arguments.py"))["names"]()
    packaged = resources.files("alignctl.recipe").joinpath("trl_arguments.json").read_text(encoding="utf-8")
    assert json.loads(packaged) == current


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.optim=adamw_tourch", "training.optim: unknown 'adamw_tourch' — did you mean adamw_torch?"),
        ("training.lr_scheduler_type=cosin", "unknown 'cosin' — did you mean cosine?"),
        ("training.lr_scheduler_type=zigzag", "unknown 'zigzag' — one of "),
    ],
)
def test_choices_are_checked_before_anything_is_loaded(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load.load(catalog.find("demo-dpo"), [override])
    (problem,) = error.value.problems
    assert problem.where == f"argument {override!r}" and said in str(problem)


def test_documents_are_current() -> None:
    pages = runpy.run_path(str(ROOT / "scripts" / "document.py"))["pages"]()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: make docs"
