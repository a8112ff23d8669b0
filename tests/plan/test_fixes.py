"""What to change, in which order, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alignctl.plan import config, data, estimate, fixes, report
from alignctl.plan.estimate import Plan
from alignctl.plan.memory import GIB
from alignctl.recipe.schema import Recipe


@pytest.fixture
def planned(recipe: Callable[..., Recipe]) -> Callable[..., Plan]:
    def build(**sections: object) -> Plan:
        made = recipe(**sections)
        return estimate.of(made, config.shape_of(made.model), data.at_most(made))

    return build


PLAIN = {"training": {"gradient_checkpointing": False, "optim": "adamw_torch", "per_device_train_batch_size": 6}}


def test_the_order_of_least_harm(planned: Callable[..., Plan]) -> None:
    plan = planned(quantization=None, **PLAIN)
    found = plan.fixes(0)
    assert [str(fix) for fix in found] == [
        "training.gradient_checkpointing=true",
        "training.per_device_train_batch_size=3 training.gradient_accumulation_steps=2",
        "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=6",
        "training.optim=paged_adamw_8bit",
        "quantization={load_in_4bit: true}",
        "data.max_length=512",
        "data.max_length=256",
    ]
    needed = [plan.memory.needed, *(fix.needed for fix in found)]
    assert sorted(needed, reverse=True) == needed and len(set(needed)) == len(needed)


def test_no_more_than_it_takes(planned: Callable[..., Plan]) -> None:
    plan = planned(quantization=None, **PLAIN)
    everything = plan.fixes(0)
    enough = plan.fixes(everything[1].needed)
    assert enough == everything[:2] and plan.fixes(plan.memory.needed) == []


def test_each_total_is_that_of_the_changed_recipe(planned: Callable[..., Plan]) -> None:
    plan = planned(**PLAIN)
    found = plan.fixes(0)[:3]
    changed = fixes.changed_by(plan.recipe, fixes.together(found))
    assert changed.training.per_device_train_batch_size == 1 and changed.training.gradient_accumulation_steps == 6
    assert estimate.of(changed, plan.shape, plan.lengths).memory.needed == found[-1].needed


def test_all_weights_give_way_to_an_adapter(planned: Callable[..., Plan]) -> None:
    plan = planned(lora=None, quantization=None, training={"per_device_train_batch_size": 1})
    keys = [next(iter(fix.changes)) for fix in plan.fixes(8 * GIB)]
    assert keys[:1] == ["lora"] and "ten times the learning rate" in plan.fixes(8 * GIB)[0].cost


def test_what_is_there_stays(planned: Callable[..., Plan]) -> None:
    plan = planned(training={"per_device_train_batch_size": 2})
    changed = fixes.changed_by(plan.recipe, {"training.gradient_checkpointing": True})
    assert changed.training.optim == plan.recipe.training.optim and changed.lora == plan.recipe.lora


def test_peak_plan_and_keys_in_one_message(planned: Callable[..., Plan]) -> None:
    plan = planned(**PLAIN)
    memory = report.record(plan)
    assert sum(line["bytes"] for line in memory["lines"]) == plan.memory.allocated
    said, way_out = report.shortage(memory, 9.87)
    assert said == f"peak 9.87 GiB, and {plan.memory.allocated / GIB:.2f} were planned"
    first = plan.fixes(0)[0]
    assert f"training.gradient_checkpointing=true ({first.needed / GIB:.1f} GiB); " in way_out
    assert way_out.startswith(
        f"in order of least harm, each on top of those before it, from {plan.memory.needed / GIB:.1f}"
    )


def test_without_a_plan() -> None:
    assert report.shortage({}, 1.5) == ("peak 1.50 GiB", report.GENERAL)


@pytest.mark.parametrize(
    ("planned_gib", "measured", "said"),
    [(5.0, 5.0, ""), (5.4, 5.0, ""), (5.6, 5.0, "planned too high by 12%"), (4.0, 5.0, "planned too low by 20%")],
)
def test_a_miss_of_more_than_a_tenth(planned_gib: float, measured: float, said: str) -> None:
    found = report.missed({"planned_gib": planned_gib, "measured_gib": measured})
    assert said in found if said else found == ""
