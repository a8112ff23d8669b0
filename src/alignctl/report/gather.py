"""The only reader of a run's folder: whatever is missing or broken is left empty, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignctl import rundir, secrets
from alignctl.errors import AlignctlError, Problem, RecipeError
from alignctl.recipe import tree
from alignctl.report.values import dig, text
from alignctl.rundir import RunDir

_WHEN = ("before", "after")


@dataclass(frozen=True)
class Run:
    """What a run's folder says, without secrets; `unread` names the files that could not be read."""

    path: Path
    status: str
    record: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    ledger: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def method(self) -> str:
        found = text(self.record.get("method"))
        return found or next((method for method in ("sft", "dpo", "orpo") if method in self.recipe), "")

    @property
    def beta(self) -> Any:
        return dig(self.recipe, self.method, "beta")


def gather(path: Path) -> Run:
    """The run in the folder `path`.

    Raises:
        RecipeError: it is no run, or its run.json cannot be read.
    """
    run = opened(path)
    unread: list[str] = []

    def read(name: str, how: Callable[[Path], Any], empty: Any) -> Any:
        try:
            return how(path / name)
        except (OSError, ValueError, RecursionError, AlignctlError) as error:
            unread.append(f"{name}: {' '.join(str(error).split())}")
            return empty

    recipe_text = read("recipe.yaml", _text, "")
    evaluations = sorted(p.name for p in (path / "evaluations").glob("*.json"))
    found = {
        "recipe": read("recipe.yaml", _recipe, {}) if recipe_text else {},
        "ledger": read("ledger.json", rundir.read_json, {}),
        "summary": read("summary.json", rundir.read_json, {}),
        "samples": read("samples.jsonl", rundir.whole_lines, []),
        "scores": {when: read(f"logs/{when}.json", rundir.read_json, {}) for when in _WHEN},
        "evaluations": [read(f"evaluations/{name}", rundir.read_json, {}) for name in evaluations],
    }
    metrics: list[dict[str, Any]] = read("metrics.jsonl", rundir.whole_lines, [])
    hidden: dict[str, Any] = secrets.hidden(found | {"record": run.record, "recipe_text": recipe_text})
    return Run(path=path, status=run.status, metrics=metrics, unread=unread, **hidden)


def opened(path: Path) -> RunDir:
    """The folder's run.json.

    Raises:
        RecipeError: there is none that can be read.
    """
    try:
        run = RunDir(path)
    except RecipeError as error:
        (problem,) = error.problems
        raise RecipeError(Problem(problem.where, problem.what, "give the folder of another run")) from error
    if not run.record:
        raise RecipeError(Problem(str(path), "is no run", "give the folder that --output named"))
    return run


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _recipe(path: Path) -> dict[str, Any]:
    found = tree.read(path)
    if found.broken:
        raise RecipeError(*found.problems)
    return found.values
