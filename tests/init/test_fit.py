"""What is changed in a new recipe until it fits, and what is not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from alignctl.errors import MachineError
from alignctl.init import choose, fit
from alignctl.init.draft import Choice, values
from alignctl.init.facts import GIB, Memory, Model, Rows, Wanted
from alignctl.init.fit import Fitted
from alignctl.plan.data import Lengths, Row

WANTED = Wanted("dpo", "mistralai/Mistral-7B-v0.1", "rows.jsonl")  # its config is packaged
MODEL = Model(7_241_732_096, context=32768)
ROWS = Rows(600, "pairs", tuple(range(400, 1000)))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rows.jsonl`: pairs of about a thousand tokens, at four characters each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = {"prompt": "Why? " * 80, "chosen": "So. " * 800, "rejected": "No. " * 800}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 600, encoding="utf-8")


def gpu(gib: float) -> Memory:
    return Memory(gib, "the GPU", gpu=True)


def fitted(memory: Memory, wanted: Wanted = WANTED, rows: Rows = ROWS) -> Fitted:
    drafted = choose.draft(wanted, rows, MODEL, memory, choose.chosen_adapter(wanted, MODEL, memory))
    return fit.fitted(wanted, rows, MODEL, memory, fit.planner(drafted, rows))


def needed(found: Fitted) -> float:
    assert found.plan is not None
    return found.plan.memory.needed / GIB


def drafted(wanted: Wanted = WANTED, adapter: str = "lora") -> float:
    """GiB of the draft before anything is changed."""
    return fitted(gpu(1000), replace(wanted, adapter=adapter)).drafted / GIB


def test_nothing_is_changed_that_fits() -> None:
    found = fitted(gpu(80))
    assert found.adapter == Choice("lora", "80 GiB are enough without 4 bits") and found.changes == ()
    assert found.least == found.drafted and needed(found) < 80
    assert found.draft == choose.draft(WANTED, ROWS, MODEL, gpu(80), found.adapter)


def test_the_batch_shrinks_before_4_bits_are_taken() -> None:
    before = drafted()
    room = gpu(round(before - 0.1, 1))
    found = fitted(room)
    training = found.draft["training"]
    assert found.adapter.value == "lora" and "quantization" not in found.draft
    batch, steps = (training[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert batch.value == 2 and batch.value * steps.value == 16 and steps.why == "16 rows an update, of 600"
    assert batch.why == f"{room.size()}: {before:.1f} GiB would be needed with 4; the same update, in more passes"
    assert needed(found) * GIB == found.least <= room.bytes < found.drafted


def test_every_step_names_what_the_one_before_needed() -> None:
    found = fitted(gpu(drafted(adapter="qlora") * 0.7), replace(WANTED, adapter="qlora"))
    first, second = found.changes[:2]
    why = found.draft["training"]["per_device_train_batch_size"].why
    assert f"{first.needed / GIB:.1f} GiB would be needed with 2" in why and second.needed == found.least


def test_4_bits_are_taken_where_nothing_less_helps() -> None:
    found = fitted(gpu(9))
    assert found.adapter.value == "qlora" and needed(found) <= 9 and found.changes == ()
    said = re.fullmatch(r"9 GiB: (\d+\.\d) GiB would be needed without, at least", found.adapter.why)
    assert said is not None and 14 < float(said[1]) < drafted()
    assert found.draft["quantization"]["load_in_4bit"] == Choice(True, found.adapter.why)


@pytest.mark.parametrize(("adapter", "gib"), [("lora", 12), ("full", 80)])
def test_another_adapter_than_the_one_asked_for_is_not_taken(adapter: str, gib: float) -> None:
    wanted = replace(WANTED, adapter=adapter)
    found = fitted(gpu(gib), wanted)
    assert found.adapter == Choice(adapter, "as asked for") and found.least > gib * GIB and found.changes == ()
    assert found.draft == choose.draft(wanted, ROWS, MODEL, gpu(gib), found.adapter)


def test_what_nothing_makes_fit_stays_as_it_was() -> None:
    found = fitted(gpu(3))
    assert found.least > 3 * GIB and found.changes == ()
    assert found.draft == choose.draft(WANTED, ROWS, MODEL, gpu(3), found.adapter)


def some_long(share: float) -> Rows:
    """Rows of which `share` have 8,000 tokens, and the others a few."""
    long = int(600 * share)
    lengths = Lengths((Row(0, 8000, 8000),) * 4, Row(0, 100, 100), 600, "counted")
    return Rows(600, "pairs", (100,) * (600 - long) + (8000,) * long, lengths=lengths)


def test_few_long_rows_are_dropped_and_allowed_to_be() -> None:
    wanted, rows = replace(WANTED, adapter="qlora"), some_long(0.2)
    whole = fitted(gpu(1000), wanted, rows)
    assert whole.draft["data"]["max_length"].value == 8000 and "max_dropped" not in whole.draft["data"]
    found = fitted(gpu(needed(whole) * 0.75), wanted, rows)
    data = found.draft["data"]
    assert data["max_length"].value <= 4000 and data["max_length"].why.endswith("longer rows are dropped")
    assert data["max_dropped"].value == 0.23 and needed(found) <= needed(whole) * 0.75


def test_most_rows_are_not_dropped() -> None:
    wanted, rows = replace(WANTED, adapter="qlora"), some_long(0.6)
    whole = fitted(gpu(1000), wanted, rows)
    found = fitted(gpu(needed(whole) * 0.75), wanted, rows)
    assert found.least > needed(whole) * 0.75 * GIB
    assert found.draft["data"]["max_length"].value == 8000


def test_counted_rows_that_are_longer_than_estimated_count() -> None:
    long = replace(ROWS, lengths=Lengths((Row(0, 1000, 1000),) * 4, Row(0, 900, 900), 600, "counted"))
    short = replace(ROWS, lengths=Lengths((Row(0, 10, 10),) * 4, Row(0, 10, 10), 600, "counted"))
    assert needed(fitted(gpu(80), rows=long)) > needed(fitted(gpu(80))) == needed(fitted(gpu(80), rows=short))


def test_a_model_that_nobody_knows_has_no_planner() -> None:
    wanted = Wanted("dpo", "nobody/nothing", "rows.jsonl")
    with pytest.raises(MachineError, match="nobody/nothing is neither a folder nor in the hub's cache"):
        fitted(gpu(24), wanted)
    found = fit.fitted(wanted, ROWS, Model(), gpu(24), None)
    assert found.plan is None and found.adapter.value == "qlora" and found.changes == ()


def test_without_a_gpu_there_is_a_plan_and_nothing_to_fit() -> None:
    host = Memory(drafted(adapter="qlora") * 0.9, "this machine", gpu=False)
    assert fitted(replace(host, gpu=True)).changes  # of a GPU they would be made
    found = fitted(host)
    assert needed(found) > host.gib and found.changes == () and found.adapter.value == "qlora"
    assert "optim" not in values(found.draft)["training"]
