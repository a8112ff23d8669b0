"""Sizes from `config.json`: known models by hand, every architecture of the smoke runs by its real modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignctl.errors import RecipeError
from alignctl.plan import shape
from alignctl.plan.shape import Shape
from alignctl.train import standin

FAMILIES = {family.model_type: family for family in standin._FAMILIES.values()}
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 3}


def real(model_type: str, **changes: Any) -> PreTrainedModel:
    sizes = {**SIZES, "num_attention_heads": 4, "pad_token_id": None, **FAMILIES[model_type].extra, **changes}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("microsoft/phi-2", 2_779_683_840),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("h2oai/h2o-danube-1.8b-sft", 1_831_201_280),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_parameters_of_known_models(packaged: Callable[[str], Shape], name: str, parameters: int) -> None:
    assert packaged(name).parameters() == parameters


def test_phi_2_by_hand(packaged: Callable[[str], Shape]) -> None:
    phi = packaged("microsoft/phi-2")
    square, wide = 2560 * 2560, 2560 * 10240
    assert [each.name for each in phi.linears()] == ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
    assert sum(each.weights for each in phi.linears()) == 4 * square + 2 * wide == 78_643_200
    assert phi.block() == 4 * (square + 2560) + wide + 10240 + wide + 2560 + 2 * 2560
    assert (phi.head(), phi.rotary, phi.gelu) == (51200 * 2560 + 51200, 32, True)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_architecture_as_its_modules_are(model_type: str) -> None:
    model = real(model_type)
    found = shape.of(model.config.to_dict())
    layers = [
        (name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    ]
    assert found.known and found.parameters() == model.num_parameters()
    assert len(layers) == found.layers * len(found.linears())
    planned = sorted((each.name, each.rows, each.columns, each.bias) for each in found.linears()) * found.layers
    assert sorted(planned) == sorted((n, *m.weight.shape, m.bias is not None) for n, m in layers)


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_switches_of_a_config(changes: dict[str, bool]) -> None:
    model = real("llama", **changes)
    assert shape.of(model.config.to_dict()).parameters() == model.num_parameters()


def test_an_unknown_architecture_is_said_to_be_one(recipe: Callable[..., Any]) -> None:
    from alignctl.plan import setup

    found = shape.of({**SIZES, "model_type": "brand_new", "num_attention_heads": 4})
    assert (
        not found.known
        and found.parameters() == shape.of({**SIZES, "model_type": "llama", "num_attention_heads": 4}).parameters()
    )
    (note,) = setup.notes(recipe(), found)
    assert note.startswith("brand_new is not an architecture that is known here: planned as a llama")


@pytest.mark.parametrize("broken", [{"hidden_size": None}, {"num_hidden_layers": "many"}, {"num_attention_heads": 0}])
def test_sizes_that_are_none(broken: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"config\.json: cannot be read as a language model's"):
        shape.of({**SIZES, "model_type": "llama", "num_attention_heads": 4, **broken})


def test_the_language_part_of_a_model_that_sees() -> None:
    inner = {**SIZES, "model_type": "llama", "num_attention_heads": 4}
    assert shape.of({"model_type": "llava", "text_config": inner}) == shape.of(inner)
