"""The faults that hide in a training run, planted in TRL's own trainer and in alignctl's run: who says so?

Prints the table of docs/gates.md, and exits 1 when a fault goes through alignctl in silence.

python benchmarks/faults.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from alignctl.cli.main import main as command_line
from alignctl.recipe import catalog
from alignctl.train import fit, standin

WORDS = ["tea", "rain", "bread", "stone", "river", "lamp", "cloud", "wheel"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
TRAINING: dict[str, Any] = {"learning_rate": 5e-4, "max_steps": 4, "lr_scheduler_type": "constant"}
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}
Row = dict[str, Any]


def pairs(count: int = 16) -> list[Row]:
    """Pairs of which neither side can be told by its length, its words or its first token."""
    picked = [(WORDS[i % 8], WORDS[(3 * i + 1) % 8], i) for i in range(count)]
    return [{"prompt": f"Say {i} and {a}.", "chosen": f"{a} {i} {b}", "rejected": f"{b} {i} {a}"} for a, b, i in picked]


def messages(rows: list[Row]) -> list[Row]:
    """Pairs as conversations, which TRL renders with the chat template."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in rows]


@dataclass(frozen=True)
class Lab:
    """A folder with a tiny model."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "tiny" / "model"

    def with_tokenizer(self, fault: Fault) -> Path:
        """The tiny model's folder, or a copy whose tokenizer is the fault's."""
        if fault.tokenizer is None:
            return self.model
        folder = shutil.copytree(self.model, self.folder / f"tokenizer-{fault.number}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        fault.tokenizer(tokenizer)
        tokenizer.save_pretrained(folder)
        return folder


Plant = Callable[[Trainer], None]


@dataclass(frozen=True)
class Fault:
    """A fault, and how it is planted: by rows, by arguments, or in the trainer before it trains.

    `theirs` are arguments of TRL's config, `ours` sections of the recipe. `shows` says what TRL's trainer did with it,
    and `sound` why it cannot happen in alignctl's, after a look at the trainer that it built; empty where it did.
    """

    number: int
    name: str
    shows: Callable[[Trainer], str]
    rows: list[Row] = field(default_factory=pairs)
    held_out: list[Row] | None = None
    method: str = "dpo"
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    plant: Plant | None = None
    tokenizer: Callable[[PreTrainedTokenizerBase], None] | None = None
    lora: dict[str, Any] | None = field(default_factory=lambda: LORA)
    four_bits: bool = False
    sound: Callable[[Trainer], str] | None = None


# --- what is planted ----------------------------------------------------------------------------------------------


def trained(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def off_the_reference(trainer: Trainer) -> None:
    """The policy has learned already; the reference has not."""
    for name, parameter in trained(trainer).items():
        if "lora_B" in name:
            parameter.normal_(std=0.1)


@torch.no_grad()
def merged_in_memory(trainer: Trainer) -> None:
    """All weights differ from those that the reference was read from."""
    for parameter in trainer.model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))


def in_bfloat16(trainer: Trainer) -> None:
    for parameter in trained(trainer).values():
        parameter.data = parameter.data.bfloat16()


def frozen(trainer: Trainer) -> None:
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(False)


def layers(trainer: Trainer) -> torch.nn.ModuleList:
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    return model.model.layers


def cut_off(trainer: Trainer) -> None:
    """No gradient reaches the first block, as under a checkpointing that forgets its input."""
    layers(trainer)[0].register_forward_hook(lambda module, given, out: out.detach().requires_grad_())


def other_weights(trainer: Trainer) -> None:
    """The optimizer holds copies, which are updated in the place of the weights."""
    group = [torch.nn.Parameter(p.detach().clone()) for p in trained(trainer).values()]
    trainer.optimizer = torch.optim.AdamW(group, lr=TRAINING["learning_rate"])


def widened(trainer: Trainer) -> None:
    """One layer of the two blocks is not stored in 4 bits."""
    layer = layers(trainer)[0].mlp.down_proj
    layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)


def not_a_number(trainer: Trainer) -> None:
    """The second forward pass in training overflows in one block."""
    seen = [0]

    def overflow(module: torch.nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
        seen[0] += module.training and torch.is_grad_enabled()
        return out * float("nan") if seen[0] == 2 else out

    layers(trainer)[1].register_forward_hook(overflow)


# --- what it does to TRL's trainer --------------------------------------------------------------------------------


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def first_loss(trainer: Trainer) -> str:
    return f"first loss {losses(trainer)[0]:.4f}, ln 2 is 0.6931"


def low_precision(trainer: Trainer) -> str:
    kinds = {str(p.dtype).removeprefix("torch.") for p in trained(trainer).values()}
    return f"trained in {', '.join(sorted(kinds))}"


def unmoved(trainer: Trainer) -> str:
    still = [name for name, p in trained(trainer).items() if "lora_B" in name and not p.any()]
    return f"{len(still)} of {sum('lora_B' in name for name in trained(trainer))} adapters are still zero"


def ruined(trainer: Trainer) -> str:
    broken = [p for p in trained(trainer).values() if not torch.isfinite(p).all()]
    return f"{len(broken)} of {len(trained(trainer))} tensors NaN, logged losses {losses(trainer)}"


def fine(trainer: Trainer) -> str:
    return f"losses {losses(trainer)}"


def kept(trainer: Trainer) -> str:
    return f"{len(trainer.train_dataset)} of 16 rows are trained on"


def batch(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All training rows, collated as for training."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def spans(trainer: Trainer) -> list[tuple[list[int], list[int]]]:
    """Of each sequence that is trained on: the ids that it is asked with, and those that are supervised."""
    found = batch(trainer)
    if "chosen_input_ids" in found:  # TRL's ORPO
        sides = [(found[f"{side}_input_ids"], found[f"{side}_labels"] != -100) for side in ("chosen", "rejected")]
    elif "labels" in found:
        sides = [(found["input_ids"], found["labels"] != -100)]
    else:
        sides = [(found["input_ids"], found["completion_mask"].bool())]
    out = []
    for ids, mask in sides:
        for row, keep in zip(ids, mask, strict=True):
            start = int(keep.long().argmax()) if keep.any() else len(row)
            out.append((row[:start].tolist(), row[keep].tolist()))
    return out


def count(trainer: Trainer, what: str, holds: Callable[[list[int], list[int]], bool]) -> str:
    found = spans(trainer)
    return f"{sum(holds(*span) for span in found)} of {len(found)} {what}"


def none(trainer: Trainer, what: str, holds: Callable[[list[int], list[int]], bool]) -> str:
    """`what`, where no sequence `holds` it."""
    return "" if any(holds(*span) for span in spans(trainer)) else what


def stop(trainer: Trainer) -> int:
    """The token that ends a turn in the chat template."""
    return trainer.processing_class.convert_tokens_to_ids("<|im_end|>")


def open_ended(trainer: Trainer) -> str:
    end = trainer.processing_class.eos_token_id
    return count(trainer, "answers have no EOS", lambda asked, answer: end not in answer[-2:])


def run_on(trainer: Trainer) -> str:
    end = stop(trainer)
    said = "answers go on behind their end"
    return count(trainer, said, lambda asked, answer: end in answer[:-1] and answer.index(end) < len(answer) - 2)


def no_end(trainer: Trainer) -> str:
    ends = trainer.model.generation_config.eos_token_id
    return f"generation stops at {ends}, and the template ends a turn with {stop(trainer)}"


def ends(trainer: Trainer) -> str:
    return "generation stops at the template's end of a turn" if stop(trainer) in _ends(trainer) else ""


def _ends(trainer: Trainer) -> list[int]:
    found = trainer.model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found]


def _doubled(trainer: Trainer, ids: list[int]) -> bool:
    return ids[:2] == [trainer.processing_class.bos_token_id] * 2


def twice(trainer: Trainer) -> str:
    return count(trainer, "sequences begin with BOS twice", lambda asked, answer: _doubled(trainer, asked + answer))


def begins_with_end(trainer: Trainer) -> str:
    end = trainer.processing_class.eos_token_id
    return count(trainer, "sequences begin with EOS", lambda asked, answer: asked[:1] == [end])


def asked_with(trainer: Trainer) -> str:
    text = trainer.processing_class.decode(spans(trainer)[0][0])
    return f"the prompt is taken to be {text[-24:]!r}"


def accuracy(trainer: Trainer) -> str:
    found = [row["rewards/accuracies"] for row in trainer.state.log_history if "rewards/accuracies" in row]
    return f"accuracies {[round(each, 2) for each in found[-4:]]}"


def rewards(trainer: Trainer) -> str:
    last = next(row for row in reversed(trainer.state.log_history) if "rewards/chosen" in row)
    return (
        f"rewards end at {last['rewards/chosen']:.1f} for chosen, {last['rewards/rejected']:.1f} for rejected answers"
    )


def answered(trainer: Trainer) -> str:
    asked = trainer.processing_class("Ask 1", return_tensors="pt").input_ids
    out = trainer.model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=24)
    return f"answers {trainer.processing_class.decode(out[0, asked.shape[1] :])!r}"


def supervised(trainer: Trainer) -> str:
    return count(trainer, "rows have a supervised token", lambda asked, answer: bool(answer))


def asked_otherwise(trainer: Trainer) -> int:
    """How many sequences are trained behind another prompt than they would be asked with."""
    tokenizer = trainer.processing_class
    texts = [tokenizer.decode(asked) for asked, _ in spans(trainer)]
    again = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return sum(asked != ids for (asked, _), ids in zip(spans(trainer), again, strict=True))


def seams(trainer: Trainer) -> str:
    return f"{asked_otherwise(trainer)} of {len(spans(trainer))} prompts have other tokens than when asked"


def turns(trainer: Trainer) -> str:
    asked = spans(trainer)[0][0]
    return f"{asked.count(trainer.processing_class.convert_tokens_to_ids('<|im_start|>')) - 1} of 3 turns"


def talk(last: list[Row]) -> list[Row]:
    return [{"role": "user", "content": "Say tea."}, {"role": "assistant", "content": "tea"}, *last]


def adapters(trainer: Trainer) -> str:
    return f"{sum('lora_B' in name for name in trained(trainer))} adapters, for 2 blocks of 7 layers"


def in_four_bits(trainer: Trainer) -> str:
    return f"{sum(isinstance(module, Linear4bit) for module in trainer.model.modules())} of 14 layers in 4 bits"


def with_scores(rows: list[Row]) -> list[Row]:
    """Every third row has the worse answer as the chosen one."""
    return [row | {"score_chosen": 1.0 if i % 3 == 0 else 3.0, "score_rejected": 2.0} for i, row in enumerate(rows)]


def longer(rows: list[Row]) -> list[Row]:
    return [row | {"chosen": f"{row['chosen']} and tea, bread"} for row in rows]


def without_prompt(rows: list[Row]) -> list[Row]:
    return [{side: f"{row['prompt']} Well, {row[side]}" for side in ("chosen", "rejected")} for row in rows]


def changed(rows: list[Row], every: int, **values: str) -> list[Row]:
    return [row | values if i % every == 0 else row for i, row in enumerate(rows)]


def to_sft(rows: list[Row]) -> list[Row]:
    return [{"messages": row["prompt"] + row["chosen"]} for row in messages(rows)]


def bos_is_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in Phi-2, whose one special token is neither of the template's."""
    tokenizer.bos_token = tokenizer.eos_token = "!"


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in Llama and Mistral."""
    before = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    adding = processors.TemplateProcessing(single=f"{tokenizer.bos_token} $A", special_tokens=before)
    tokenizer.backend_tokenizer.post_processor = adding


def pad_is_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token


LONG = "river " * 200
FAULTS = [
    Fault(1, "the reference is not what training starts from", first_loss, plant=off_the_reference),
    Fault(
        2,
        "the reference is read anew, what was merged in memory is lost",
        first_loss,
        plant=merged_in_memory,
        lora=None,
        ours={"training": {"learning_rate": 1e-5}},
    ),
    Fault(3, "adapters in bfloat16", low_precision, plant=in_bfloat16),
    Fault(4, "nothing is trained", fine, plant=frozen),
    Fault(5, "no gradient reaches some layers", unmoved, plant=cut_off),
    Fault(6, "the optimizer updates something else", unmoved, plant=other_weights),
    Fault(7, "NaN behind the log's filter", ruined, plant=not_a_number),
    Fault(
        8,
        "no answer left after cutting",
        ruined,
        rows=changed(pairs(), 5, prompt=LONG),
        method="orpo",
        theirs={"max_length": 64},
        ours={"data": {"max_length": 64}},
    ),
    Fault(
        9,
        "rows too long for the limit",
        kept,
        rows=messages(changed(pairs(), 5, prompt=LONG)),
        theirs={"max_length": 64},
        ours={"data": {"max_length": 64}},
    ),
    Fault(
        10,
        "answers cut before their EOS",
        open_ended,
        rows=messages(changed(pairs(), 5, chosen=LONG)),
        theirs={"max_length": 64},
        ours={"data": {"max_length": 64}},
    ),
    Fault(
        11,
        "EOS masked because it pads",
        open_ended,
        rows=to_sft(pairs()),
        method="sft",
        tokenizer=pad_is_eos,
        sound=lambda t: none(t, "every answer ends in a supervised stop token", lambda q, a: stop(t) not in a[-2:]),
    ),
    Fault(
        12,
        "EOS twice, or something behind it",
        run_on,
        rows=messages(pairs()),
        method="orpo",
        sound=lambda t: none(t, "nothing follows an answer's end", lambda q, a: stop(t) in a[:-2]),
    ),
    Fault(13, "EOS is not the end of a turn", no_end, rows=messages(pairs()), tokenizer=bos_is_eos, sound=ends),
    Fault(
        14,
        "BOS twice",
        twice,
        rows=[{"text": f"<|im_start|>user {row['prompt']}"} for row in pairs()],
        method="sft",
        tokenizer=adds_bos,
        sound=lambda t: none(t, "no row begins with BOS twice", lambda q, a: _doubled(t, q + a)),
    ),
    Fault(
        15,
        "BOS that is EOS before the prompt",
        begins_with_end,
        method="orpo",
        tokenizer=bos_is_eos,
        sound=lambda t: none(t, "no row begins with EOS", lambda q, a: q[0] == t.processing_class.eos_token_id),
    ),
    Fault(
        17,
        "a mask without a supervised token",
        supervised,
        rows=to_sft(pairs()),
        method="sft",
        theirs={"assistant_only_loss": True},
        sound=lambda t: none(t, "every row has supervised tokens", lambda q, a: not a),
    ),
    Fault(18, "the prompt guessed from what two texts share", asked_with, rows=without_prompt(pairs())),
    Fault(
        19,
        "an answer's first letters read as the prompt's",
        seams,
        rows=[row | {"prompt": row["prompt"] + " whe", "chosen": "el" + row["chosen"]} for row in pairs()],
        sound=lambda t: "" if asked_otherwise(t) else "prompt and answer are tokenized apart",
    ),
    Fault(
        20,
        "a conversation cut to one turn",
        turns,
        rows=[row | {"prompt": talk(row["prompt"])} for row in messages(pairs())],
        sound=lambda t: "all turns are there" if turns(t) == "3 of 3 turns" else "",
    ),
    Fault(21, "chosen and rejected swapped in every third row", accuracy, rows=with_scores(pairs())),
    Fault(22, "both answers the same", first_loss, rows=changed(pairs(), 2, chosen="tea", rejected="tea")),
    Fault(
        23,
        "pairs that one word tells apart",
        accuracy,
        rows=[row | {"chosen": f"good {row['chosen']}", "rejected": f"bad {row['rejected']}"} for row in pairs(240)],
    ),
    Fault(
        24,
        "the longer answer always wins",
        accuracy,
        rows=longer(pairs(64)),
    ),
    Fault(
        25,
        "chosen answers become unlikely too",
        rewards,
        theirs={"learning_rate": 3e-3, "max_steps": 60, "loss_type": "apo_down"},
        ours={"training": {"learning_rate": 3e-3, "max_steps": 60}, "dpo": {"loss_type": "apo_down"}},
    ),
    Fault(
        26,
        "answers that repeat themselves",
        answered,
        rows=to_sft([row | {"chosen": "tea " * 30} for row in pairs(32)]),
        held_out=to_sft([row | {"chosen": "tea " * 30, "prompt": f"Ask {i}"} for i, row in enumerate(pairs(4))]),
        method="sft",
        lora=None,
        theirs={"learning_rate": 1e-2, "max_steps": 40},
        ours={
            "training": {"learning_rate": 1e-2, "max_steps": 40},
            "evaluation": {"samples": 4, "max_new_tokens": 24},
        },
    ),
    Fault(27, "held-out prompts in the training rows", accuracy, held_out=pairs(4)),
    Fault(
        28,
        "LoRA targets that are not there",
        adapters,
        lora=LORA | {"target_modules": ["q_proj", "value_proj"]},
    ),
    Fault(
        29,
        "QLoRA on layers that are not quantised",
        in_four_bits,
        plant=widened,
        four_bits=True,
        ours={"quantization": {}},
    ),
    Fault(
        33,
        "rows that see each other in a pack",
        fine,
        rows=to_sft(pairs()),
        method="sft",
        theirs={"packing": True, "max_length": 64},
        ours={"trl": {"packing": True}},
    ),
    Fault(30, "a mistyped key", fine, theirs={"lerning_rate": 1e-5}, ours={"training": {"lerning_rate": 1e-5}}),
]


# --- faults between runs ------------------------------------------------------------------------------------------


def trl_trainer(lab: Lab, method: str, rows: list[Row], model: Any, tokenizer: Any, **more: Any) -> Trainer:
    """TRL's own trainer with TRL's own config."""
    trainer_class, config_class = TRAINERS[method]
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    common |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "gradient_checkpointing": False}
    peft, held_out = more.pop("lora", LORA), more.pop("held_out", None)
    arguments = common | TRAINING | {"output_dir": str(lab.folder / "trl")} | more
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if held_out is not None:
        given["eval_dataset"] = Dataset.from_list(held_out)
    if peft is not None:
        given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **peft)
    return trainer_class(model, args=config_class(**arguments), **given)


def base(lab: Lab, *, four_bits: bool = False) -> Any:
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if four_bits else None
    return AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32, quantization_config=stored)


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


# --- running it ---------------------------------------------------------------------------------------------------


def by_trl(fault: Fault, lab: Lab) -> str:
    """What TRL's own trainer makes of a fault."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(lab.model)
    if fault.tokenizer is not None:
        fault.tokenizer(tokenizer)
    more = fault.theirs | {"lora": fault.lora, "held_out": fault.held_out}
    model = base(lab, four_bits=fault.four_bits)
    trainer = trl_trainer(lab, fault.method, fault.rows, model, tokenizer, **more)
    if fault.plant is not None:
        fault.plant(trainer)
    trainer.train()
    return fault.shows(trainer)


