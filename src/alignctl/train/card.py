"""The model card that is saved beside the weights."""

from __future__ import annotations

from typing import Any

from alignctl.recipe.schema import Recipe

_TITLES = {"sft": "supervised fine-tuning", "dpo": "Direct Preference Optimization", "orpo": "ORPO"}


def text(recipe: Recipe, record: dict[str, Any], summary: dict[str, Any]) -> str:
    """README.md of the saved model: what it was made from, how, and what was measured."""
    base = recipe.model.name_or_path
    library = "peft" if recipe.trains_adapter else "transformers"
    sources = "\n".join(f"- `{source.path}` ({source.split})" for source in recipe.data.train)
    return f"""---
library_name: {library}
base_model: {base}
tags: [alignctl, trl, {recipe.method}]
---
# {base}, after {_TITLES[recipe.method]}

Trained with alignctl {record["versions"]["alignctl"]} and TRL {record["versions"]["trl"]}.

- base model: `{base}`, revision `{recipe.model.revision or record["model"]["commit"] or "not pinned"}`
- went on from adapter: {recipe.model.adapter or "none"}
- reference: {record["reference"] or "none; the method needs none"}
- chat template: `{recipe.model.chat_template}`, SHA-256 `{record["template"]["sha256"][:16]}`
- trained parameters: {record["model"]["trainable"]:,} of {record["model"]["parameters"]:,}
- learning rate {recipe.training.learning_rate:g}, batch {recipe.training.per_device_train_batch_size} ×
  {recipe.training.gradient_accumulation_steps}, seed {recipe.training.seed}

Training rows:

{sources}

## Held-out rows

{_measured(summary)}
"""


def _measured(summary: dict[str, Any]) -> str:
    if "before" not in summary:
        return "None were held out."
    keys = [key for key, value in summary["after"].items() if isinstance(value, float)]
    rows = "\n".join(f"| {key} | {summary['before'][key]:.4f} | {summary['after'][key]:.4f} |" for key in keys)
    return (
        f"Verdict: {summary['verdict']} (n = {summary['after']['n']}).\n\n| | before | after |\n|---|---|---|\n{rows}"
    )
