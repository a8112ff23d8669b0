"""What a run's gates keep, say and raise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.errors import AlignctlError, DataError, DivergedError, MachineError, RecipeError, VerifyError
from alignctl.recipe.schema import Gates as Switches
from alignctl.train.gates import Gates, Result

MakeGates = Callable[..., Gates]
OFF = Result("off", "switched off in the recipe")


def kept(folder: Path) -> dict[str, Any]:
    """What run.json says of the gates."""
    return dict(json.loads((folder / "run.json").read_text(encoding="utf-8"))["gates"])


def test_all_are_on_unless_the_recipe_says_otherwise(make_gates: MakeGates) -> None:
    assert all(make_gates().on(name) for name in Switches.model_fields) and len(Switches.model_fields) == 19
    assert make_gates().results == {}
    gates = make_gates(memory=False, drift=False)
    assert [name for name in Switches.model_fields if not gates.on(name)] == ["memory", "drift"]
    assert gates.results == {"memory": OFF, "drift": OFF}


def test_what_passed(tmp_path: Path, make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates(packed=False)
    gates.passed("memory", "it fits", value=1.5, limit=2.0, step=3)
    gates.passed("memory", "it fits better", value=1.25)
    assert gates.results["memory"] == Result("passed", "it fits better", 1.25)
    assert kept(tmp_path) == {
        "memory": {"verdict": "passed", "said": "it fits better", "value": 1.25, "limit": None, "step": None},
        "packed": {"verdict": "off", "said": OFF.said, "value": None, "limit": None, "step": None},
    }
    assert said == []


def test_a_warning_is_said_once_and_stands(tmp_path: Path, make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates()
    gates.passed("drift", "chosen answers: +0.01", value=0.01)
    gates.warned("drift", "unlikelier by 0.4", "a lower rate", value=-0.4, limit=-0.3, step=7)
    gates.warned("drift", "unlikelier by 0.5", "a lower rate", value=-0.5, limit=-0.3, step=8)
    gates.passed("drift", "chosen answers: +0.02", value=0.02)
    assert said == ["warning: gate.drift: unlikelier by 0.4 — a lower rate"]
    assert gates.results["drift"] == Result("warned", "unlikelier by 0.5", -0.5, -0.3, 8)
    assert kept(tmp_path)["drift"]["value"] == -0.5


@pytest.mark.parametrize(
    ("error", "code"), [(DivergedError, 5), (MachineError, 4), (DataError, 3), (RecipeError, 2), (VerifyError, 6)]
)
def test_what_stops_is_kept_and_raised(
    tmp_path: Path, make_gates: MakeGates, said: list[str], error: type[AlignctlError], code: int
) -> None:
    gates = make_gates()
    gates.warned("memory", "tight", "less of it")
    with pytest.raises(error) as raised:
        gates.stopped("memory", "too much", "a smaller batch", value=9.5, limit=8, step=2, error=error)
    assert raised.value.exit_code == code and str(raised.value) == "gate.memory: too much — a smaller batch"
    assert kept(tmp_path) == {
        "memory": {"verdict": "stopped", "said": "too much", "value": 9.5, "limit": 8, "step": 2},
    }
    assert said == ["warning: gate.memory: tight — less of it"]


def test_a_gate_diverges_unless_told_otherwise(make_gates: MakeGates) -> None:
    with pytest.raises(DivergedError, match=r"gate\.finite: NaN — a lower rate"):
        make_gates().stopped("finite", "NaN", "a lower rate")


def test_run_json_has_the_order_of_the_recipe(tmp_path: Path, make_gates: MakeGates) -> None:
    gates = make_gates(packed=False)
    for name in ("saved", "finite", "targets", "memory", "moved"):
        gates.passed(name, "fine")
    assert list(kept(tmp_path)) == ["targets", "memory", "packed", "finite", "moved", "saved"]


def test_the_rest_of_run_json_stays(tmp_path: Path, make_gates: MakeGates) -> None:
    (tmp_path / "run.json").write_text('{"status": "running", "seed": 42}', encoding="utf-8")
    make_gates().passed("finite", "fine")
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["seed"], list(record["gates"])) == ("running", 42, ["finite"])


def test_warnings_outlive_a_resume_and_are_not_said_again(make_gates: MakeGates, said: list[str]) -> None:
    before = make_gates()
    before.warned("drift", "unlikelier", "a lower rate", value=-0.4, limit=-0.3, step=7)
    before.warned("easy", "told apart", "look", step=2)
    after = make_gates(easy=False)
    assert after.results == {"drift": Result("warned", "unlikelier", -0.4, -0.3, 7), "easy": OFF}
    after.passed("drift", "likelier")
    after.warned("drift", "unlikelier still", "a lower rate", step=9)
    assert after.results["drift"] == Result("warned", "unlikelier still", step=9)
    assert [line for line in said if "gate.drift" in line] == ["warning: gate.drift: unlikelier — a lower rate"]


def test_what_stopped_the_run_before_is_asked_again(make_gates: MakeGates) -> None:
    with pytest.raises(DivergedError):
        make_gates().stopped("finite", "NaN", "a lower rate")
    after = make_gates()
    assert "finite" not in after.results
    after.passed("finite", "fine")
    assert after.results["finite"] == Result("passed", "fine")


def test_a_gate_that_is_on_again_is_asked(make_gates: MakeGates, said: list[str]) -> None:
    make_gates(finite=False, drift=False).passed("memory", "fine")
    after = make_gates()
    after.passed("finite", "fine")
    after.warned("drift", "unlikelier", "a lower rate")
    assert (after.results["finite"].verdict, after.results["drift"].verdict) == ("passed", "warned") and len(said) == 1


def test_a_gate_that_is_off_answers_when_it_is_asked(make_gates: MakeGates) -> None:
    """`alignctl verify` asks whatever the recipe says."""
    gates = make_gates(reload=False)
    gates.passed("reload", "the same")
    assert gates.results["reload"] == Result("passed", "the same")


def test_what_passed_outlives_a_resume(tmp_path: Path, make_gates: MakeGates) -> None:
    make_gates().passed("reference", "the same weights", value=0.0, limit=1e-4)
    make_gates().passed("saved", "all finite", value=14)
    assert list(kept(tmp_path)) == ["reference", "saved"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_run_json_is_json_whatever_was_found(tmp_path: Path, make_gates: MakeGates, value: float) -> None:
    with pytest.raises(DivergedError):
        make_gates().stopped("packed", f"differ by {value}", "report it", value=value, limit=1e-3)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert not {"NaN", "Infinity"} & set(text.replace(",", " ").split())
    assert (kept(tmp_path)["packed"]["value"], kept(tmp_path)["packed"]["limit"]) == (str(value), 1e-3)
