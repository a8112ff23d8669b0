"""Faults: how each is planted, and what TRL's own trainer shows of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
)

WORDS = ["tea", "rain", "bread", "stone", "river", "lamp", "cloud", "wheel"]


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


TRAINING: dict[str, Any] = {"learning_rate": 5e-4, "max_steps": 4, "lr_scheduler_type": "constant"}


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


# --- what is planted ------------------------------------------------------------------------------------------------


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


# --- what it does to TRL's trainer ----------------------------------------------------------------------------------


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


def doubled(trainer: Trainer, ids: list[int]) -> bool:
    return ids[:2] == [trainer.processing_class.bos_token_id] * 2


def twice(trainer: Trainer) -> str:
    return count(trainer, "sequences begin with BOS twice", lambda asked, answer: doubled(trainer, asked + answer))


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


# --- rows and tokenizers --------------------------------------------------------------------------------------------


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
