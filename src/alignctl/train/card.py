"""The model card that is saved beside the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alignctl.recipe.schema import Recipe
from alignctl.terminal import harmless

_TITLES = {"sft": "supervised fine-tuning", "dpo": "Direct Preference Optimization", "orpo": "ORPO"}


# A name on the hub, which refuses a card that gives anything else as the base.
_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def text(recipe: Recipe, record: dict[str, Any], summary: dict[str, Any], merged: str = "") -> str:
    """README.md of the saved model: what it was made from, how, and what was measured.

    `merged` says how its adapter came into its weights, where it did.
    """
    model = recipe.model
    library = "peft" if recipe.trains_adapter and not merged else "transformers"
    sources = "\n".join(f"- {_code(source.path)} ({_code(source.split)})" for source in recipe.data.train)
    return f"""---
library_name: {library}
{_base(model.name_or_path)}tags: [alignctl, trl, {recipe.method}]
---
# {_code(model.name_or_path)}, after {_TITLES[recipe.method]}

Trained with alignctl {record["versions"]["alignctl"]} and TRL {record["versions"]["trl"]}.

- base model: {_code(model.name_or_path)}, revision {_code(model.revision or record["model"]["commit"] or "not pinned")}
{f"- {merged}{chr(10)}" if merged else ""}- went on from adapter: {_code(model.adapter) if model.adapter else "none"}
- reference: {_code(record["reference"]) if record["reference"] else "none; the method needs none"}
- chat template: {_code(model.chat_template)}, SHA-256 `{record["template"]["sha256"][:16]}`
- trained parameters: {record["model"]["trainable"]:,} of {record["model"]["parameters"]:,}
- learning rate {recipe.training.learning_rate:g}, batch {recipe.training.per_device_train_batch_size} ×
  {recipe.training.gradient_accumulation_steps}, seed {recipe.training.seed}
{_trusted(recipe)}
Training rows:

{sources}

## Held-out rows

{_measured(summary)}
"""


def on_hub(name: str) -> bool:
    """Whether `name` of a model means one on the hub."""
    return _HUB.fullmatch(name) is not None and not Path(name).exists()


def _base(name: str) -> str:
    """The line that ties the model to its base, where that is on the hub."""
    return f"base_model: {_quoted(name)}\n" if on_hub(name) else ""


def _trusted(recipe: Recipe) -> str:
    """What was trusted besides numbers, a line each."""
    out = ""
    if recipe.model.trust_remote_code:
        out += "- Python code from the base model's repository ran (`model.trust_remote_code`)\n"
    if not recipe.model.use_safetensors:
        out += "- weights were also taken from pickle files (`model.use_safetensors: false`)\n"
    return out


def _code(given: str) -> str:
    """A name from elsewhere in backticks that it cannot end, on one line."""
    line = " ".join(harmless(given).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _quoted(given: str) -> str:
    """A name from elsewhere as a YAML text on one line; JSON's strings are YAML's too."""
    return json.dumps(harmless(given), ensure_ascii=False)


def _measured(summary: dict[str, Any]) -> str:
    if "before" not in summary:
        return "None were held out."
    keys = [key for key, value in summary["after"].items() if isinstance(value, float)]
    rows = "\n".join(f"| {key} | {summary['before'][key]:.4f} | {summary['after'][key]:.4f} |" for key in keys)
    return (
        f"Verdict: {summary['verdict']} (n = {summary['after']['n']}).\n\n| | before | after |\n|---|---|---|\n{rows}"
    )
