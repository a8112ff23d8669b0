"""What a trainer is built from, and the steps that the three methods share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, Trainer
from trl import DPOTrainer

from alignctl.errors import Problem, RecipeError
from alignctl.recipe.schema import Recipe
from alignctl.train import model as models
from alignctl.train import packing, trl_seam
from alignctl.train.machine import Machine
from alignctl.train.tokens import Encoder


@dataclass(frozen=True)
class Parts:
    """Everything that `build` needs besides the recipe."""

    machine: Machine
    precision: torch.dtype
    encoder: Encoder
    train: Dataset
    eval: Dataset | None
    run: Path

    def base(self, recipe: Recipe) -> PreTrainedModel:
        """The base model, ready to generate with the tokens that training uses."""
        model = models.load_base(recipe, self.precision, self.machine)
        models.align_generation(model, self.encoder)
        return model

    def start(self, recipe: Recipe) -> PreTrainedModel:
        """The model that training starts from: the base, with `model.adapter` on it where the recipe names one."""
        base = self.base(recipe)
        folder = models.adapter_folder(recipe)
        return base if folder is None else models.with_adapter(base, folder)


def engine(recipe: Recipe, trainer: Trainer) -> str:
    """`packed`, or why batches are padded.

    Raises:
        RecipeError: the recipe wants packing where it cannot be.
    """
    wanted = recipe.training.packed
    if wanted is False:
        return "training.packed is false"
    reason = packing.why_not(trainer.model, known=wanted == "auto")
    if trainer.args.torch_compile:
        reason = "torch_compile needs batches of one shape"
    if reason and wanted is True:
        raise RecipeError(Problem("training.packed", f"cannot be: {reason}", "training.packed=auto"))
    return reason or "packed"


def models_of(trainer: Trainer) -> list[PreTrainedModel]:
    """The model that is trained, and the reference where it is another one."""
    other = trainer.ref_model if isinstance(trainer, DPOTrainer) else None
    return [trainer.model] if other is None else [trainer.model, other]


def settle(trainer: Trainer, recipe: Recipe, parts: Parts) -> Trainer:
    """Finish what TRL's constructors leave: trained weights in float32, all stop tokens, the compact head.

    TRL casts the adapters of a 4-bit model to bfloat16, where a weight w stops moving once the learning rate is below
    about |w| / 400; and the Trainer leaves only the tokenizer's EOS in the generation config.
    """
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if isinstance(trainer.model, PeftModel):
        models.name_base(trainer.model, recipe)
    models.align_generation(trainer.model, parts.encoder)
    for model in models_of(trainer):
        trl_seam.install_head(model)
        if engine(recipe, trainer) == "packed":
            packing.install(model)
    trainer.remove_callback(PrinterCallback)
    return trainer
