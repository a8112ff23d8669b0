"""What a recipe asks of the machine, in the words that its training stops with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from alignctl.errors import MachineError
from alignctl.recipe.schema import Recipe
from alignctl.train import checkup, demands, machine, trackers
from alignctl.train.checkup import Check

HUB = Check("hub", "ok", "answers")
NO_HUB = Check("hub", "gap", "does not answer", way_out="check the network")
BITS = Check("bitsandbytes", "gap", "bitsandbytes is not installed", checkup.NO_QLORA, "pip install bitsandbytes")


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> machine.Machine:
    """A CPU without bfloat16."""
    here = machine.Machine("cpu", "an old CPU", bf16=False)
    monkeypatch.setattr(machine, "detect", lambda: here)
    return here


def recipe(name: str = "nobody/nothing", **sections: Any) -> Recipe:
    given = {
        "model": {"name_or_path": name, "dtype": sections.pop("dtype", "auto")},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "training": {"learning_rate": 1e-4, **sections.pop("training", {})},
        "lora": {},
        "dpo": {},
    }
    return Recipe.model_validate(given | sections)


def examined(asked: Recipe, *here: Check) -> dict[str, Check]:
    return {check.name: check for check in demands.examine(asked, [*here])}


def test_a_dtype_that_the_machine_has_not(cpu: machine.Machine) -> None:
    found = examined(recipe(dtype="bfloat16"), HUB)["recipe.dtype"]
    with pytest.raises(MachineError) as stopped:
        cpu.precision("bfloat16")
    assert found.state == "broken"
    assert (found.found, found.way_out) == (stopped.value.problems[0].what, stopped.value.problems[0].way_out)
    assert examined(recipe(), HUB)["recipe.dtype"].found == "float32"


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asked = recipe(logging={"report_to": "mlflow"})
    found = examined(asked, HUB)["recipe.tracker"]
    with pytest.raises(MachineError) as stopped:
        trackers.check(asked)
    assert found.state == "broken" and found.found == stopped.value.problems[0].what == "mlflow is not installed"


def test_an_optimizer_that_needs_cuda() -> None:
    found = examined(recipe(training={"optim": "paged_adamw_8bit"}), HUB)["recipe.optimizer"]
    assert found.state == "gap" and found.cost.startswith("adamw_torch takes its place")


def test_4_bits_without_bitsandbytes() -> None:
    found = examined(recipe(quantization={}), HUB, BITS)["recipe.quantization"]
    assert found.state == "broken" and found.found == BITS.found
    assert "recipe.quantization" not in examined(recipe(), HUB, BITS)


def test_where_the_trainers_cannot_be_imported_only_the_model_is_looked_for() -> None:
    broken = Check("imports", "broken", "the trainers: ImportError")
    assert examined(recipe(), HUB, broken).keys() == {"recipe.model"}


@pytest.mark.parametrize(
    ("name", "hub", "state"),
    [
        ("nobody/nothing", HUB, "ok"),
        ("nobody/nothing", NO_HUB, "broken"),
        ("./nowhere", HUB, "broken"),
        ("pypi:nothing==1.0", NO_HUB, "ok"),
    ],
)
def test_a_model_that_is_not_here(name: str, hub: Check, state: str) -> None:
    assert examined(recipe(name), hub)["recipe.model"].state == state


def test_a_model_in_a_folder(tmp_path: Path) -> None:
    assert examined(recipe(str(tmp_path)), NO_HUB)["recipe.model"].state == "ok"
