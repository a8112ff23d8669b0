"""The built-in recipes: each loads, says what it is for, and can be copied."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from alignctl.errors import RecipeError
from alignctl.recipe import catalog, tree
from alignctl.recipe.load import load

NAMES = catalog.names()
FILES = sorted(catalog.folder().rglob("*.yaml"))
BASES = [path for path in FILES if path.parent.name == "_base"]


def problem_of(caught: pytest.ExceptionInfo[RecipeError]) -> str:
    (problem,) = caught.value.problems
    return str(problem)


def test_every_file_is_a_recipe_or_a_base() -> None:
    assert {"demo-sft", "demo-dpo", "demo-orpo"} <= set(NAMES)
    assert sorted([*BASES, *(catalog.folder() / f"{name}.yaml" for name in NAMES)]) == FILES


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_recipe_loads(name: str) -> None:
    loaded = load(catalog.find(name))
    assert loaded.name == name
    assert loaded.secrets == {}


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
def test_a_base_lacks_nothing_but_a_method_rows_and_a_rate(base: Path) -> None:
    assert tree.read(base).problems == []
    recipe = load(base, ["data.train=[{path: org/rows}]", "training.learning_rate=1e-5", "dpo={}"]).recipe
    assert recipe.method == "dpo"
    assert base.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
def test_a_base_is_used(base: Path) -> None:
    extended = [tree.read(catalog.entry(name).path).values.get("extends") for name in NAMES]
    assert f"_base/{base.name}" in extended


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_the_recipe_is_for_and_what_it_needs(name: str) -> None:
    entry = catalog.entry(name)
    assert re.fullmatch(r"[A-Z].{20,}\.", entry.summary), entry.summary
    assert not entry.summary.startswith(("Run:", "Needs:"))
    assert re.match(r"\d+ CPU cores|a CUDA GPU", entry.needs), entry.needs
    assert [line.partition(":")[0] for line in entry.header[1:3]] == ["Run", "Needs"]


@pytest.mark.parametrize("name", NAMES)
def test_the_run_line_is_the_command_for_this_recipe(name: str) -> None:
    entry = catalog.entry(name)
    (line,) = [line for line in entry.header if line.startswith("Run: ")]
    command = line.removeprefix("Run: ").partition("    (")[0].rpartition(" && ")[2]
    assert command == f"alignctl {load(entry.path).recipe.method} {name}"


def test_the_local_rows_of_a_built_in_recipe_are_there() -> None:
    data = load(catalog.find("demo-dpo")).recipe.data
    assert [source.path for source in (*data.train, *(data.eval or []))] == [
        str((catalog.folder() / "data/brief" / file).resolve()) for file in ("train.jsonl", "test.jsonl")
    ]


def test_an_entry_without_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare.yaml").write_text("model: {}\n# too late\n", encoding="utf-8")
    monkeypatch.setattr(catalog, "folder", lambda: tmp_path)
    entry = catalog.entry("bare")
    assert (entry.header, entry.summary, entry.needs) == ([], "", "")


@pytest.mark.parametrize("name", ["nothing-like-it", "_base/phi2", ""])
def test_no_such_entry(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        catalog.entry(name)
    assert problem_of(caught).startswith(f"{name}: no built-in recipe has this name — ")


# --- find and suggestion


@pytest.mark.parametrize("argument", ["demo-dpo", "phi2-ultrafeedback"])
def test_a_bare_name_is_found_among_the_built_in_ones(argument: str) -> None:
    assert catalog.find(argument) == catalog.folder() / f"{argument}.yaml"


def test_a_file_comes_before_a_built_in_name(write: Callable[..., Path]) -> None:
    write("dpo: {}\n", "demo-dpo")
    assert catalog.find("demo-dpo") == Path("demo-dpo")


def test_a_folder_does_not_hide_a_built_in_name(here: Path) -> None:
    (here / "demo-dpo").mkdir()
    assert catalog.find("demo-dpo") == catalog.folder() / "demo-dpo.yaml"


@pytest.mark.parametrize("argument", ["gone.yaml", "demo-dpo.yaml", "sub/demo-dpo", "/gone.yaml"])
def test_what_looks_like_a_path_is_one(argument: str) -> None:
    assert catalog.find(argument) == Path(argument)


def test_a_misspelt_name_is_suggested() -> None:
    with pytest.raises(RecipeError) as caught:
        catalog.find("demo-dop")
    assert problem_of(caught) == "demo-dop: no built-in recipe has this name — did you mean demo-dpo?"


@pytest.mark.parametrize(
    ("recipe", "way_out"),
    [
        ("demo_orpo", "did you mean demo-orpo?"),
        ("somewhere/phi2-ultrafedback.yaml", "did you mean phi2-ultrafeedback?"),
        ("zzzzzz", "`alignctl recipes` lists the built-in ones"),
        ("", "`alignctl recipes` lists the built-in ones"),
    ],
)
def test_suggestion(recipe: str, way_out: str) -> None:
    assert catalog.suggestion(recipe) == way_out


# --- copy


def test_copy_to_a_file(here: Path) -> None:
    target = here / "new" / "mine.yaml"
    assert catalog.copy("demo-dpo", target) == target
    assert target.read_bytes() == catalog.entry("demo-dpo").path.read_bytes()


def test_copy_into_a_folder(here: Path) -> None:
    assert catalog.copy("demo-dpo.yaml", here) == here / "demo-dpo.yaml"
    assert [path.name for path in here.iterdir()] == ["demo-dpo.yaml"]


@pytest.mark.parametrize("destination", ["", "demo-dpo.yaml"])
def test_copy_does_not_overwrite(destination: str, here: Path, write: Callable[..., Path]) -> None:
    mine = write("mine\n", "demo-dpo.yaml")
    with pytest.raises(RecipeError) as caught:
        catalog.copy("demo-dpo", here / destination)
    assert problem_of(caught) == f"{mine}: exists already — give another name"
    assert mine.read_text(encoding="utf-8") == "mine\n"


def test_copy_to_where_nothing_can_be_written(here: Path, write: Callable[..., Path]) -> None:
    write("a file\n", "file")
    with pytest.raises(RecipeError) as caught:
        catalog.copy("demo-dpo", here / "file" / "sub" / "mine.yaml")
    assert problem_of(caught) == f"{here}/file/sub/mine.yaml: cannot be written: Not a directory — give another place"


def test_copy_of_what_is_not_there(here: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        catalog.copy("demo-dop", here)
    assert problem_of(caught).endswith("did you mean demo-dpo?")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_elsewhere_means_the_same(name: str, here: Path) -> None:
    copied = catalog.copy(name, here / "sub" / "mine.yaml")
    loaded = load(copied)
    assert loaded.name == "mine"
    assert loaded.recipe == load(catalog.entry(name).path).recipe


# --- chat templates


@pytest.mark.parametrize("name", catalog.templates())
def test_a_template_is_jinja_over_the_messages(name: str) -> None:
    assert "messages" in catalog.template(name)


def test_the_templates() -> None:
    assert {"chatml", "instruct", "zephyr"} <= set(catalog.templates())
