"""Odds Ratio Preference Optimization."""

from __future__ import annotations

from peft import get_peft_model
from transformers import Trainer, set_seed
from trl.experimental.orpo import ORPOConfig

from alignctl.recipe.schema import Recipe
from alignctl.train import arguments
from alignctl.train import model as models
from alignctl.train.parts import Parts, settle
from alignctl.train.trl_seam import IdsORPOTrainer, pair_collator


def build(recipe: Recipe, parts: Parts) -> Trainer:
    """The trainer of an `orpo` recipe; its rows hold `prompt_ids`, `chosen_ids` and `rejected_ids`."""
    assert recipe.orpo is not None
    common = arguments.common(recipe, parts.machine, parts.precision, parts.run)
    model = parts.start(recipe)
    lora = models.lora_config(recipe)
    if lora is not None:
        set_seed(recipe.training.seed)  # the Trainer does so too late for the adapter's random half
        # Given to TRL's ORPO, the config would make it upcast a 4-bit model's embeddings, norms and head to float32.
        model = get_peft_model(model, lora)
    trainer = IdsORPOTrainer(
        model=model,
        args=arguments.make(ORPOConfig, recipe, **{"beta": recipe.orpo.beta, **common, "remove_unused_columns": False}),
        nll_on_prompt=recipe.orpo.nll_on_prompt,
        data_collator=pair_collator(parts.encoder.tokenizer.pad_token_id),
        train_dataset=parts.train,
        eval_dataset=parts.eval,
        processing_class=parts.encoder.tokenizer,
    )
    return settle(trainer, recipe, parts)
