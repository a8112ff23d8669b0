"""The reference's scores are those of the run, where the reference still gives them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from alignctl.proof import evaluation
from alignctl.proof.evaluation import Wanted
from alignctl.proof.trained import opened
from alignctl.train.display import Display

BEFORE = Path("logs") / "before.json"


@pytest.fixture
def evaluated(
    finished: Callable[..., Path], workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """A run's evaluation, with its own `before.json` or another in its place (None: with none)."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("ALIGNCTL_CACHE", str(workshop / "cache"))

    def evaluate(method: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any]:
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(finished(method), run, ignore=shutil.ignore_patterns("checkpoints"))
        changed = change(json.loads((run / BEFORE).read_text(encoding="utf-8")))
        (run / BEFORE).unlink()
        if changed is not None:
            (run / BEFORE).write_text(json.dumps(changed), encoding="utf-8")
        work = evaluation.prepare(opened(run), Wanted(None, "start", 0, None, 0))
        return evaluation.evaluate(work, [], [], Display(io.StringIO()))

    return evaluate


def shifted(values: dict[str, Any], by: float) -> dict[str, Any]:
    moved = {name: [value + by for value in column] for name, column in values["scores"].items()}
    return values | {"scores": moved}


def cut(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"scores": {name: column[1:] for name, column in values["scores"].items()}}


def numbers(values: dict[str, Any]) -> dict[str, numpy.ndarray]:
    return {side: numpy.array(list(values["rows"][side].values())) for side in ("reference", "tuned")}


@pytest.mark.parametrize("method", ["dpo", "orpo", "sft"])
def test_scores_of_the_run_are_those_of_its_start(method: str, evaluated: Callable[..., dict[str, Any]]) -> None:
    known, anew = evaluated(method, lambda values: values), evaluated(method, lambda _: None)
    assert (known["against"]["rows_scored"], anew["against"]["rows_scored"]) == ("before training", "now")
    for side, found in numbers(known).items():
        assert found == pytest.approx(numbers(anew)[side], abs=1e-5)
    assert known["verdict"] == anew["verdict"]


@pytest.mark.parametrize(
    "change",
    [
        lambda values: shifted(values, 0.05),
        lambda values: shifted(values, float("nan")),
        cut,
        lambda values: {name: value for name, value in values.items() if name != "scores"},
        lambda values: {"scores": {"nll": [1.0] * 8}},
    ],
    ids=["another start", "no numbers", "a row too few", "none", "another method's"],
)
def test_other_scores_are_not_believed(
    change: Callable[[dict[str, Any]], dict[str, Any]], evaluated: Callable[..., dict[str, Any]]
) -> None:
    found = evaluated("dpo", change)
    assert found["against"]["rows_scored"] == "now"
    assert numbers(found)["reference"] == pytest.approx(numbers(evaluated("dpo", lambda _: None))["reference"], abs=0)