def by_alignctl(fault: Fault, lab: Lab, folder: Path | None = None) -> tuple[str, list[str]]:
    """How `alignctl METHOD recipe.yaml` ends, and what it says of the fault."""
    folder = folder or lab.folder / f"fault-{fault.number}"
    folder.mkdir()
    source = {"path": "rows.jsonl"}
    data: dict[str, Any] = {"train": [source]}
    for name, rows in (("rows", fault.rows), ("held-out", fault.held_out)):
        if rows is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if fault.held_out is not None:
        data["eval"] = [source | {"path": "held-out.jsonl"}]
    values: dict[str, Any] = {
        "model": {"name_or_path": str(lab.with_tokenizer(fault)), "dtype": "float32"},
        "lora": fault.lora,
        "data": data,
        "training": TRAINING,
        fault.method: {},
        "evaluation": {"samples": 0},
        "gates": {"reload": not fault.number},
    }
    for name, section in fault.ours.items():
        values[name] = {**(values.get(name) or {}), **section}
    text = yaml.safe_dump({name: section for name, section in values.items() if section is not None})
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    why: list[str] = []
    with planted(fault, why):
        code, found = went(folder, fault.method)
    return code, [f"cannot happen: {each}" for each in why if each] or found


def went(folder: Path, method: str, *options: str) -> tuple[str, list[str]]:
    """How the recipe in `folder` ends, and what its run says."""
    with contextlib.chdir(folder):
        code, error = called(method, "recipe.yaml", "--output", "run", *options)
    read = [folder / "run" / name for name in ("run.json", "ledger.json")]
    record, ledger = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {} for file in read)
    return f"exit {code}", said(record, ledger) or ([plain(error)] if code else [])


