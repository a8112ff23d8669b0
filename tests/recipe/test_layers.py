"""Where a recipe's values come from: its bases, the environment, the command line; and what the run writes down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alignctl.errors import RecipeError
from alignctl.recipe import catalog
from alignctl.recipe.load import Loaded, load

Refused = Callable[..., list[str]]
Accepted = Callable[..., Loaded]
Write = Callable[..., Path]


# --- extends


def test_extends_a_file_beside_it(write: Write, minimal: Callable[..., str]) -> None:
    write(minimal(lora="{r: 4, lora_alpha: 8}", evaluation="{samples: 2}"), "base.yaml")
    near = write("extends: base.yaml\nlora: {r: 64}\nevaluation: {samples: 0}\ndata: {train: [{path: other}]}\n")
    recipe = load(near).recipe
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.evaluation.samples) == (64, 8, 0)
    assert [source.path for source in recipe.data.train] == ["other"]
    assert (recipe.model.name_or_path, recipe.method) == ("org/model", "dpo")


def test_null_takes_a_section_of_the_base_away(write: Write, minimal: Callable[..., str]) -> None:
    write(minimal(lora="{}", quantization="{}"), "base.yaml")
    recipe = load(write("extends: base.yaml\nlora: null\nquantization: null\ndpo: null\norpo: {}\n")).recipe
    assert recipe.sections == ["model", "data", "training", "orpo", "evaluation", "logging", "gates", "trl"]


@pytest.mark.parametrize(
    ("base", "near", "dotted", "default"),
    [
        ({"training": "{learning_rate: 1, warmup_ratio: 0.1}"}, "training: {warmup_ratio: null}", "warmup_ratio", None),
        (
            {"training": "{learning_rate: 1, lr_scheduler_type: linear}"},
            "training: {lr_scheduler_type: null}",
            "lr_scheduler_type",
            "cosine",
        ),
    ],
)
def test_null_takes_a_key_of_the_base_away(
    base: dict[str, str], near: str, dotted: str, default: object, write: Write, minimal: Callable[..., str]
) -> None:
    write(minimal(**base), "base.yaml")
    assert getattr(load(write(f"extends: base.yaml\n{near}\n")).recipe.training, dotted) == default


@pytest.mark.parametrize("section", ["evaluation", "logging", "gates", "trl"])
def test_null_takes_any_section_of_the_base_away(section: str, accepted: Accepted) -> None:
    assert accepted(**{section: "null"}).recipe == accepted().recipe


def test_extends_over_two_files_in_other_folders(write: Write, minimal: Callable[..., str]) -> None:
    write(minimal(evaluation="{samples: 1, max_new_tokens: 1}"), "shared/far.yaml")
    write("extends: far.yaml\nevaluation: {max_new_tokens: 2}\n", "shared/middle.yaml")
    recipe = load(write("extends: ../shared/middle.yaml\ndpo: {beta: 3}\n", "mine/r.yaml")).recipe
    assert recipe.dpo is not None
    assert (recipe.evaluation.samples, recipe.evaluation.max_new_tokens, recipe.dpo.beta) == (1, 2, 3)


def test_extends_a_built_in_base(write: Write) -> None:
    text = "extends: _base/phi2.yaml\ndata: {train: [{path: a}]}\ntraining: {learning_rate: 1}\nsft: {}\n"
    recipe = load(write(text)).recipe
    assert recipe.model.name_or_path == "microsoft/phi-2"
    assert recipe.lora is not None


def test_a_base_beside_the_file_comes_before_a_built_in_one(write: Write, minimal: Callable[..., str]) -> None:
    write(minimal(), "_base/phi2.yaml")
    assert load(write("extends: _base/phi2.yaml\n")).recipe.model.name_or_path == "org/model"


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ("gone.yaml", "extends: no such file gone.yaml — a path beside this recipe"),
        ("5", "extends: must be a path — extends: _base/phi2.yaml"),
        ("[a.yaml]", "extends: must be a path — extends: _base/phi2.yaml"),
        ("r.yaml", "extends: r.yaml extends this file again — take one of the two away"),
        ("./sub/../r.yaml", "extends: ./sub/../r.yaml extends this file again — take one of the two away"),
    ],
)
def test_a_base_that_cannot_be(base: str, problem: str, write: Write, refused: Refused) -> None:
    write("", "sub/other.yaml")
    assert refused(extends=base) == [f"r.yaml:5: {problem}"]


def test_a_cycle_is_placed_where_it_closes(write: Write, minimal: Callable[..., str], problems: Refused) -> None:
    write("# one\nextends: c.yaml\n", "b.yaml")
    write("# two\n\nextends: r.yaml\n", "c.yaml")
    assert problems(write(minimal(extends="b.yaml"))) == [
        "c.yaml:3: extends: r.yaml extends this file again — take one of the two away"
    ]


def test_problems_of_a_base_are_placed_in_its_file(
    write: Write, minimal: Callable[..., str], problems: Refused
) -> None:
    write(minimal(lora="{r: 0}", trl="{seed: 1}", dtype="auto"), "base.yaml")
    assert problems(write("extends: base.yaml\nlora: {lora_alpha: 0}\n")) == [
        "base.yaml:5: lora.r: input should be greater than 0, got 0 — the default is 16",
        "base.yaml:6: trl.seed: alignctl sets this itself — use training.seed",
        "base.yaml:7: dtype: unknown key — did you mean model.dtype?",
        "r.yaml:2: lora.lora_alpha: input should be greater than 0, got 0 — the default is 32",
    ]


def test_syntax_errors_and_duplicates_of_a_base_are_told(
    write: Write, minimal: Callable[..., str], problems: Refused
) -> None:
    write("model: [\n", "broken.yaml")
    assert "broken.yaml:2: not YAML" in problems(write(minimal(extends="broken.yaml")))[0]
    write("seed: 1\nseed: 2\n", "twice.yaml")
    near = write(minimal(extends="twice.yaml", seed="null"))
    assert "twice.yaml:2: seed: stands twice, first at twice.yaml:1 — keep one of them" in problems(near)


# --- the environment

QUOTED = "'${oc.env:ALIGNCTL_T}'"


@pytest.mark.parametrize(
    ("written", "value", "read"),
    [
        ("${oc.env:ALIGNCTL_T}", "org/other", "org/other"),
        ("${oc.env:ALIGNCTL_T,org/default}", "org/other", "org/other"),
        ("${oc.env:ALIGNCTL_T,org/default}", None, "org/default"),
        ("org/${oc.env:ALIGNCTL_T}-${oc.env:ALIGNCTL_T}", "a", "org/a-a"),
        ("org/${oc.env:ALIGNCTL_T,b}", None, "org/b"),
        ("org/${oc.env:ALIGNCTL_T,}", None, "org/"),
        ("${oc.env:ALIGNCTL_T}", "'5'", "5"),
        ("${oc.env:ALIGNCTL_T}", "1234567", "1234567"),
        ("${oc.env:ALIGNCTL_T}", "@home: x", "@home: x"),
    ],
)
def test_a_value_from_the_environment(
    written: str, value: str | None, read: str, accepted: Accepted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGNCTL_T", raising=False)
    if value is not None:
        monkeypatch.setenv("ALIGNCTL_T", value)
    loaded = accepted(model=f"{{name_or_path: '{written}'}}")
    assert loaded.recipe.model.name_or_path == read
    assert loaded.secrets == {("model", "name_or_path"): written}


def test_numbers_from_the_environment_are_numbers(accepted: Accepted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNCTL_T", "5e-7")
    training = accepted(training=f"{{learning_rate: {QUOTED}, save_steps: '${{oc.env:ALIGNCTL_N,7}}'}}").recipe.training
    assert (training.learning_rate, training.save_steps) == (5e-7, 7)


def test_a_missing_variable(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNCTL_T", raising=False)
    assert refused(model="{name_or_path: 'x${oc.env:ALIGNCTL_T}'}") == [
        "r.yaml:1: model.name_or_path: the environment has no ALIGNCTL_T — export it"
    ]


def test_a_missing_variable_is_one_problem(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNCTL_T", raising=False)
    assert refused(training=f"{{learning_rate: {QUOTED}}}") == [
        "r.yaml:3: training.learning_rate: the environment has no ALIGNCTL_T — export it"
    ]


@pytest.mark.parametrize(
    "written",
    [
        "${env:ALIGNCTL_T}",
        "a-${model.dtype}",
        "${oc.env:ALIGNCTL-T}",
        "${oc.env: ALIGNCTL_T}",
        "${oc.env:ALIGNCTL_T}/${now:%Y}",
        "${oc.env:ALIGNCTL_U,${oc.env:ALIGNCTL_T}}",
    ],
)
def test_an_unknown_placeholder(written: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNCTL_T", "a")
    assert refused(model=f"{{name_or_path: '{written}'}}") == [
        f"r.yaml:1: model.name_or_path: unknown {written}"
        " — only ${oc.env:NAME} and ${oc.env:NAME,default} are known"
    ]


@pytest.mark.parametrize(
    ("sections", "overrides"),
    [
        ({"model": f"{{name_or_path: {QUOTED}}}"}, ()),
        ({"model": "{name_or_path: 'a${oc.env:ALIGNCTL_T}b'}"}, ()),
        ({"data": f"{{train: [{{path: a}}, {{path: {QUOTED}}}]}}"}, ()),
        ({"data": f"{{train: [{{path: a}}], eval: [{{path: b, name: {QUOTED}}}]}}"}, ()),
        ({"lora": f"{{target_modules: [q_proj, {QUOTED}]}}"}, ()),
        ({"trl": f"{{run_name: {QUOTED}, lr_scheduler_kwargs: {{deep: [{QUOTED}]}}}}"}, ()),
        ({"trl": "'${oc.env:ALIGNCTL_S}'"}, ()),
        ({}, ("model.name_or_path=${oc.env:ALIGNCTL_T}",)),
        ({}, ("trl={run_name: '${oc.env:ALIGNCTL_T}'}",)),
        ({"trl": f"{{lr_scheduler_kwargs: {{a.b: {QUOTED}}}}}"}, ()),
    ],
)
def test_a_value_from_the_environment_is_never_resolved(
    sections: dict[str, str], overrides: tuple[str, ...], accepted: Accepted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNCTL_T", "s3cret.jsonl")
    monkeypatch.setenv("ALIGNCTL_S", "{run_name: s3cret}")
    Path("s3cret.jsonl").write_text("{}\n", encoding="utf-8")
    loaded = accepted(*overrides, **sections)
    text = loaded.text()
    assert yaml.safe_load(text) == loaded.resolved()
    assert "s3cret" in repr(loaded.recipe)
    assert "s3cret" not in text
    assert "${oc.env:ALIGNCTL_" in text


def test_a_refused_value_from_the_environment_is_not_shown(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNCTL_T", "s3cret")
    (problem,) = refused(training=f"{{learning_rate: {QUOTED}}}")
    assert problem.startswith("r.yaml:3: training.learning_rate: input should be a valid number")
    assert "s3cret" not in problem


# --- overrides


def test_overrides_beat_the_file_and_its_base(write: Write, minimal: Callable[..., str]) -> None:
    write(minimal(evaluation="{samples: 1, max_new_tokens: 1}"), "base.yaml")
    near = write("extends: base.yaml\nevaluation: {samples: 2}\n")
    recipe = load(
        near, ["evaluation.samples=3", "evaluation.max_new_tokens=4", "lora.r=5", "data.train.0.take=6"]
    ).recipe
    assert (recipe.evaluation.samples, recipe.evaluation.max_new_tokens) == (3, 4)
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.data.train[0].take) == (5, 6)


def test_of_two_overrides_the_last_wins(accepted: Accepted) -> None:
    assert accepted("training.seed=1", "training.seed=2").recipe.training.seed == 2


@pytest.mark.parametrize(
    ("override", "sections", "problem"),
    [
        ("dpo.beta=0", {}, "dpo.beta: input should be greater than 0, got 0 — the default is 0.1"),
        ("dpo.bta=0", {}, "dpo.bta: unknown key — did you mean dpo.beta?"),
        ("lora={r: 0}", {}, "lora.r: input should be greater than 0, got 0 — the default is 16"),
        ("trl.seed=1", {}, "trl.seed: alignctl sets this itself — use training.seed"),
        ("data.train.1.take=1", {}, "cannot be set — the key must name a value of the recipe"),
        ("lora={r: 0}", {"lora": "{r: 4}"}, "lora.r: input should be greater than 0, got 0 — the default is 16"),
        ("orpo.beta=1", {}, "dpo and orpo: a recipe has one method — keep one"),
        ("data.train.0.take=0", {}, "data.train.0.take: input should be greater than 0, got 0 — see docs/recipe.md"),
        ("extends=_base/phi2.yaml", {}, "cannot be set here — `extends` belongs in the file"),
    ],
)
def test_the_place_of_an_override_is_the_argument(
    override: str, sections: dict[str, str], problem: str, refused: Refused
) -> None:
    (said,) = refused(override, **sections)
    assert said.startswith(f"argument '{override}': {problem}")


# --- data files


def test_data_files_become_absolute(write: Write, minimal: Callable[..., str]) -> None:
    rows = write("{}\n", "mine/rows.jsonl")
    held = write("{}\n", "mine/sub/held.jsonl")
    data = "{train: [{path: rows.jsonl}, {path: org/rows}], eval: [{path: sub/../sub/held.jsonl}]}"
    resolved = load(write(minimal(data=data), "mine/r.yaml")).resolved()["data"]
    assert [source["path"] for source in resolved["train"]] == [str(rows), "org/rows"]
    assert [source["path"] for source in resolved["eval"]] == [str(held)]


@pytest.mark.parametrize(
    ("files", "hit"),
    [
        (["mine/data/brief/test.jsonl", "data/brief/test.jsonl"], "mine/data/brief/test.jsonl"),
        (["data/brief/test.jsonl"], "data/brief/test.jsonl"),
        ([], catalog.folder() / "data/brief/test.jsonl"),
    ],
)
def test_data_files_are_looked_for_beside_the_recipe_then_here_then_built_in(
    files: list[str], hit: str | Path, here: Path, write: Write, minimal: Callable[..., str]
) -> None:
    for file in files:
        write("{}\n", file)
    recipe = load(write(minimal(data="{train: [{path: data/brief/test.jsonl}]}"), "mine/r.yaml")).recipe
    assert recipe.data.train[0].path == str((here / hit).resolve())


def test_a_data_file_that_is_nowhere_stays_as_it_is_written(accepted: Accepted) -> None:
    assert accepted(data="{train: [{path: gone.jsonl}]}").recipe.data.train[0].path == "gone.jsonl"


def test_an_override_of_the_path_is_made_absolute_too(write: Write, accepted: Accepted) -> None:
    rows = write("{}\n", "rows.jsonl")
    assert accepted("data.train.0.path=rows.jsonl").recipe.data.train[0].path == str(rows)


# --- the resolved recipe


def reloaded(loaded: Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Write the resolved recipe as a run does, and read it from another folder."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / "recipe.yaml"
    path.write_text(loaded.text(), encoding="utf-8")
    return load(path)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": "{learning_rate: 5e-7, weight_decay: 1e-2, warmup_steps: 0, gradient_checkpointing: off}"},
        {"model": "{name_or_path: 'ünï: cødé', revision: '1234567'}"},
        {"lora": "{target_modules: [q_proj, v_proj]}", "quantization": "{}"},
        {"dpo": "{loss_type: [sigmoid, sft], loss_weights: [1, 0.5], ld_alpha: 0}"},
        {"dpo": None, "orpo": "{nll_on_prompt: false}", "evaluation": "{samples: 0}"},
        {
            "dpo": None,
            "sft": "{}",
            "data": "{train: [{path: rows.jsonl, answer: chosen, take: 5}], eval_fraction: 0.5}",
        },
        {"trl": "{lr_scheduler_kwargs: {power: 2, names: [a, null]}, pad_to_multiple_of: null, tf32: on}"},
        {"model": "{name_or_path: '${oc.env:ALIGNCTL_T,org/model}'}"},
        {"model": "{name_or_path: m, revision: '12e4567'}"},
        {"model": "{name_or_path: m, revision: '0891234'}"},
        {"model": "{name_or_path: m, chat_template: own.jinja}"},
    ],
)
def test_the_resolved_recipe_loads_again_anywhere(
    sections: dict[str, str | None],
    here: Path,
    write: Write,
    accepted: Accepted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("{}\n", "rows.jsonl")
    write("{{ messages }}", "own.jinja")
    first = accepted(**sections)
    again = reloaded(first, here / "elsewhere", monkeypatch)
    assert again.recipe == first.recipe
    assert (again.secrets, again.resolved()) == (first.secrets, first.resolved())


@pytest.mark.parametrize("name", catalog.names())
def test_a_resolved_built_in_recipe_loads_again_anywhere(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(catalog.entry(name).path)
    assert reloaded(first, here / "elsewhere", monkeypatch).recipe == first.recipe


def test_a_loaded_recipe_cannot_be_changed(accepted: Accepted) -> None:
    training = accepted().recipe.training
    with pytest.raises(ValueError, match="frozen"):
        training.learning_rate = 1.0


def test_the_error_holds_every_problem_and_the_exit_code(write: Write, minimal: Callable[..., str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(minimal(a="1", b="2")))
    assert caught.value.exit_code == 2
    assert [problem.where.rpartition(":")[2] for problem in caught.value.problems] == ["5", "6"]
    assert str(caught.value).count("\n") == 1
