"""Write the argument names of the pinned TRL's configs to src/alignctl/recipe/trl_arguments.json.

python scripts/trl_arguments.py
"""

import dataclasses
import json
from pathlib import Path

from trl import DPOConfig, SFTConfig
from trl.experimental.orpo import ORPOConfig

TARGET = Path(__file__).parents[1] / "src" / "alignctl" / "recipe" / "trl_arguments.json"


def names() -> dict[str, list[str]]:
    configs = {"sft": SFTConfig, "dpo": DPOConfig, "orpo": ORPOConfig}
    return {method: sorted(f.name for f in dataclasses.fields(config)) for method, config in configs.items()}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(names(), indent=1) + "\n", encoding="utf-8")
