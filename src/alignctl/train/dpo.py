"""Direct Preference Optimization."""

from __future__ import annotations

from transformers import Trainer
from trl import DPOConfig

from alignctl.recipe.schema import Recipe
from alignctl.train import arguments
from alignctl.train import model as models
from alignctl.train.parts import Parts, settle
from alignctl.train.trl_seam import IdsDPOTrainer, pair_collator


def build(recipe: Recipe, parts: Parts) -> Trainer:
    """The trainer of a `dpo` recipe; its rows hold `prompt_ids`, `chosen_ids` and `rejected_ids`.

    The reference is what training starts from: the base under a fresh adapter, a frozen copy of `model.adapter`, or a
    second copy of the model when all weights are trained. That one is frozen, for autocast keeps 16-bit copies of
    weights that could be trained until the pass ends.
    """
    assert recipe.dpo is not None
    common = arguments.common(recipe, parts.machine, parts.precision, parts.run)
    method = recipe.dpo.model_dump(exclude_none=True, exclude={"precompute_ref_log_probs"})
    trainer = IdsDPOTrainer(
        model=parts.start(recipe),
        ref_model=None if recipe.trains_adapter else parts.base(recipe).requires_grad_(False),
        args=arguments.make(DPOConfig, recipe, **{**method, **common}),
        data_collator=pair_collator(parts.encoder.tokenizer.pad_token_id),
        train_dataset=parts.train,
        eval_dataset=parts.eval,
        processing_class=parts.encoder.tokenizer,
        peft_config=models.lora_config(recipe),
    )
    return settle(trainer, recipe, parts)


def reference(recipe: Recipe) -> str:
    """What the policy is compared with, in words."""
    if recipe.model.adapter is not None:
        return f"the adapter {recipe.model.adapter} that training starts from, on {recipe.model.name_or_path}"
    how = "with the new adapter switched off" if recipe.lora else "a frozen copy"
    return f"{recipe.model.name_or_path}, {how}"
