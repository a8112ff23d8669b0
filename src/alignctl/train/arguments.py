"""The recipe's `training`, `logging` and `trl` sections as keyword arguments of a TRL config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from alignctl.errors import Problem, RecipeError
from alignctl.recipe.schema import Recipe
from alignctl.train.machine import Machine

WRITING = ".writing"
_SAME_NAME = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "logging_steps",
    "save_steps",
    "seed",
)


def common(recipe: Recipe, machine: Machine, precision: torch.dtype, run: Path) -> dict[str, Any]:
    """Arguments that every method's TRL config takes.

    Checkpoints are written under `checkpoints/.writing` and moved into place when they are complete.
    """
    training = recipe.training
    arguments = {name: getattr(training, name) for name in _SAME_NAME}
    arguments |= {
        "output_dir": str(run / "checkpoints" / WRITING),
        "max_steps": training.max_steps or -1,
        "per_device_eval_batch_size": training.per_device_eval_batch_size or training.per_device_train_batch_size,
        "warmup_steps": training.warmup_steps if training.warmup_steps is not None else training.warmup_ratio or 0,
        "optim": optimizer(recipe, machine),
        "gradient_checkpointing": checkpointing(recipe, machine),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "eval_strategy": "steps" if training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps",
        "max_length": recipe.data.max_length,
        "use_cpu": machine.kind == "cpu",
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "report_to": "none",  # train/trackers.py does that
        "run_name": run.name,
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": machine.kind == "cuda",
    }
    return arguments | recipe.trl


def make(config: type, recipe: Recipe, **arguments: Any) -> Any:
    """Build a TRL config; what it refuses is a mistake in the recipe."""
    check_extra(recipe, config)
    try:
        return config(**arguments)
    except (ValueError, TypeError) as error:
        raise RecipeError(Problem("training", str(error).splitlines()[0], "change the recipe's value")) from error


def check_extra(recipe: Recipe, config: type) -> None:
    """Check the values under `trl` against the types of the TRL config, which it does not do itself.

    Raises:
        RecipeError: with one problem for each value of another type.
    """
    hints = get_type_hints(config)
    problems = []
    for name, value in recipe.trl.items():
        try:
            TypeAdapter(hints[name], config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            what = f"{error.errors()[0]['msg']}, got {value!r}"
            problems.append(Problem(f"trl.{name}", what[0].lower() + what[1:], "see TRL's documentation"))
    if problems:
        raise RecipeError(*problems)


def optimizer(recipe: Recipe, machine: Machine) -> str:
    """The optimizer's name; those that need CUDA become AdamW on a CPU."""
    name = recipe.training.optim
    needs_cuda = any(part in name for part in ("8bit", "paged", "bnb", "4bit"))
    return "adamw_torch" if machine.kind == "cpu" and needs_cuda else name


def checkpointing(recipe: Recipe, machine: Machine) -> bool:
    """Whether activations are recomputed."""
    wanted = recipe.training.gradient_checkpointing
    return machine.kind == "cuda" if wanted == "auto" else wanted
