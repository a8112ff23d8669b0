"""The faults that other trainers run through in silence: each is planted in a real run, with its gate on and off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Trainer

from alignctl.train import dpo, fit

Train = Callable[..., Any]


def test_nothing_planted(train: Train) -> None:
    ran = train()
    assert ran.code == 0 and ran.record["status"] == "finished", ran.err
    assert {found["verdict"] for found in ran.record["gates"].values()} <= {"passed", "off"}


# 1: the reference is not what training starts from.


def other_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(*given: Any) -> Trainer:
        trainer = dpo.build(*given)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return trainer

    monkeypatch.setitem(fit.BUILD, "dpo", planted)


def test_the_reference_is_another_model(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    other_reference(monkeypatch)
    ran = train()
    assert ran.code == 5 and "gate.reference" in ran.err and ran.verdict("reference") == "stopped"
    assert train(gates={"reference": False}, folder="off").code == 0
