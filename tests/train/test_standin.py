"""The stand-ins of smoke runs: the architecture that a name means, and what is made small."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from alignctl.recipe import catalog, load
from alignctl.train import standin


@pytest.mark.parametrize(
    ("name", "model_type", "known"),
    [
        ("microsoft/phi-2", "phi", True),
        ("microsoft/Phi-3-mini-4k-instruct", "phi3", True),
        ("mistralai/Mistral-7B-v0.1", "mistral", True),
        ("HuggingFaceTB/SmolLM2-135M", "llama", True),
        ("HuggingFaceTB/SmolLM3-3B", "smollm3", True),
        ("Qwen/Qwen2.5-0.5B", "qwen2", True),
        ("Qwen/Qwen3-4B", "qwen3", True),
        ("google/gemma-2-2b", "gemma2", True),
        ("google/gemma-3-1b-it", "gemma3_text", True),
        ("EleutherAI/pythia-70m", "gpt_neox", True),
        ("somebody/unheard-of", "llama", False),
    ],
)
def test_family_of_a_name(name: str, model_type: str, known: bool) -> None:
    family, found = standin.family(name)
    assert (family.model_type, found) == (model_type, known)


def test_family_of_a_folder_is_its_configs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmo2"}')
    assert standin.family(str(tmp_path))[0].model_type == "olmo2"


@pytest.mark.parametrize("name", ["phi2-ultrafeedback", "mistral7b-zephyr-dpo", "smollm2-ultrafeedback-orpo"])
def test_what_a_recipe_asks_for_stays(tmp_path: Path, name: str) -> None:
    recipe = load.load(catalog.find(name)).recipe
    small, line = standin.stand_in(recipe, tmp_path)
    model_type = AutoConfig.from_pretrained(tmp_path / "model").model_type
    assert f"a tiny random {model_type} stands in" in line
    assert (small.quantization, small.lora, small.dpo, small.orpo) == (
        recipe.quantization,
        recipe.lora,
        recipe.dpo,
        recipe.orpo,
    )
    assert (small.model.adapter is None) == (recipe.model.adapter is None)
    assert small.model.chat_template == recipe.model.chat_template
    assert small.training.max_steps == 2 and small.training.optim == recipe.training.optim
    assert small.training.gradient_checkpointing is True


def test_an_unknown_name_is_said_to_be_guessed(tmp_path: Path) -> None:
    recipe = load.load(catalog.find("demo-dpo"), ["model.name_or_path=me/mine"]).recipe
    assert "guessed" in standin.stand_in(recipe, tmp_path)[1]
