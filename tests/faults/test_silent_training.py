"""Silent faults of a run (28 to 34): each is planted in a real run, with its gate on and off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from silence import LN2, Row, better, logged, read, rows_of, worse
from transformers import Trainer, TrainerCallback

from alignctl.train import model as models
from alignctl.train import packing, reference, trl_seam
from alignctl.train.attention import Segment
from alignctl.train.packing import Layout

Train = Callable[..., Any]
Plant = Callable[[Callable[[Trainer], object]], None]
Here = Callable[..., Any]
# 28: layers that should have an adapter have none.


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "value_proj"], "no layer of the model is called value_proj"),
        (["k_proj", "layers.0.self_attn.q_proj"], "q_proj has an adapter in 1 of 2 layers"),
        (r".*layers\.1\..*_proj", "down_proj has an adapter in 1 of 2 layers"),
    ],
    ids=["a name too many", "a layer of one block", "one block"],
)
def test_targets_miss_layers(train: Train, targets: str | list[str], said: str) -> None:
    ran = train(lora={"target_modules": targets})
    assert ran.code == 5 and ran.verdict("targets") == "stopped" and f"gate.targets: {said}" in ran.err
    assert "lora.target_modules, or take all-linear" in ran.err
    assert train(lora={"target_modules": targets}, gates={"targets": False}, folder="off").code == 0


def test_targets_miss_everything(train: Train) -> None:
    ran = train(lora={"target_modules": ["value_proj"]})
    assert ran.code == 2 and "Target modules {'value_proj'} not found in the base model" in ran.err


def test_a_target_that_is_no_list(train: Train) -> None:
    ran = train(lora={"target_modules": "q_proj"})
    assert ran.code == 2 and "lora.target_modules" in ran.err and "[q_proj]" in ran.err


# 29: 4 bits were asked for, and not all layers have them, or they compute in something else.


def test_a_layer_that_is_not_in_4_bits(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    config = models.quantization

    def skips(*given: Any) -> Any:
        found = config(*given)
        found.llm_int8_skip_modules = ["down_proj", "lm_head"]
        return found

    monkeypatch.setattr(models, "quantization", skips)
    ran = train(quantization={})
    assert ran.code == 5 and "gate.quantized: 2 of 14 layers are not stored in 4 bits" in ran.err
    found = ran.record["gates"]["quantized"]
    assert (found["verdict"], found["value"], found["limit"]) == ("stopped", 12, 14)
    assert train(quantization={}, gates={"quantized": False}, folder="off").code == 0


def test_a_layer_that_is_not_in_4_bits_is_named(train: Train, plant: Plant) -> None:
    def wide(trainer: Trainer) -> None:
        layer = trainer.model.get_base_model().model.layers[0].mlp.down_proj
        layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)

    plant(wide)
    ran = train(quantization={})
    assert "1 of 14 layers are not stored in 4 bits" in ran.err and "['" not in ran.err


def test_4_bits_computed_in_another_precision(train: Train, plant: Plant) -> None:
    def low(trainer: Trainer) -> None:
        for module in trainer.model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = torch.bfloat16

    plant(low)
    ran = train(quantization={})
    assert ran.code == 5 and "gate.quantized: 4-bit layers compute in bfloat16 instead of float32" in ran.err
    assert train(quantization={}, gates={"quantized": False}, folder="off").code == 0


# 30: a key that nobody knows, or that stands twice.


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"lerning_rate": 1e-5}}, "training.lerning_rate: unknown key — did you mean"),
        ({"trl": {"lable_smoothing": 0.1}}, "trl.lable_smoothing: TRL's dpo config has no such argument — did you"),
        ({"lora": {"lora_r": 8}}, "lora.lora_r: unknown key — "),
        ({"gates": {"refrence": False}}, "gates.refrence: unknown key — did you mean gates.reference?"),
    ],
)
def test_a_key_that_nobody_knows(train: Train, sections: dict[str, Any], said: str) -> None:
    ran = train(**sections)
    assert ran.code == 2 and said in ran.err and not ran.folder.exists()


def test_a_key_that_stands_twice(train: Train, here: Here, tmp_path: Path) -> None:
    assert train().code == 0
    with (tmp_path / "r.yaml").open("a", encoding="utf-8") as file:
        file.write("training: {learning_rate: 1.0e-6}\n")
    done = here("dpo", "r.yaml", "--output", "twice")
    assert done.returncode == 2 and "training: stands twice, first at r.yaml:" in done.stderr
    assert not (tmp_path / "twice").exists()


# 31: stale tokens or reference log-probabilities from a cache.


def test_stale_tokens_are_not_used(train: Train, plant: Plant) -> None:
    trainers: list[Trainer] = []
    plant(trainers.append)
    used = []
    for i, template in enumerate(("chatml", "zephyr", "zephyr")):
        ran = train(model={"chat_template": template}, folder=f"run-{i}")
        assert ran.code == 0, ran.err
        used.append(read(ran, "ledger.json")["train"]["sources"][0]["cache"].split()[0])
    assert used == ["miss", "miss", "hit"]
    first, second, third = ([row["prompt_ids"] for row in trainer.train_dataset] for trainer in trainers)
    assert first != second == third


def test_stale_reference_log_probabilities_are_not_used(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precomputed = {"dpo": {"precompute_ref_log_probs": True}}
    runs = [train(folder=f"run-{i}", **precomputed) for i in range(2)]
    (file,) = (tmp_path / "cache" / "references").glob("*/logps.npy")
    numpy.save(file, numpy.load(file) - [[1.0], [0.0]])  # as of another model, which finds the chosen ones unlikelier
    runs.append(train(folder="stale", **precomputed))
    used = [ran.record["engine"]["reference_cache"].split()[0] for ran in runs]
    assert used == ["miss", "hit", "miss"] and runs[2].verdict("reference") == "passed"
    assert logged(runs[2], "loss") == logged(runs[1], "loss")
    numpy.save(file, numpy.load(file) - [[1.0], [0.0]])
    monkeypatch.setattr(reference, "_agrees", lambda *given: True)
    ran = train(folder="believed", **precomputed)
    assert ran.code == 5 and ran.verdict("reference") == "stopped" and "policy and reference differ by" in ran.err
    off = train(folder="off", gates={"reference": False}, **precomputed)
    assert off.code == 0 and logged(off, "loss")[0] < LN2 - 0.01


def test_another_base_is_another_reference(train: Train, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "base")
    precomputed = {"dpo": {"precompute_ref_log_probs": True}, "model": {"name_or_path": str(tmp_path / "base")}}
    first = train(folder="first", **precomputed)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name: 1.1 * tensor for name, tensor in weights.items()}
    save_file(changed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    second = train(folder="second", **precomputed)
    assert [ran.record["engine"]["reference_cache"][:5] for ran in (first, second)] == ["miss ", "miss "]
    assert second.code == 0 and second.verdict("reference") == "passed"


# 32: the update depends on how many passes it is made of.

UNEVEN = rows_of(4, lambda i: better(i) + " and bread" * (4 * i), worse)


def update(train: Train, tiny: Path, method: str, size: int, passes: int) -> dict[str, torch.Tensor]:
    """What one step of plain gradient descent on four rows adds to the weights."""
    plain = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    ran = train(method, UNEVEN, "--overwrite", lora=None, training=plain | split)
    assert ran.code == 0, ran.err
    start = load_file(tiny / "model.safetensors")
    return {name: p - start[name] for name, p in load_file(ran.folder / "model" / "model.safetensors").items()}


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """How far apart two updates are, relative to their size."""
    difference = sum((first[name] - second[name]).norm() ** 2 for name in first) ** 0.5
    return float(difference / sum(p.norm() ** 2 for p in first.values()) ** 0.5)


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_an_update_is_the_same_in_one_pass_and_in_four(train: Train, tiny: Path, method: str) -> None:
    whole = update(train, tiny, method, 4, 1)
    assert apart(whole, update(train, tiny, method, 1, 4)) < 1e-5
    assert sum(p.norm() ** 2 for p in whole.values()) > 0


def test_a_mean_of_means_is_another_update(train: Train, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own ORPO takes the likelihood's mean over each pass, whose tokens then weigh unlike."""
    ours = update(train, tiny, "orpo", 1, 4)
    batches = trl_seam.IdsORPOTrainer.get_batch_samples

    def uncounted(*given: Any) -> Any:
        return batches(*given)[0], None

    monkeypatch.setattr(trl_seam.IdsORPOTrainer, "get_batch_samples", uncounted)
    assert apart(ours, update(train, tiny, "orpo", 1, 4)) > 0.05


