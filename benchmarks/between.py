"""Faults between runs: of a parent, a cache, the passes of an update, a checkpoint, a merge."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from faulty import Fault, Lab, fine, losses, merged_in_memory, messages, pairs, spans, to_sft
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trials import base, by_alignctl, trl_trainer, went

from alignctl.recipe import catalog


def parent(lab: Lab) -> Path:
    """A finished SFT run of alignctl."""
    folder = lab.folder / "parent"
    if not folder.is_dir():
        fault = Fault(0, "", fine, rows=to_sft(pairs()), method="sft")
        by_alignctl(fault, lab, folder)
    return folder / "run"


def another_template(lab: Lab) -> str:
    tokenizer = AutoTokenizer.from_pretrained(lab.model)
    first = trl_trainer(lab, "sft", to_sft(pairs()), base(lab), tokenizer)
    first.train()
    tokenizer.chat_template = catalog.template("zephyr")
    trl_trainer(lab, "dpo", messages(pairs()), first.model.merge_and_unload(), tokenizer).train()
    return "DPO with another template than its SFT"


def another_base(lab: Lab) -> str:
    adapter = parent(lab) / "model"
    model = base(lab)
    merged_in_memory(types.SimpleNamespace(model=model))
    tuned = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trl_trainer(lab, "sft", to_sft(pairs()), tuned, AutoTokenizer.from_pretrained(lab.model), lora=None).train()
    return "an adapter trained on weights that it does not belong to"


def on_another_base(lab: Lab) -> tuple[str, list[str]]:
    model = base(lab)
    merged_in_memory(types.SimpleNamespace(model=model))
    folder = shutil.copytree(lab.model, lab.folder / "another-base")
    model.save_pretrained(folder)
    adapter = {"model": {"name_or_path": str(folder), "adapter": str(parent(lab))}}
    return by_alignctl(Fault(35, "", fine, ours=adapter, lora=None), lab)


def with_another_template(lab: Lab) -> tuple[str, list[str]]:
    adapter = {"model": {"adapter": str(parent(lab)), "chat_template": "zephyr"}}
    return by_alignctl(Fault(16, "", fine, ours=adapter, lora=None), lab)


def another_cache(lab: Lab) -> str:
    file = lab.folder / "cached.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in messages(pairs())), encoding="utf-8")
    ids = []
    for template in ("chatml", "zephyr"):
        tokenizer = AutoTokenizer.from_pretrained(lab.model)
        tokenizer.chat_template = catalog.template(template)
        rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(lab.folder / "cache"))
        ids.append(spans(trl_trainer(lab, "dpo", list(rows), base(lab), tokenizer))[0])
    return "tokenized anew" if ids[0] != ids[1] else "the old tokens are used"


def cached_again(lab: Lab) -> tuple[str, list[str]]:
    used = []
    for number, template in ((310, "chatml"), (311, "zephyr"), (312, "zephyr")):
        ours = {"model": {"chat_template": template}}
        code, _ = by_alignctl(Fault(number, "", fine, rows=pairs(20), ours=ours), lab)
        ledger = json.loads((lab.folder / f"fault-{number}" / "run" / "ledger.json").read_text(encoding="utf-8"))
        used.append(ledger["train"]["sources"][0]["cache"].split()[0])
    right = used == ["miss", "miss", "hit"]
    return code, ["cannot happen: another template is a cache miss, the same one a hit"] if right else []


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """How far apart two sets of weights are, relative to their size."""
    difference = sum((first[name] - second[name]).norm() ** 2 for name in first) ** 0.5
    return float(difference / sum(p.norm() ** 2 for p in first.values()) ** 0.5)


UNEVEN = [row | {"chosen": row["chosen"] + " and bread" * (4 * (i % 4))} for i, row in enumerate(pairs(4))]


ONE_STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}


def scaled(lab: Lab) -> str:
    found = []
    for size, passes in ((4, 1), (1, 4)):
        set_seed(0)
        more = ONE_STEP | {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
        trainer = trl_trainer(
            lab, "orpo", UNEVEN, base(lab), AutoTokenizer.from_pretrained(lab.model), lora=None, **more
        )
        trainer.train()
        found.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    start = dict(base(lab).named_parameters())
    steps = [{name: p - start[name].detach() for name, p in weights.items()} for weights in found]
    return f"4 x 1 and 1 x 4 rows give updates that are {apart(*steps):.0%} apart"


def scaled_alike(lab: Lab) -> tuple[str, list[str]]:
    found = []
    start = {name: p.detach() for name, p in base(lab).named_parameters()}
    for number, size, passes in ((320, 4, 1), (321, 1, 4)):
        training = ONE_STEP | {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
        fault = Fault(number, "", fine, rows=UNEVEN, method="orpo", lora=None, ours={"training": training})
        code, _ = by_alignctl(fault, lab)
        saved = load_file(lab.folder / f"fault-{number}" / "run" / "model" / "model.safetensors")
        found.append({name: p - start[name] for name, p in saved.items()})
    difference = apart(*found)
    return code, [f"cannot happen: updates are {difference:.0e} apart"] if difference < 1e-4 else []


def fresh(folder: Path) -> None:
    """Another adapter in the place of the checkpoint's."""
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.randn_like(p) for name, p in load_file(file).items()}, file)


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def replaced(lab: Lab) -> str:
    for resume in (None, str(lab.folder / "trl" / "checkpoint-2")):
        tokenizer = AutoTokenizer.from_pretrained(lab.model)
        trainer = trl_trainer(lab, "dpo", pairs(), base(lab), tokenizer, **SAVING)
        trainer.train(resume_from_checkpoint=resume)
        fresh(lab.folder / "trl" / "checkpoint-2")
    return f"goes on with another adapter, first loss {losses(trainer)[-2]:.2f}"


def resumed(lab: Lab) -> tuple[str, list[str]]:
    stops = Fault(34, "", fine, plant=stop_after_two, ours={"training": {"save_steps": 2}})
    by_alignctl(stops, lab)
    folder = lab.folder / "fault-34"
    fresh(folder / "run" / "checkpoints" / "step-2")
    return went(folder, "dpo", "--resume")


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("the power fails")


def stop_after_two(trainer: Trainer) -> None:
    trainer.add_callback(_Stop())


def merged(lab: Lab) -> str:
    tuned = PeftModel.from_pretrained(base(lab, four_bits=True), parent(lab) / "model").eval()
    asked = torch.arange(20)[None]
    with torch.no_grad():
        before = tuned(input_ids=asked).logits
        after = tuned.merge_and_unload()(input_ids=asked).logits
    return f"PEFT merges into 4 bits: logits move by up to {(before - after).abs().max():.2f}"


def not_merged(lab: Lab) -> tuple[str, list[str]]:
    record = json.loads((parent(lab) / "run.json").read_text(encoding="utf-8"))
    whole = record["gates"]["reload"]["verdict"] == "passed"
    return "exit 0", ["cannot happen: nothing is merged, and `gate.reload` compares what is saved"] if whole else []


BETWEEN: list[tuple[int, str, Callable[[Lab], str], Callable[[Lab], tuple[str, list[str]]]]] = [
    (16, "another chat template than the parent's", another_template, with_another_template),
    (31, "stale tokens from a cache", another_cache, cached_again),
    (32, "accumulation scales the loss", scaled, scaled_alike),
    (34, "a resumed run with another adapter", replaced, resumed),
    (35, "an adapter on the wrong base", another_base, on_another_base),
    (36, "merging changes the model", merged, not_merged),
]
