"""Planned and measured memory of a run, side by side, and in one message when it runs out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignctl.errors import MachineError
from alignctl.plan.data import Row
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir
from alignctl.train import data, fit, lengths, machine, planned, standin
from alignctl.train.parts import Parts
from alignctl.train.tokenizer import load_encoder
from alignctl.train.translate import translated

ROWS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}." * (i + 1), "rejected": "Who knows."} for i in range(6)]
Assembled = tuple[Recipe, Parts, Any, data.Rows]


@pytest.fixture
def assembled(tmp_path: Path) -> Callable[..., Assembled]:
    """Recipe, parts, trainer and rows of a run of `method` on a tiny model of some architecture."""

    def build(method: str = "dpo", name: str = "tiny-llama", *, full: bool = False, **training: Any) -> Assembled:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        source = {"path": str(file), **({"answer": "chosen"} if method == "sft" else {})}
        values: dict[str, Any] = {
            "model": {"name_or_path": name, "dtype": "float32"},
            **({} if full else {"lora": {"r": 4}}),
            "data": {"train": [source]},
            "training": {"learning_rate": 1e-4, "per_device_train_batch_size": 2, **training},
            method: {},
        }
        standin.stand_in(Recipe.model_validate(values), tmp_path / name)
        values["model"]["name_or_path"] = str(tmp_path / name / "model")
        recipe = Recipe.model_validate(values)
        encoder = load_encoder(recipe)
        rows, _ = data.prepare(recipe, encoder)
        where = machine.Machine("cpu", "test", True)
        parts = Parts(where, torch.float32, encoder, rows.dataset(), None, tmp_path)
        return recipe, parts, fit.BUILD[method](recipe, parts), rows

    return build


@pytest.mark.parametrize("name", ["tiny-llama", "phi-2"])
def test_a_plan_of_what_was_built(assembled: Callable[..., Assembled], name: str) -> None:
    recipe, parts, trainer, rows = assembled(name=name)
    plan = planned.plan(recipe, parts, trainer, rows)
    assert plan is not None
    base = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" not in n)
    lora = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    assert plan.shape.parameters() == base
    held = {line.name: line.bytes for line in plan.memory.lines}
    assert (held["weights"], held["adapters"], held["optimizer state"]) == (4 * base, 4 * sum(lora), 8 * sum(lora))
    assert (plan.setup.packed, plan.setup.cuda, plan.setup.checkpointing) == (True, False, False)


def test_a_second_model_is_frozen(assembled: Callable[..., Assembled]) -> None:
    """Else autocast holds 16-bit copies of all its matrices while the policy's activations are there."""
    recipe, parts, trainer, rows = assembled(full=True)
    plan = planned.plan(recipe, parts, trainer, rows)
    assert plan is not None
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert all(p.requires_grad for p in trainer.model.parameters())
    held = {line.name: line.bytes for line in plan.memory.lines}
    size = 4 * sum(p.numel() for p in trainer.model.parameters())
    assert held["weights"] == held["reference: second model"] == held["optimizer state"] // 2 == size


def test_a_plan_of_the_rows(assembled: Callable[..., Assembled]) -> None:
    recipe, _, _, rows = assembled()
    found = lengths.of(recipe, rows)
    longest = rows.encoded(rows.longest())
    assert found.longest[0] == Row(*(len(longest[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")))
    assert (len(found.longest), found.count) == (2, 6) and found.longest[0].size >= found.longest[1].size
    recipe, _, _, rows = assembled("sft")
    assert lengths.of(recipe, rows).longest[0] == Row(0, int(rows.sizes().max()))


def test_padded_batches_are_planned_as_such(assembled: Callable[..., Assembled]) -> None:
    recipe, parts, trainer, rows = assembled(packed=False)
    plan = planned.plan(recipe, parts, trainer, rows)
    assert plan is not None and plan.batch.tokens == 4 * plan.batch.longest


def test_no_plan_where_sizes_have_other_names(assembled: Callable[..., Assembled]) -> None:
    recipe, parts, _, rows = assembled()
    model = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"model_type": "gpt2", "n_embd": 64}))
    assert planned.plan(recipe, parts, SimpleNamespace(model=model), rows) is None


MEMORY = {
    "planned_gib": 4.0,
    "measured_gib": None,
    "needed_gib": 4.7,
    "lines": [{"name": "weights", "bytes": 1}],
    "changes": [{"keys": "training.gradient_checkpointing=true", "needed_gib": 3.2}],
}


def job(run: RunDir, kind: str, peak: float, said: list[str]) -> Any:
    where = SimpleNamespace(kind=kind, peak_memory_gib=lambda: peak)
    return SimpleNamespace(run=run, parts=SimpleNamespace(machine=where), display=SimpleNamespace(say=said.append))


@pytest.mark.parametrize(("kind", "peak", "lines"), [("cuda", 5.0, 1), ("cuda", 4.2, 0), ("cpu", 9.0, 0)])
def test_a_gpu_that_took_more_says_so(tmp_path: Path, kind: str, peak: float, lines: int) -> None:
    said: list[str] = []
    run = RunDir(tmp_path)
    run.update(memory=MEMORY)
    fit.note_memory(job(run, kind, peak, said))
    assert RunDir(tmp_path).record["memory"] == MEMORY | {"measured_gib": peak}
    assert len(said) == lines
    if said:
        assert said[0].startswith("note: memory was planned too low by 20%: 4.00 GiB, and 5.00 measured")


def test_memory_that_runs_out_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "detect", lambda: replace(machine.Machine("cpu", "", True)))
    monkeypatch.setattr(machine, "peak_host_gib", lambda: 3.5)
    run = RunDir(tmp_path)
    run.update(memory=MEMORY)
    with pytest.raises(MachineError) as error, translated(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
    assert str(error.value) == (
        "memory: peak 3.50 GiB, and 4.00 were planned: CUDA out of memory. Tried to allocate 2.00 GiB. — "
        "in order of least harm, each on top of those before it, from 4.7 GiB now: "
        "training.gradient_checkpointing=true (3.2 GiB)"
    )
