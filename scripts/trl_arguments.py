"""Write what the pinned TRL and transformers know by name to src/alignctl/recipe/trl_arguments.json.

python scripts/trl_arguments.py
"""

import dataclasses
import json
from pathlib import Path

from transformers import SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig, SFTConfig
from trl.experimental.orpo import ORPOConfig

TARGET = Path(__file__).parents[1] / "src" / "alignctl" / "recipe" / "trl_arguments.json"


def names() -> dict[str, list[str]]:
    """Argument names of each method's config, and the choices of two of them."""
    configs = {"sft": SFTConfig, "dpo": DPOConfig, "orpo": ORPOConfig}
    arguments = {method: sorted(f.name for f in dataclasses.fields(config)) for method, config in configs.items()}
    choices = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}
    return arguments | {name: sorted(choice.value for choice in kind) for name, kind in choices.items()}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(names(), indent=1) + "\n", encoding="utf-8")
