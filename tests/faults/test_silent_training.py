"""Silent faults of rows, training and resuming (21 to 34): each is planted in a real run, with its gate on and off."""

from __future__ import annotations

import json
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
from transformers import Trainer, TrainerCallback

from alignctl.train import fit, packing, reference, trl_seam
from alignctl.train import model as models
from alignctl.train.attention import Segment
from alignctl.train.packing import Layout

Train = Callable[..., Any]
Plant = Callable[[str, Callable[[Trainer], object]], None]
Here = Callable[..., Any]
Row = dict[str, Any]

WORDS = ["tea", "rain", "bread", "stone", "river", "lamp", "cloud", "wheel"]
LN2 = 0.6931471805599453


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Let a function have every trainer of a method once it is built."""

    def planted(method: str, change: Callable[[Trainer], object]) -> None:
        build = fit.BUILD[method]

        def changed(*given: Any) -> Trainer:
            trainer = build(*given)
            change(trainer)
            return trainer

        monkeypatch.setitem(fit.BUILD, method, changed)

    return planted


def rows_of(count: int, chosen: Callable[[int], str], rejected: Callable[[int], str]) -> list[Row]:
    return [{"prompt": f"Say {i}.", "chosen": chosen(i), "rejected": rejected(i)} for i in range(count)]


def read(ran: Any, name: str) -> Any:
    text = (ran.folder / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def logged(ran: Any, name: str) -> list[float]:
    return [row[name] for row in read(ran, "metrics.jsonl") if name in row]


def findings(ran: Any) -> dict[str, Row]:
    """The findings of the data doctor that warn, by name."""
    return {finding["name"]: finding for finding in read(ran, "ledger.json")["findings"] if finding["warns"]}


def printed(ran: Any) -> str:
    """What a run printed, in one line."""
    return " ".join(ran.out.split())


# 21: chosen and rejected are swapped, or chance decided which is which.


def better(i: int) -> str:
    return f"{WORDS[i % 4]} {WORDS[(i + 1) % 4]}"


def worse(i: int) -> str:
    return f"{WORDS[4 + i % 4]} {WORDS[4 + (i + 1) % 4]}"


@pytest.fixture
def taught(train: Train) -> dict[str, Any]:
    """Sections of a run that goes on from an adapter that has learned a little to give the better answers."""
    ran = train("sft", rows_of(16, better, worse), folder="taught", training={"max_steps": 10, "learning_rate": 5e-3})
    assert ran.code == 0, ran.err
    return {"model": {"adapter": "taught"}, "lora": None}


def test_chosen_and_rejected_are_swapped(train: Train, taught: dict[str, Any]) -> None:
    held_out: dict[str, Any] = taught | {"data": {"eval_fraction": 0.5}}
    ran = train("dpo", rows_of(40, worse, better), **held_out)
    assert ran.code == 0 and ran.verdict("labels") == "warned", ran.err
    found = ran.record["gates"]["labels"]
    assert found["said"] == "the model finds the chosen answer likelier in 0 of 20 held-out pairs"
    assert (found["value"], found["limit"]) == (0.0, 0.35)
    assert "warning: gate.labels: " in ran.out and "are chosen and rejected swapped?" in printed(ran)
    right = train("dpo", rows_of(40, better, worse), folder="right", **held_out)
    assert right.verdict("labels") == "passed" and right.record["gates"]["labels"]["value"] == 1.0
    off = train("dpo", rows_of(40, worse, better), gates={"labels": False}, folder="off", **held_out)
    assert off.code == 0 and off.verdict("labels") == "off" and "swapped" not in off.out


def test_scores_that_contradict_the_columns(train: Train) -> None:
    scored = [
        row | {"score_chosen": 1.0 if i % 3 == 0 else 3.0, "score_rejected": 2.0}
        for i, row in enumerate(rows_of(16, better, worse))
    ]
    ran = train("dpo", scored)
    found = findings(ran)["scores.reversed"]
    assert ran.code == 0 and (found["rows"], found["first"][:2]) == (6, ["rows.jsonl:1", "rows.jsonl:4"])
    assert "note: scores.reversed: 6 of 16 rows (37.5%)" in printed(ran)


def test_labels_of_chance(train: Train) -> None:
    """Every pair stands there both ways."""
    rows = rows_of(4, better, worse)
    rows += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    whole = {"max_steps": 20, "per_device_train_batch_size": 8}
    ran = train("dpo", rows, training=whole)
    assert ran.code == 0 and ran.verdict("noise") == "warned", ran.err
    assert "ln 2 is what guessing gives: nothing was learned" in printed(ran)
    assert all(abs(loss - LN2) < 1e-3 for loss in logged(ran, "loss"))
    off = train("dpo", rows, training=whole, gates={"noise": False}, folder="off")
    assert off.code == 0 and off.verdict("noise") == "off" and "guessing" not in off.out


# 22: both answers are the same.


def test_answers_that_are_the_same(train: Train, plant: Plant) -> None:
    trainers: list[Trainer] = []
    plant("dpo", trainers.append)
    rows = rows_of(16, better, lambda i: better(i) + "  " if i % 2 else worse(i))
    ran = train("dpo", rows)
    assert ran.code == 3 and trainers == []
    assert "8 of 16 rows would be dropped" in ran.err
    assert "chosen equals rejected: 8 (first: rows.jsonl:2, rows.jsonl:4, rows.jsonl:6)" in ran.err
    some = train("dpo", rows, data={"max_dropped": 1.0}, folder="some")
    dropped = read(some, "ledger.json")["train"]["dropped"]
    assert some.code == 0 and dropped["chosen equals rejected"]["rows"] == 8
    assert len(trainers[0].train_dataset) == 8
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in trainers[0].train_dataset)


def test_the_way_out_fits_answers_that_are_the_same(train: Train) -> None:
    ran = train("dpo", rows_of(16, better, better))
    assert ran.code == 3 and "chosen equals rejected: 16" in ran.err and "data.max_length" not in ran.err


def test_answers_that_are_nearly_the_same(train: Train) -> None:
    long = " ".join(WORDS * 4)
    ran = train("dpo", rows_of(16, lambda i: f"{long} {i % 8}", lambda i: f"{long} {i % 8 + 1}"))
    assert ran.code == 0 and findings(ran)["answers.alike"]["rows"] == 16
    assert "both fall together" in printed(ran)


# 23: one word tells the pairs apart.


def test_pairs_that_one_word_tells_apart(train: Train) -> None:
    rows = rows_of(240, lambda i: f"good {better(i)}", lambda i: f"bad {better(i)}")
    ran = train("dpo", rows, training={"max_steps": 40})
    assert ran.code == 0 and {"shortcut.words", "shortcut.first_token"} <= findings(ran).keys(), ran.err
    assert "note: shortcut.words: 100.0%" in printed(ran)
    assert ran.verdict("easy") == "warned" and ran.record["gates"]["easy"]["step"] == 4
    assert "all of 12 pairs in a row were told apart by step 4 of 40" in printed(ran)
    assert logged(ran, "rewards/accuracies")[:4] == [0.0, 1.0, 1.0, 1.0]
    off = train("dpo", rows, training={"max_steps": 40}, gates={"easy": False}, folder="off")
    assert off.code == 0 and off.verdict("easy") == "off" and "told apart" not in off.out


# 24: length decides.


def test_the_longer_answer_wins(train: Train) -> None:
    rows = rows_of(64, lambda i: " ".join((WORDS * 3)[: 4 + i % 15]), lambda i: WORDS[i % 8])
    sections = {"training": {"max_steps": 8, "learning_rate": 3e-3}, "data": {"eval_fraction": 0.4}}
    ran = train("dpo", rows, evaluation={"samples": 2, "max_new_tokens": 8}, **sections)
    assert ran.code == 0 and ran.verdict("length") == "warned", ran.err
    found = ran.record["gates"]["length"]
    assert found["value"] > 0.9 and "the longer answer wins, whatever it says" in found["said"]
    assert "note: shortcut.length: " in ran.out and findings(ran)["shortcut.length"]["warns"]
    assert read(ran, "ledger.json")["train"]["chosen_longer"] == 1.0
    samples = read(ran, "summary.json")["samples"]
    tokens = [sum(row[f"{when}_tokens"] for row in read(ran, "samples.jsonl")) for when in ("before", "after")]
    assert samples["length_ratio"] == pytest.approx(tokens[1] / tokens[0])
    off = train("dpo", rows, gates={"length": False}, folder="off", **sections)
    assert off.code == 0 and off.verdict("length") == "off" and "whatever it says" not in off.out


# 25: the margin rises while the chosen answers become unlikely.


def test_chosen_answers_become_unlikely(train: Train) -> None:
    alike = [f"{WORDS[i % 4]} {WORDS[(i + 1) % 8]}" for i in range(16)]
    rows = rows_of(16, lambda i: f"{alike[i]} yes", lambda i: f"{alike[i]} no")
    sections = {"training": {"max_steps": 20, "learning_rate": 3e-3}, "dpo": {"loss_type": "apo_down"}}
    ran = train("dpo", rows, **sections)
    assert ran.code == 0 and ran.verdict("drift") == "warned", ran.err
    assert "chosen answers have become unlikelier: -0." in printed(ran) and "a higher beta" in printed(ran)
    chosen, rejected = (logged(ran, f"rewards/{side}")[-1] for side in ("chosen", "rejected"))
    assert 0 > chosen > rejected
    off = train("dpo", rows, gates={"drift": False}, folder="off", **sections)
    assert off.code == 0 and off.verdict("drift") == "off" and "unlikelier" not in off.out


def test_a_likelihood_term_of_the_wrong_sign(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = trl_seam.orpo_loss

    def wrong(*given: Any) -> Any:
        terms = loss(*given)
        return replace(terms, nll=-terms.nll)

    monkeypatch.setattr(trl_seam, "orpo_loss", wrong)
    ran = train("orpo", training={"max_steps": 12, "learning_rate": 5e-3})
    found = ran.record["gates"]["drift"]
    assert ran.code == 0 and found["verdict"] == "warned" and found["value"] < -0.3, ran.err
    assert found["value"] == pytest.approx(logged(ran, "logps/chosen")[-1] - logged(ran, "logps/chosen")[0], abs=1e-2)


# 26: answers fall into repetition, or no longer end.

COLLAPSE: dict[str, Any] = {
    "lora": None,
    "training": {"max_steps": 20, "learning_rate": 1e-2},
    "data": {"eval_fraction": 0.15},
    "evaluation": {"samples": 4, "max_new_tokens": 24},
}


def test_answers_repeat_themselves(train: Train) -> None:
    rows = rows_of(32, lambda i: "tea " * 30, better)
    asked = COLLAPSE | {"training": COLLAPSE["training"] | {"eval_steps": 15}}
    ran = train("sft", rows, **asked)
    assert ran.code == 0 and ran.verdict("answers") == "warned", ran.err
    assert ran.record["gates"]["answers"]["value"] == pytest.approx(1 / 23, abs=1e-3)  # 24 times tea: 23 pairs, one new
    assert "their word pairs are new; before training 0% and" in printed(ran)
    assert printed(ran).index("warning: gate.answers") < printed(ran).index("step 20/20")
    off = train("sft", rows, gates={"answers": False}, folder="off", **asked)
    assert off.code == 0 and off.verdict("answers") == "off" and "warning: gate.answers" not in off.out


def test_answers_repeat_themselves_without_a_space(train: Train) -> None:
    ran = train("sft", rows_of(32, lambda i: "ha" * 40, better), **COLLAPSE)
    assert all("hahahaha" in row["after"] for row in read(ran, "samples.jsonl"))
    assert ran.verdict("answers") == "warned"


def test_answers_no_longer_end(train: Train) -> None:
    first = train("sft", rows_of(32, lambda i: "tea", better), folder="first", **COLLAPSE)
    assert first.record["gates"]["answers"]["said"].startswith("100% of 4 answers end")
    cut = COLLAPSE["data"] | {"max_length": 40, "overlong": "truncate_completion"}
    rows = rows_of(32, lambda i: " ".join([*WORDS, *map(str, range(9))]), better)
    ran = train("sft", rows, **COLLAPSE | {"model": {"name_or_path": "first/model"}, "data": cut})
    assert ran.code == 0 and ran.verdict("answers") == "warned", ran.err
    said = ran.record["gates"]["answers"]["said"]
    assert said.startswith("0% of 4 answers end") and "before training 100%" in said
    assert findings(ran)["rows.answer_cut"]["rows"] == read(ran, "ledger.json")["train"]["kept"]
    assert "learns not to stop" in printed(ran)


# 27: held-out prompts are trained on.


def test_held_out_prompts_in_the_training_rows(train: Train, plant: Plant, tmp_path: Path) -> None:
    trainers: list[Trainer] = []
    plant("dpo", trainers.append)
    held_out = [rows_of(4, better, worse)[0], {"prompt": "SAY  1. ", "chosen": "tea", "rejected": "rain"}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    ran = train("dpo", rows_of(16, better, worse), data={"eval": [{"path": "held.jsonl"}]})
    assert ran.code == 3 and "prompt is in the held-out rows: 2 (first: rows.jsonl:1, rows.jsonl:2)" in ran.err
    some = train("dpo", rows_of(16, better, worse), data={"eval": [{"path": "held.jsonl"}], "max_dropped": 1.0})
    assert some.code == 0 and findings(some)["eval.seen"]["rows"] == 2, some.err
    assert "note: eval.seen: 2 of 16 rows (12.5%)" in printed(some)
    trained, kept = (
        {tuple(row["prompt_ids"]) for row in part} for part in (trainers[0].train_dataset, trainers[0].eval_dataset)
    )
    assert len(trained) == 14 and len(kept) == 2 and trained.isdisjoint(kept)


def test_the_way_out_fits_held_out_prompts(train: Train) -> None:
    ran = train("dpo", rows_of(16, better, worse), data={"eval": [{"path": "rows.jsonl"}]})
    assert ran.code == 3 and "held-out rows: 16" in ran.err and "data.max_length" not in ran.err


def test_a_share_held_out_holds_whole_prompts(train: Train, plant: Plant) -> None:
    """Every prompt stands in four rows; no prompt is on both sides."""
    trainers: list[Trainer] = []
    plant("dpo", trainers.append)
    rows = [row | {"prompt": f"Say {i % 4}."} for i, row in enumerate(rows_of(16, better, worse))]
    ran = train("dpo", rows, data={"eval_fraction": 0.3})
    assert ran.code == 0, ran.err
    (trainer,) = trainers
    trained, kept = ([tuple(r["prompt_ids"]) for r in part] for part in (trainer.train_dataset, trainer.eval_dataset))
    assert (len(trained), len(kept)) == (12, 4) and set(trained).isdisjoint(kept)


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

    plant("dpo", wide)
    ran = train(quantization={})
    assert "1 of 14 layers are not stored in 4 bits" in ran.err and "['" not in ran.err


def test_4_bits_computed_in_another_precision(train: Train, plant: Plant) -> None:
    def low(trainer: Trainer) -> None:
        for module in trainer.model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = torch.bfloat16

    plant("dpo", low)
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
    plant("dpo", trainers.append)
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
    plant("dpo", lambda trainer: None if Path("killed").exists() else trainer.add_callback(Killed()))
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
