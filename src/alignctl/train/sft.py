"""Supervised fine-tuning."""

from __future__ import annotations

from transformers import Trainer
from trl import SFTConfig

from alignctl.recipe.schema import Recipe
from alignctl.train import arguments
from alignctl.train import model as models
from alignctl.train.parts import Parts, settle
from alignctl.train.trl_seam import IdsSFTTrainer


def build(recipe: Recipe, parts: Parts) -> Trainer:
    """The trainer of an `sft` recipe; its rows hold `input_ids` and `labels`."""
    common = arguments.common(recipe, parts.machine, parts.precision, parts.run)
    trainer = IdsSFTTrainer(
        model=parts.start(recipe),
        args=arguments.make(SFTConfig, recipe, **common, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=parts.train,
        eval_dataset=parts.eval,
        processing_class=parts.encoder.tokenizer,
        peft_config=models.lora_config(recipe),
    )
    return settle(trainer, recipe, parts)
