"""Tiny stand-ins, so that `--smoke` runs any recipe through the same code in seconds and without a network.

The model has the recipe's architecture with two layers of width 64 and random weights; its byte-level tokenizer is
trained on the spot and carries the special tokens of that architecture's family.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from alignctl import formats
from alignctl.recipe import catalog
from alignctl.recipe.schema import Recipe, Source
from alignctl.train import sources

ROWS = 8
STEPS = 2
_WIDTH = 64


@dataclass(frozen=True)
class Family:
    """An architecture, and the special tokens of its tokenizers (padding None where they have none)."""

    model_type: str
    bos: str | None
    eos: str
    pad: str | None
    extra: dict[str, Any]


_LLAMA = Family("llama", "<s>", "</s>", None, {"num_key_value_heads": 2})
_FAMILIES: dict[str, Family] = {
    r"phi-?(1|2)": Family("phi", "<|endoftext|>", "<|endoftext|>", None, {}),
    r"phi-?(3|4)": Family("phi3", "<s>", "<|endoftext|>", "<|endoftext|>", {"num_key_value_heads": 2}),
    r"mixtral": Family("mixtral", "<s>", "</s>", None, {"num_key_value_heads": 2, "num_local_experts": 4}),
    r"mistral|zephyr|danube": Family("mistral", "<s>", "</s>", None, {"num_key_value_heads": 2}),
    r"smollm3": Family("smollm3", None, "<|im_end|>", "<|im_end|>", {"num_key_value_heads": 2}),
    r"smollm": Family("llama", "<|im_start|>", "<|im_end|>", "<|im_end|>", {"num_key_value_heads": 2}),
    r"qwen-?3": Family("qwen3", None, "<|im_end|>", "<|endoftext|>", {"num_key_value_heads": 2, "head_dim": 16}),
    r"qwen": Family("qwen2", None, "<|im_end|>", "<|endoftext|>", {"num_key_value_heads": 2}),
    r"gemma-?3": Family("gemma3_text", "<bos>", "<eos>", "<pad>", {"num_key_value_heads": 2, "head_dim": 16}),
    r"gemma-?2": Family("gemma2", "<bos>", "<eos>", "<pad>", {"num_key_value_heads": 2, "head_dim": 16}),
    r"olmo-?2": Family("olmo2", None, "<|endoftext|>", "<|pad|>", {}),
    r"granite": Family("granite", "<|endoftext|>", "<|endoftext|>", None, {"num_key_value_heads": 2}),
    r"pythia|gpt-?neox": Family("gpt_neox", "<|endoftext|>", "<|endoftext|>", None, {}),
    r"llama|vicuna|tiny|yi-": _LLAMA,
}


def family(name: str) -> tuple[Family, bool]:
    """The family that a model's folder or name belongs to; False when it had to be guessed."""
    config = Path(name).expanduser() / "config.json"
    if config.is_file():
        model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"]
        known = next((f for f in _FAMILIES.values() if f.model_type == model_type), None)
        if known is None and model_type not in CONFIG_MAPPING:
            return _LLAMA, False
        return known or Family(model_type, "<s>", "</s>", None, {"num_key_value_heads": 4}), True
    hit = next((f for pattern, f in _FAMILIES.items() if re.search(pattern, name.lower())), None)
    return hit or _LLAMA, hit is not None


def stand_in(recipe: Recipe, folder: Path) -> tuple[Recipe, str]:
    """`recipe` made small: stand-ins written under `folder`, a few rows, two steps; and one line that says so."""
    found, known = family(recipe.model.name_or_path)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {part: folder / f"{part}.jsonl" for part in ("train", "test")}
    for part, file in rows.items():
        file.write_text(_built_in_rows(part, recipe.method), encoding="utf-8")
    model = folder / "model"
    _tokenizer(found, rows["train"], model)
    _model(found, model)
    changes: dict[str, Any] = recipe.model_dump()
    changes["model"] |= {"name_or_path": str(model), "revision": None, "adapter": _adapter(recipe, folder, model)}
    changes["data"] |= _data(recipe, rows)
    changes["training"] |= {
        "max_steps": STEPS,
        "per_device_train_batch_size": min(2, recipe.training.per_device_train_batch_size),
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": min(2, recipe.training.gradient_accumulation_steps),
        "gradient_checkpointing": recipe.training.gradient_checkpointing is not False,
        "eval_steps": 1 if recipe.training.eval_steps else None,
        "save_steps": 1,
    }
    changes["evaluation"] |= {"samples": min(2, recipe.evaluation.samples), "max_new_tokens": 8}
    guess = "" if known else ", guessed from nothing: the name is not known and the hub is not asked"
    return Recipe.model_validate(changes), f"smoke run: a tiny random {found.model_type} stands in{guess}"


def _built_in_rows(part: str, method: str) -> str:
    """The first rows of a part of the built-in demo set, in the shape that `method` reads."""
    lines = (catalog.folder() / "data" / "brief" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines[:ROWS]]
    if method == "sft":
        rows = [dict(formats.chosen_dialogue(formats.read(formats.PREFERENCE[0], row))) for row in rows]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _data(recipe: Recipe, rows: dict[str, Path]) -> dict[str, Any]:
    """Local files stay, cut to a few rows; a hub data set gives way to built-in rows."""

    def few(given: list[Source], part: str) -> list[dict[str, Any]]:
        local = [s.model_dump() | {"take": min(ROWS, s.take or ROWS)} for s in given if sources.is_local(s.path)]
        return local or [{"path": str(rows[part]), "take": ROWS}]

    changes: dict[str, Any] = {"train": few(recipe.data.train, "train"), "max_length": 2048, "max_dropped": 0.99}
    if recipe.data.eval:
        changes["eval"] = few(recipe.data.eval, "test")
    if recipe.data.eval_fraction:
        changes["eval_fraction"] = max(0.25, recipe.data.eval_fraction)
    return changes


def _tokenizer(found: Family, rows: Path, folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t in dict.fromkeys((found.bos, found.eos, found.pad, "<|im_start|>", "<|im_end|>")) if t]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train([str(rows)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=found.bos, eos_token=found.eos, pad_token=found.pad
    )
    fast.chat_template = catalog.template("chatml")
    fast.save_pretrained(folder)


def _model(found: Family, folder: Path) -> None:
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(folder))
    config = AutoConfig.for_model(
        found.model_type,
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **found.extra,
    )
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _adapter(recipe: Recipe, folder: Path, model: Path) -> str | None:
    """A random, non-zero adapter where the recipe goes on from one."""
    if recipe.model.adapter is None:
        return None
    shape = recipe.lora.model_dump() if recipe.lora else {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **shape)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder / "adapter")
    return str(folder / "adapter")
