"""Recipes of other tools: which tool a file is of, what it trains, and what its tool does where it says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignctl.errors import Problem, RecipeError
from alignctl.recipe.schema import METHODS

# Keys that a tool's recipes have, and those of the others do not.
OWN = {
    "handbook": {"dataset_mixer", "dataset_mixture", "dataset_splits", "dataset_configs"},
    "trl": {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dtype"},
    "axolotl": {
        "base_model", "micro_batch_size", "sequence_len", "num_epochs", "rl", "orpo_alpha", "rl_beta", "val_set_size",
        "lora_target_linear", "dataset_prepared_path", "sample_packing", "evals_per_epoch",
    },
    "llamafactory": {
        "stage", "finetuning_type", "cutoff_len", "template", "pref_beta", "pref_loss", "lora_target", "lora_rank",
        "dataset", "quantization_bit", "val_size", "max_samples",
    },
}  # fmt: skip
# What trains here by the name that a tool has for it; its loss, where the name says that too.
STAGES = {"sft": "sft", "dpo": "dpo", "ipo": "dpo", "orpo": "orpo"}
_LOSSES = {"ipo": "ipo", "hinge": "hinge", "sigmoid": "sigmoid"}

Values = dict[str, Any]


def detect(values: Values, file: Path) -> str:
    """The tool whose own keys `values` has.

    Raises:
        RecipeError: it has none, or those of several.
    """
    count = {tool: len(keys & values.keys()) for tool, keys in OWN.items()}
    best = max(count.values())
    tools = [tool for tool, found in count.items() if found == best]
    if best and len(tools) == 1:
        return tools[0]
    if not best and isinstance(values.get("datasets"), list) and "model_name_or_path" in values:
        return "trl"
    what = f"has the keys of {' and of '.join(tools)}" if best else "has no key that tells whose recipe it is"
    raise RecipeError(Problem(str(file), what, f"--dialect with one of {', '.join(OWN)}"))


def method(dialect: str, values: Values, file: Path) -> str:
    """What a recipe trains, by its keys, or else by the names of its file and folders.

    Raises:
        RecipeError: a method that there is none of here, or it cannot be told.
    """
    if dialect == "axolotl":
        return _stage(values.get("rl") or "sft", "rl", file)
    if dialect == "llamafactory":
        stage, loss = values.get("stage") or "sft", values.get("pref_loss") or "sigmoid"
        by_loss = stage == "dpo" and loss not in _LOSSES
        return _stage(loss if by_loss else stage, "pref_loss" if by_loss else "stage", file)
    named = [name for part in reversed(file.parts) for name in METHODS if name in part.lower()]
    if named:
        return named[0]
    if values.get("loss_type") or values.get("ref_model_name_or_path"):
        return "dpo"
    if "beta" in values or "max_prompt_length" in values:
        raise RecipeError(Problem(str(file), "is for DPO or for ORPO: nothing in it tells", "--method dpo, or orpo"))
    return "sft"


def _stage(name: Any, key: str, file: Path) -> str:
    if not isinstance(name, str) or name not in STAGES:
        what = f"{key}: {name!r} is no method that alignctl has"
        raise RecipeError(Problem(str(file), what, f"it has {', '.join(METHODS)}"))
    return STAGES[name]


def loss(dialect: str, values: Values) -> str | None:
    """DPO's loss, where the name of the method says it."""
    name = values.get("rl") if dialect == "axolotl" else values.get("pref_loss")
    return _LOSSES.get(str(name))


def trains_adapter(dialect: str, values: Values) -> bool:
    """Whether an adapter is trained, and not all weights."""
    if dialect == "axolotl":
        return values.get("adapter") in ("lora", "qlora")
    if dialect == "llamafactory":
        return values.get("finetuning_type", "lora") == "lora"
    return values.get("use_peft") is True


def four_bits(dialect: str, values: Values) -> bool:
    """Whether the frozen weights are stored in 4 bits."""
    return values.get("quantization_bit") == 4 if dialect == "llamafactory" else values.get("load_in_4bit") is True


def defaults(dialect: str, name: str) -> dict[str, Any]:
    """What a tool does where its recipe says nothing, and alignctl would do otherwise."""
    trainer: dict[str, Any] = {
        "training.num_train_epochs": 3.0,
        "training.per_device_train_batch_size": 8,
        "training.lr_scheduler_type": "linear",
    }
    trl = trainer | {
        "training.learning_rate": 2e-5 if name == "sft" else 1e-6,
        "data.max_length": 1024,
        "lora.r": 16,
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.05,
        "quantization.bnb_4bit_use_double_quant": False,
    }
    return {
        "handbook": trl,
        "trl": trl,
        "axolotl": {
            "training.per_device_train_batch_size": 1,
            "data.max_length": 512,
            "lora.r": 8,
            "lora.lora_alpha": 16,
        },
        "llamafactory": trainer | {"training.learning_rate": 5e-5, "data.max_length": 2048, "lora.r": 8},
    }[dialect]
