"""Names of other tools: every answer names a key that there is."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from alignctl.recipe import tree
from alignctl.recipe.foreign import FOREIGN
from alignctl.recipe.load import Loaded
from alignctl.recipe.schema import SECTIONS, Recipe, Source

Refused = Callable[..., list[str]]

VALUES = {given.groups() for text in FOREIGN.values() if (given := re.fullmatch(r"([a-z]+\.\w+): ([\w-]+)", text))}


def test_there_are_names_enough() -> None:
    assert len(FOREIGN) >= 25
    assert ("lora.target_modules", "all-linear") in VALUES


@pytest.mark.parametrize("key", FOREIGN)
def test_no_foreign_name_is_a_key_of_ours(key: str) -> None:
    assert key not in {*Recipe.model_fields, "extends"}


@pytest.mark.parametrize(("key", "answer"), FOREIGN.items())
def test_every_key_that_an_answer_names_exists(key: str, answer: str) -> None:
    for section, name in re.findall(r"\b([a-z]+)\.([a-z]\w*)", answer):
        assert section in SECTIONS, f"{key}: {answer}"
        assert name in SECTIONS[section].model_fields, f"{key}: {answer}"
    for section in re.findall(r"`(\w+):`", answer):
        assert section in SECTIONS or section in Source.model_fields, f"{key}: {answer}"
    for name in re.findall(r"[{ ](\w+): …", answer):
        assert name in Source.model_fields, f"{key}: {answer}"


@pytest.mark.parametrize(("key", "answer"), FOREIGN.items())
def test_an_answer_names_a_key_a_section_an_option_or_says_why_there_is_none(key: str, answer: str) -> None:
    named = re.search(r"\b[a-z]+\.[a-z]\w*|`\w+:`|the option --[a-z]+|^nothing; ", answer)
    assert named is not None, f"{key}: {answer}"


@pytest.mark.parametrize(("key", "value"), sorted(VALUES))
def test_a_value_that_an_answer_gives_is_one_that_the_key_takes(
    key: str, value: str, accepted: Callable[..., Loaded]
) -> None:
    section, _, name = key.partition(".")
    resolved = accepted(f"{key}={value}", lora="{}").resolved()
    assert resolved[section][name] == tree.scalar(value)


@pytest.mark.parametrize("key", FOREIGN)
def test_a_foreign_key_is_answered(key: str, refused: Refused) -> None:
    """Before any guess: there is a `model.adapter`, and `lora_r`, `rl` and `quantization_bit` are near to sections."""
    assert refused(**{key: "1"}) == [f"r.yaml:5: {key}: unknown key — here it is {FOREIGN[key]}"]


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("training.output_dir", "here it is the option --output DIR"),
        ("training.bf16", "here it is model.dtype: bfloat16"),
        ("training.num_epochs", "here it is training.num_train_epochs"),
        ("data.cutoff_len", "here it is data.max_length"),
        ("lora.lora_r", "here it is lora.r"),
    ],
)
def test_a_foreign_key_inside_a_section_is_answered_too(key: str, answer: str, refused: Refused) -> None:
    assert refused(f"{key}=1") == [f"argument '{key}=1': {key}: unknown key — {answer}"]
