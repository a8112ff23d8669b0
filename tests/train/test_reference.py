"""The reference's log-probabilities, computed once and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from alignctl.recipe.schema import Recipe
from alignctl.train import data, dpo, heldout, machine, reference, standin, trl_seam
from alignctl.train.data import Rows
from alignctl.train.parts import Parts
from alignctl.train.tokenizer import load_encoder

ROWS = [
    {"prompt": f"What is {i} plus one?", "chosen": f"It is {i + 1}.", "rejected": f"Perhaps {i}, or so."}
    for i in range(6)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    given = recipe(Path("tiny-llama"), folder / "rows.jsonl")
    standin.stand_in(given, folder)
    return folder / "model"


def recipe(model: Path, rows: Path, **changes: Any) -> Recipe:
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "lora": {"r": 4},
            "data": {"train": [{"path": str(rows)}]},
            "training": {"learning_rate": 1e-3, **changes.pop("training", {})},
            "dpo": {"precompute_ref_log_probs": True, **changes.pop("dpo", {})},
            **changes,
        }
    )


def built(given: Recipe, run: Path) -> tuple[Trainer, Rows]:
    encoder = load_encoder(given)
    rows, _ = data.prepare(given, encoder)
    parts = Parts(machine.Machine("cpu", "test", True), torch.float32, encoder, rows.dataset(), None, run)
    return dpo.build(given, parts), rows


def precomputed(given: Recipe, run: Path) -> tuple[Trainer, Rows, str]:
    trainer, rows = built(given, run)
    trainer.train_dataset, said = reference.precompute(trainer, rows, torch.float32)
    trainer.precompute_ref_logps = True
    return trainer, rows, said


def test_columns_are_the_references_and_the_loss_is_the_same(tiny: Path, tmp_path: Path) -> None:
    given = recipe(tiny, tmp_path / "rows.jsonl")
    trainer, rows, said = precomputed(given, tmp_path / "a")
    assert said.startswith("miss")
    found = numpy.array([trainer.train_dataset[name] for name in reference.COLUMNS])
    numpy.testing.assert_allclose(found, heldout.reference(trainer, rows), rtol=1e-5)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    kept = trl_seam.loss_and_logps(trainer, batch)[0]
    trainer.precompute_ref_logps = False
    torch.testing.assert_close(kept, trl_seam.loss_and_logps(trainer, batch)[0], rtol=1e-4, atol=1e-5)
    assert abs(kept.item() - 0.6931) > 1e-3  # policy and reference differ


@pytest.mark.parametrize(
    "changes", [{"dpo": {"beta": 0.5}}, {"dpo": {"loss_type": "ipo"}}, {"training": {"learning_rate": 5e-4, "seed": 7}}]
)
def test_runs_that_differ_in_loss_or_rate_share_it(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    precomputed(recipe(tiny, tmp_path / "rows.jsonl"), tmp_path / "a")
    _, _, said = precomputed(recipe(tiny, tmp_path / "rows.jsonl", **changes), tmp_path / "b")
    assert said.startswith("hit")


def test_other_rows_and_other_weights_do_not(tiny: Path, tmp_path: Path) -> None:
    precomputed(recipe(tiny, tmp_path / "rows.jsonl"), tmp_path / "a")
    fewer = recipe(tiny, tmp_path / "rows.jsonl", data={"train": [{"path": str(tmp_path / "rows.jsonl"), "take": 5}]})
    assert precomputed(fewer, tmp_path / "b")[2].startswith("miss")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight.data += 0.01
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "other")
    assert precomputed(recipe(tmp_path / "other", tmp_path / "rows.jsonl"), tmp_path / "c")[2].startswith("miss")


@pytest.mark.parametrize("damage", ["values", "cut", "nan", "shape"])
def test_a_stale_or_damaged_entry_is_made_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    given = recipe(tiny, tmp_path / "rows.jsonl")
    whole = numpy.array(precomputed(given, tmp_path / "a")[0].train_dataset["ref_chosen_logps"])
    (file,) = (tmp_path / "cache" / "references").glob("*/logps.npy")
    values = numpy.load(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        changed = {"values": values - 5, "nan": values * numpy.nan, "shape": values[:, 1:]}[damage]
        numpy.save(file, changed)
    trainer, _, said = precomputed(given, tmp_path / "b")
    assert said.startswith("miss")
    numpy.testing.assert_allclose(trainer.train_dataset["ref_chosen_logps"], whole, rtol=1e-5)
    assert precomputed(given, tmp_path / "c")[2].startswith("hit")