@contextlib.contextmanager
def planted(fault: Fault, why: list[str]) -> Iterator[None]:
    """Inside, alignctl's trainers are built with the fault; `why` gets the reason that it cannot happen there."""
    before = dict(fit.BUILD)

    def build(recipe: Any, parts: Any) -> Trainer:
        trainer = before[fault.method](recipe, parts)
        if fault.plant is not None:
            fault.plant(trainer)
        if fault.sound is not None:
            why.append(fault.sound(trainer))
        return trainer

    fit.BUILD[fault.method] = build
    try:
        yield
    finally:
        fit.BUILD.update(before)


def called(*arguments: str) -> tuple[int, str]:
    """The exit code of the command line, run in this process, and its error message."""
    sys.argv = ["alignctl", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            command_line()
        except SystemExit as ended:
            return int(ended.code or 0), error.getvalue().strip()
    return 0, ""


def plain(error: str) -> str:
    """The last line of an error: what is wrong, without the rows and the way out."""
    return re.split(r" \(first| — |, which is none", error.splitlines()[-1].removeprefix("alignctl: "))[0]


def said(record: dict[str, Any], ledger: dict[str, Any]) -> list[str]:
    """What alignctl's run folder says of a fault."""
    gates = record.get("gates", {})
    out = [f"`gate.{name}`" for name, found in gates.items() if found["verdict"] in ("warned", "stopped")]
    for part in ("train", "eval"):
        out += [f"ledger: {reason}" for reason in ledger.get(part, {}).get("dropped", {})]
    names = [found["name"] for found in ledger.get("findings", []) if found["warns"]]
    return out + [f"`{name}`" for name in names if name not in USUAL]


# Findings that every run on so few rows has.
USUAL = {"eval.size"}


def made(folder: Path) -> Lab:
    """The tiny model."""
    lab = Lab(folder)
    corpus = folder / "corpus.txt"
    corpus.write_text("Say tea and rain, bread and stone, river and lamp, cloud and wheel.\n", encoding="utf-8")
    family = standin.family("smollm")[0]
    standin._tokenizer(family, corpus, lab.model)
    standin._model(family, lab.model)
    return lab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks of this page too")
    parser.add_argument("--debug", action="store_true", help="tracebacks of TRL's trainers, on stderr")
    args = parser.parse_args()
    table = ["| | fault | TRL's trainer | alignctl |", "|---|---|---|---|"]
    print("\n".join(table))
    silent = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGNCTL_CACHE"] = str(Path(folder) / "cache")
        with quiet():
            lab = made(Path(folder))
        planned = [(f.number, f.name, partial(by_trl, f), partial(by_alignctl, f)) for f in FAULTS]
        for number, name, theirs, ours in sorted([*planned, *BETWEEN], key=lambda each: each[0]):
            if args.only and number not in args.only:
                continue
            with quiet(debug=args.debug):
                found = tried(theirs, lab, debug=args.debug)
                code, named = ours(lab)
            named = [each for each in named if each]
            silent += not named
            table.append(f"| {number} | {name} | {found} | {code}: {'; '.join(named) or 'silent'} |")
            print(table[-1], flush=True)
    if args.write:
        insert(args.write, table)
    sys.exit(1 if silent else 0)


MARKS = ("<!-- faults -->", "<!-- end of faults -->")


def insert(page: Path, table: list[str]) -> None:
    """Put `table`, and where it comes from, between the marks of `page`."""
    start, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    end = rest.split(MARKS[1])[1]
    versions = ", ".join(f"{name} {version(name)}" for name in ("alignctl", "trl", "transformers", "peft", "torch"))
    source = f"`python benchmarks/faults.py`, {datetime.now(UTC).date()}; {versions}."
    page.write_text("\n".join([start + MARKS[0], source, "", *table, MARKS[1]]) + end, encoding="utf-8")


def tried(theirs: Callable[[Lab], str], lab: Lab, *, debug: bool) -> str:
    """How TRL's trainer ends."""
    try:
        return f"exit 0: {theirs(lab)}"
    except Exception as error:  # noqa: BLE001 (whatever it raises is what it says)
        if debug:
            traceback.print_exc()
        return f"stops: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"


@contextlib.contextmanager
def quiet(*, debug: bool = False) -> Iterator[None]:
    """Nothing that is written inside is seen, whoever writes it; with `debug` what goes to stderr is."""
    kept = [os.dup(1), os.dup(2)]
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for descriptor in (1,) if debug else (1, 2):
            os.dup2(nowhere.fileno(), descriptor)
        try:
            yield
        finally:
            for descriptor, original in enumerate(kept, 1):
                os.dup2(original, descriptor)
                os.close(original)


if __name__ == "__main__":
    main()