# 33: rows see each other in a pack.


def test_rows_that_see_each_other(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = train(folder="padded", training={"packed": False})
    packed = train(folder="packed")
    assert packed.record["engine"]["packed_tokens"] < packed.record["engine"]["padded_tokens"]
    assert logged(packed, "loss") == pytest.approx(logged(padded, "loss"), abs=1e-5)
    lay_out = packing.lay_out

    def mixed(*given: Any) -> Layout:
        found = lay_out(*given)
        return replace(found, segments=replace(found.segments, parts=(Segment(0, found.segments.total),), masks={}))

    monkeypatch.setattr(packing, "lay_out", mixed)
    ran = train()
    assert ran.code == 5 and ran.verdict("packed") == "stopped", ran.err
    assert "the first batch packed and padded differ by" in ran.err and "training.packed=off" in ran.err
    off = train(folder="off", gates={"packed": False})
    assert off.code == 0 and logged(off, "loss") != pytest.approx(logged(padded, "loss"), abs=1e-5)
    out = train("dpo", None, "training.packed=off", folder="out")
    assert out.code == 0 and logged(out, "loss") == logged(padded, "loss")


def test_trls_own_packing_is_refused(train: Train) -> None:
    ran = train("sft", trl={"packing": True})
    assert ran.code == 2 and "trl.packing: alignctl sets this itself" in ran.err and "rows are not mixed" in ran.err


# 34: a resumed run starts over.

SAVED = {"save_steps": 2}


class Killed(TrainerCallback):
    """Keeps the run folder as it is after step 3, which is what a kill then leaves."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            shutil.copytree("run", "killed")


@pytest.fixture
def killed(train: Train, plant: Plant) -> list[float]:
    """The losses of a run; its folder as it was after step 3 is `killed`."""
    plant(lambda trainer: None if Path("killed").exists() else trainer.add_callback(Killed()))
    ran = train(training=SAVED)
    assert ran.code == 0, ran.err
    return logged(ran, "loss")


def resume(train: Train, folder: str, rows: list[Row] | None = None, **gates: bool) -> Any:
    """Go on from a copy of the killed run, in `folder`."""
    if not Path(folder).exists():
        shutil.copytree("killed", folder)
    return train("dpo", rows, "--resume", training=SAVED, gates=gates, folder=folder)


def test_a_resumed_run_goes_on(train: Train, killed: list[float]) -> None:
    ran = resume(train, "same")
    assert ran.code == 0 and ran.verdict("resume") == "passed" and logged(ran, "loss") == killed
    assert ran.record["gates"]["resume"]["said"] == "goes on from step 2 with its weights and rows"


def test_a_resumed_run_has_a_fresh_adapter(train: Train, killed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda *given, **named: None)
    ran = resume(train, "fresh")
    assert ran.code == 5 and ran.verdict("resume") == "stopped"
    assert "gate.resume: what was loaded is not the checkpoint of step 2" in ran.err
    off = resume(train, "off", resume=False)
    assert off.code == 0 and logged(off, "loss")[:2] == killed[:2] and logged(off, "loss")[2:] != killed[2:]


def test_the_way_out_of_the_only_checkpoint(train: Train, killed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda *given, **named: None)
    ran = resume(train, "fresh")
    assert ran.code == 5 and "the one before" not in ran.err


def test_a_checkpoint_with_another_adapter(train: Train, killed: list[float]) -> None:
    file = Path("killed") / "checkpoints" / "step-2" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    ran = resume(train, "other")
    assert ran.code == 5 and ran.verdict("resume") == "stopped"
    assert "gate.resume: step-2 is not as it was written: adapter_model.safetensors" in ran.err
    off = resume(train, "off", resume=False)
    assert off.code == 0 and logged(off, "loss")[2:] != killed[2:]


def test_a_resumed_run_has_other_rows(train: Train, killed: list[float]) -> None:
    rows = rows_of(16, better, worse)
    ran = resume(train, "other", rows)
    assert ran.code == 3 and ran.verdict("resume") == "stopped"
    assert "the rows of data.train are not those that the run began with — put the old files back" in ran.err
    assert resume(train, "off", rows, resume=False).code == 0
