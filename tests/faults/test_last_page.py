"""The page at the end of a real run: also of one that failed, and never at the price of one that did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.errors import Interrupted, Problem
from alignctl.report import html

Train = Callable[..., Any]
Plant = Callable[[Callable[[Trainer], None]], None]


@pytest.fixture(autouse=True)
def page() -> None:
    """It is drawn here."""


class Poison(TrainerCallback):
    """Every trained weight is no number after the second step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                for weight in kwargs["model"].parameters():
                    if weight.requires_grad:
                        weight.fill_(float("nan"))


def test_a_finished_run_has_a_page(train: Train) -> None:
    ran = train()
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "report: run/report.html"
    page = (ran.folder / "report.html").read_text(encoding="utf-8")
    assert 'id="curves"' in page
    assert "alignctl dpo run/recipe.yaml --output run-again" in page


def test_a_run_that_failed_has_a_page_that_says_why(train: Train, plant: Plant) -> None:
    plant(lambda trainer: trainer.add_callback(Poison()))
    ran = train(gates={"moved": False})
    assert ran.code == 5
    assert ran.err.count("alignctl: ") == 1
    assert ran.out.splitlines()[-1] == "report: run/report.html"
    page = (ran.folder / "report.html").read_text(encoding="utf-8")
    assert "<strong>failed</strong>" in page
    assert "gate.finite" in page
    assert 'class="stopped"' in page
    assert 'id="curves"' in page


def test_a_run_that_failed_before_its_first_step_has_none(train: Train) -> None:
    ran = train(lora={"target_modules": ["no_such_layer"]})
    assert ran.code != 0
    assert not (ran.folder / "report.html").exists()
    assert "report" not in ran.out


@pytest.mark.parametrize("fault", [ZeroDivisionError("planted"), Interrupted(2, Problem("run", "planted"))])
def test_a_page_that_cannot_be_made_leaves_the_run_finished(
    train: Train, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def broken(*given: object) -> str:
        raise fault

    monkeypatch.setattr(html, "page", broken)
    ran = train()
    assert (ran.code, ran.record["status"]) == (0, "finished")
    assert "alignctl: " not in ran.err
    last = ran.out.splitlines()[-1]
    assert last.startswith(f"no report was made: {type(fault).__name__}: ")
    assert last.endswith("planted — alignctl report run tries again")
    assert not list(ran.folder.glob("report*"))
