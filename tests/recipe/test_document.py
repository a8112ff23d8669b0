"""The JSON Schema for editors agrees with the parser, and the page for people leaves no key out."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from alignctl.recipe import catalog, tree
from alignctl.recipe.document import json_schema, markdown
from alignctl.recipe.load import load
from alignctl.recipe.schema import METHODS, SECTIONS, Recipe, Source

TABLES = {**SECTIONS, "data.train[] and data.eval[]": Source}
KEYS = [(title, key) for title, section in TABLES.items() for key in section.model_fields]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(json_schema())


def raw(**sections: Any) -> dict[str, Any]:
    """A small recipe as an editor sees it; `None` leaves a section out."""
    recipe: dict[str, Any] = {
        "model": {"name_or_path": "org/model"},
        "data": {"train": [{"path": "org/rows"}]},
        "training": {"learning_rate": 1e-5},
        "dpo": {},
    }
    return {key: value for key, value in (recipe | sections).items() if value is not None}


def test_it_is_a_json_schema() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    assert schema["properties"].keys() == {*Recipe.model_fields, "extends"}


@pytest.mark.parametrize("name", catalog.names())
def test_it_accepts_a_built_in_recipe(name: str, validator: Draft202012Validator) -> None:
    values = tree.read(catalog.entry(name).path).values
    assert [error.message for error in validator.iter_errors(values)] == []


@pytest.mark.parametrize("name", catalog.names())
def test_it_accepts_a_resolved_recipe(name: str, validator: Draft202012Validator) -> None:
    resolved = load(catalog.entry(name).path).resolved()
    assert [error.message for error in validator.iter_errors(resolved)] == []


@pytest.mark.parametrize(
    ("sections", "path", "message"),
    [
        ({"modle": {}}, [], "'modle' was unexpected"),
        ({"model": {"name_or_path": "m", "dtyp": "auto"}}, ["model"], "'dtyp' was unexpected"),
        ({"data": {"train": [{"path": "a", "spilt": "b"}]}}, ["data", "train", 0], "'spilt' was unexpected"),
        ({"training": {"learning_rate": 1, "save_step": 5}}, ["training"], "'save_step' was unexpected"),
        ({"dpo": {"bta": 1}}, ["dpo"], "'bta' was unexpected"),
        ({"training": {"learning_rate": "fast"}}, ["training", "learning_rate"], "is not of type 'number'"),
        ({"training": {"learning_rate": 0}}, ["training", "learning_rate"], "less than or equal to the minimum of 0"),
        ({"data": {"train": []}}, ["data", "train"], "[] should be non-empty"),
        ({"data": {"train": [{"split": "b"}]}}, ["data", "train", 0], "'path' is a required property"),
    ],
)
def test_it_refuses_what_the_parser_refuses(
    sections: dict[str, Any], path: list[object], message: str, validator: Draft202012Validator
) -> None:
    leaves = [deepest(error) for error in validator.iter_errors(raw(**sections))]
    assert [list(leaf.absolute_path) for leaf in leaves] == [path]
    assert message in leaves[0].message


def deepest(error: Any) -> Any:
    """The error inside `anyOf` that is about the value, where the other branch is `null`."""
    return next((deepest(e) for e in error.context if e.validator_value != "null"), error)


@pytest.mark.parametrize(("first", "second"), combinations(METHODS, 2))
def test_it_refuses_two_methods(first: str, second: str, validator: Draft202012Validator) -> None:
    assert validator.is_valid(raw(**{"dpo": None, first: {}}))
    assert validator.is_valid(raw(**{"dpo": None, second: {}}))
    assert not validator.is_valid(raw(**{"dpo": None, first: {}, second: {}}))


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_a_section_may_be_missing_only_from_a_file_that_extends(section: str, validator: Draft202012Validator) -> None:
    assert not validator.is_valid(raw(**{section: None}))
    assert validator.is_valid(raw(**{section: None, "extends": "base.yaml"}))


def test_a_file_that_extends_may_change_the_method(
    validator: Draft202012Validator, write: Callable[..., Any], minimal: Callable[..., str]
) -> None:
    write(minimal(), "base.yaml")
    near = write("extends: base.yaml\ndpo: null\nsft: {}\n")
    assert load(near).recipe.method == "sft"
    assert validator.is_valid(tree.read(near).values)


@pytest.mark.parametrize(
    "text",
    [
        "model: {dtype: float32}",
        "training: {seed: 1}",
        "data: {max_length: 512}",
    ],
)
def test_a_file_that_extends_may_change_one_key(
    text: str, validator: Draft202012Validator, write: Callable[..., Any], minimal: Callable[..., str]
) -> None:
    write(minimal(), "base.yaml")
    near = write(f"extends: base.yaml\n{text}\n")
    assert load(near).name == "r"
    assert [error.message for error in validator.iter_errors(tree.read(near).values)] == []


# --- the page


def table(title: str) -> list[str]:
    """The rows of the table under a heading."""
    (body,) = re.findall(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", markdown())
    return [line for line in body.splitlines() if line.startswith("| `")]


def test_the_page_has_a_heading_for_every_section() -> None:
    assert re.findall(r"(?m)^## (.+)$", markdown()) == [*TABLES, "trl"]


@pytest.mark.parametrize("title", TABLES)
def test_the_page_has_a_row_for_every_key(title: str) -> None:
    assert [line.split("`")[1] for line in table(title)] == list(TABLES[title].model_fields)


@pytest.mark.parametrize(("title", "key"), KEYS)
def test_a_row_has_four_cells_with_default_and_meaning(title: str, key: str) -> None:
    info = TABLES[title].model_fields[key]
    (row,) = [line for line in table(title) if line.startswith(f"| `{key}` |")]
    _, _, _, default, meaning, _ = row.split("|")
    expected = "required" if info.is_required() else "—" if info.default is None else f"`{info.default!r}`"
    assert default.strip() == expected
    assert meaning.strip() == info.description
    assert len(meaning) > 5


def test_every_row_has_a_type() -> None:
    untyped = [line.split("`")[1] for title in TABLES for line in table(title) if not line.split("|")[2].strip()]
    assert untyped == []


@pytest.mark.parametrize(
    ("title", "row"),
    [
        ("lora", "| `r` | int | `16` | Rank. |"),
        ("lora", "| `target_modules` | str or list[str] | `'all-linear'` | Layers that get an adapter. |"),
        ("training", "| `learning_rate` | float | required | Peak learning rate. |"),
        ("quantization", "| `bnb_4bit_quant_type` | Literal[`nf4`, `fp4`] | `'nf4'` | 4-bit number format. |"),
    ],
)
def test_a_row(title: str, row: str) -> None:
    assert row in table(title)


def test_the_page_tells_of_what_no_table_has() -> None:
    page = markdown()
    assert page.startswith("# The recipe\n")
    for words in ("extends: other.yaml", "${oc.env:NAME,default}", "`key: null`", "No keys."):
        assert words in page
    assert str(Recipe.model_fields["trl"].description) in page
