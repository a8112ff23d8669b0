"""A recipe file to a checked recipe: what is right, and every problem at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignctl.recipe import catalog
from alignctl.recipe.load import Loaded, load

Refused = Callable[..., list[str]]
Accepted = Callable[..., Loaded]
Write = Callable[..., Path]


# --- a recipe that is right


def test_a_minimal_recipe(accepted: Accepted) -> None:
    loaded = accepted()
    assert loaded.name == "r"
    assert loaded.secrets == {}
    assert loaded.recipe.method == "dpo"
    assert loaded.recipe.training.learning_rate == 1e-5
    assert loaded.resolved() == {
        "model": {
            "name_or_path": "org/model",
            "dtype": "auto",
            "attn_implementation": "auto",
            "chat_template": "model",
            "use_safetensors": True,
            "trust_remote_code": False,
        },
        "data": {
            "train": [{"path": "org/rows", "split": "train", "rejected": "worst"}],
            "max_length": 1024,
            "overlong": "drop",
            "max_dropped": 0.05,
        },
        "training": {
            "learning_rate": 1e-5,
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "gradient_checkpointing": "auto",
            "group_by_length": "auto",
            "packed": "auto",
            "logging_steps": 1,
            "save_steps": 100,
            "save_total_limit": 2,
            "seed": 42,
        },
        "dpo": {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "precompute_ref_log_probs": False},
        "evaluation": {"samples": 8, "max_new_tokens": 256},
        "logging": {"report_to": "none"},
        "gates": {
            "targets": True,
            "quantized": True,
            "trainable": True,
            "learning_rate": True,
            "parent": True,
            "memory": True,
            "packed": True,
            "reference": True,
            "finite": True,
            "moved": True,
            "resume": True,
            "labels": True,
            "drift": True,
            "easy": True,
            "noise": True,
            "length": True,
            "answers": True,
            "saved": True,
            "reload": True,
        },
        "trl": {},
    }


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_the_section_is_the_method(method: str, accepted: Accepted) -> None:
    loaded = accepted(method=method, **{"dpo": None, method: "{}"})
    assert loaded.recipe.method == method
    assert {"sft", "dpo", "orpo"} & set(loaded.recipe.sections) == {method}


@pytest.mark.parametrize(
    ("sections", "adapter"),
    [({}, False), ({"lora": "{}"}, True), ({"model": "{name_or_path: m, adapter: runs/a}"}, True)],
)
def test_an_adapter_is_trained_when_there_is_one(sections: dict[str, str], adapter: bool, accepted: Accepted) -> None:
    assert accepted(**sections).recipe.trains_adapter is adapter


def test_the_name_is_the_file_name_without_its_suffix(write: Write, minimal: Callable[..., str]) -> None:
    assert load(write(minimal(), "sub/phi2.v2.yaml")).name == "phi2.v2"


# --- unknown keys


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"modle": "{}"}, "r.yaml:5: modle: unknown key — did you mean model?"),
        ({"extend": "b.yaml"}, "r.yaml:5: extend: unknown key — did you mean extends?"),
        ({"beta": "0.1"}, "r.yaml:5: beta: unknown key — did you mean dpo.beta or orpo.beta?"),
        ({"warmup_ratio": "0.1"}, "r.yaml:5: warmup_ratio: unknown key — did you mean training.warmup_ratio?"),
        (
            {"qqq": "1"},
            "r.yaml:5: qqq: unknown key — known here: model, quantization, lora, data, training, sft, dpo, orpo, "
            "evaluation, logging, gates, trl, extends",
        ),
        (
            {"model": "{name_or_path: m, atn_implementation: sdpa}"},
            "r.yaml:1: model.atn_implementation: unknown key — did you mean model.attn_implementation?",
        ),
        (
            {"data": "{train: [{path: a}], max_lenght: 9}"},
            "r.yaml:2: data.max_lenght: unknown key — did you mean data.max_length?",
        ),
        (
            {"data": "{train: [{path: a, spilt: b}]}"},
            "r.yaml:2: data.train.0.spilt: unknown key — did you mean data.train.0.split?",
        ),
        (
            {"data": "{train: [{path: a}], eval: [{path: a}, {path: b, tak: 5}]}"},
            "r.yaml:2: data.eval.1.tak: unknown key — did you mean data.eval.1.take?",
        ),
        (
            {"training": "{learning_rate: 1, save_step: 5}"},
            "r.yaml:3: training.save_step: unknown key — did you mean training.save_steps?",
        ),
        (
            {"training": "{learning_rate: 1, max_length: 5}"},
            "r.yaml:3: training.max_length: unknown key — did you mean data.max_length?",
        ),
        ({"dpo": "{bta: 1}"}, "r.yaml:4: dpo.bta: unknown key — did you mean dpo.beta?"),
        ({"dpo": None, "orpo": "{bta: 1}"}, "r.yaml:4: orpo.bta: unknown key — did you mean orpo.beta?"),
        ({"lora": "{alpha: 4}"}, "r.yaml:5: lora.alpha: unknown key — did you mean lora.lora_alpha?"),
        (
            {"lora": "{}", "quantization": "{qqq: 4}"},
            "r.yaml:6: quantization.qqq: unknown key — known here: load_in_4bit, bnb_4bit_quant_type, "
            "bnb_4bit_use_double_quant, bnb_4bit_compute_dtype",
        ),
        ({"evaluation": "{sample: 4}"}, "r.yaml:5: evaluation.sample: unknown key — did you mean evaluation.samples?"),
        ({"logging": "{report: none}"}, "r.yaml:5: logging.report: unknown key — did you mean logging.report_to?"),
        ({"gates": "{refrence: off}"}, "r.yaml:5: gates.refrence: unknown key — did you mean gates.reference?"),
    ],
)
def test_an_unknown_key(sections: dict[str, str | None], problem: str, refused: Refused) -> None:
    assert refused(**sections) == [problem]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "training.learning_rate"),
        ("lerning_rate", "training.learning_rate"),
        ("packd", "training.packed"),
    ],
)
def test_no_gate_is_the_answer_to_what_a_recipe_trains_with(key: str, meant: str, refused: Refused) -> None:
    assert refused(**{key: "1"}) == [f"r.yaml:5: {key}: unknown key — did you mean {meant}?"]


def test_a_foreign_short_form_is_not_answered_with_another_section(refused: Refused) -> None:
    (problem,) = refused(lora="{rank: 4}")
    assert "data.train" not in problem


# --- several mistakes, and what is missing


def test_every_mistake_at_once_in_the_order_of_the_lines(write: Write, problems: Callable[..., list[str]]) -> None:
    text = """\
model:
  name_or_path: org/model
  dtyp: float32
data:
  train: [{path: org/rows}]


training:
  learning_rate: fast
  save_step: 5
dpo: {beta: -1}
"""
    assert problems(write(text)) == [
        "r.yaml:3: model.dtyp: unknown key — did you mean model.dtype?",
        "r.yaml:9: training.learning_rate: input should be a valid number, got 'fast' — see docs/recipe.md",
        "r.yaml:10: training.save_step: unknown key — did you mean training.save_steps?",
        "r.yaml:11: dpo.beta: input should be greater than 0, got -1 — the default is 0.1",
    ]


def test_mistakes_of_every_kind_come_together(refused: Refused) -> None:
    model = "{name_or_path: m, chat_template: zephir}"
    assert refused("nonsense", model=model, sft="{}", trl="{seed: 1}", seed="1") == [
        "r.yaml:1: model.chat_template: unknown template 'zephir' — did you mean zephyr?",
        "r.yaml:4: sft and dpo: a recipe has one method — keep one",
        "r.yaml:6: trl.seed: alignctl sets this itself — use training.seed",
        "r.yaml:7: seed: unknown key — did you mean training.seed?",
        "argument 'nonsense': is not key=value — write it as training.learning_rate=1e-5",
    ]


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"model": None}, "r.yaml:1: model: is missing — add model"),
        ({"data": None}, "r.yaml:1: data: is missing — add data"),
        ({"training": None}, "r.yaml:1: training: is missing — add training"),
        ({"model": "{dtype: auto}"}, "r.yaml:1: model.name_or_path: is missing — add model.name_or_path"),
        ({"data": "{max_length: 9}"}, "r.yaml:2: data.train: is missing — add data.train"),
        ({"training": "{seed: 1}"}, "r.yaml:3: training.learning_rate: is missing — add training.learning_rate"),
    ],
)
def test_a_missing_key(sections: dict[str, str | None], problem: str, refused: Refused) -> None:
    assert refused(**sections) == [problem]


def test_a_duplicate_key_refuses_the_recipe(write: Write, minimal: Callable[..., str], problems: Refused) -> None:
    assert problems(write(minimal() + "dpo: {beta: 1}\n")) == [
        "r.yaml:5: dpo: stands twice, first at r.yaml:4 — keep one of them"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "r.yaml: is empty — "),
        ("- a\n", "r.yaml: is not a mapping of sections — "),
        ("model: [\n", "r.yaml:2: not YAML: "),
    ],
)
def test_a_file_that_cannot_be_read_has_that_one_problem(
    text: str, problem: str, write: Write, problems: Refused
) -> None:
    (said,) = problems(write(text))
    assert said.startswith(problem)


def test_no_such_file(here: Path, problems: Refused) -> None:
    assert problems(here / "demo-dop.yaml") == ["demo-dop.yaml: no such recipe — did you mean demo-dpo?"]
    assert problems(here / "zzzzzz.yaml") == [
        "zzzzzz.yaml: no such recipe — `alignctl recipes` lists the built-in ones"
    ]


def test_a_file_without_permission_to_read(
    write: Write, minimal: Callable[..., str], problems: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    path = write(minimal())
    monkeypatch.setattr(Path, "read_text", denied)
    (problem,) = problems(path)
    assert "Permission denied" in problem


# --- wrong values


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"model": "{name_or_path: 5}"}, "r.yaml:1: model.name_or_path: input should be a valid string, got 5"),
        ({"model": "just-a-name"}, "r.yaml:1: model: input should be a valid dictionary"),
        ({"model": "{name_or_path: m, trust_remote_code: 1}"}, "r.yaml:1: model.trust_remote_code: input should be a"),
        (
            {"model": "{name_or_path: m, dtype: bf16}"},
            "r.yaml:1: model.dtype: input should be 'auto', 'bfloat16', 'float16' or 'float32', got 'bf16' — did "
            "you mean bfloat16?",
        ),
        ({"data": "{train: rows}"}, "r.yaml:2: data.train: input should be a valid list, got 'rows'"),
        ({"data": "{train: []}"}, "r.yaml:2: data.train: list should have at least 1 item"),
        ({"data": "{train: [{path: a}], max_length: 7}"}, "r.yaml:2: data.max_length: input should be greater than or"),
        (
            {"data": "{train: [{path: a}], max_length: 9.0}"},
            "r.yaml:2: data.max_length: input should be a valid integer",
        ),
        ({"training": "{learning_rate: '1e-5'}"}, "r.yaml:3: training.learning_rate: input should be a valid number"),
        ({"training": "{learning_rate: on}"}, "r.yaml:3: training.learning_rate: input should be a valid number"),
        (
            {"training": "{learning_rate: .nan}"},
            "r.yaml:3: training.learning_rate: input should be a finite number, got nan",
        ),
        ({"training": "{learning_rate: 0}"}, "r.yaml:3: training.learning_rate: input should be greater than 0, got 0"),
        (
            {"training": "{learning_rate: .inf}"},
            "r.yaml:3: training.learning_rate: input should be a finite number, got inf",
        ),
        ({"dpo": "{label_smoothing: 0.5}"}, "r.yaml:4: dpo.label_smoothing: input should be less than 0.5, got 0.5"),
        ({"dpo": "true"}, "r.yaml:4: dpo: input should be a valid dictionary"),
        ({"lora": "{r: 0}"}, "r.yaml:5: lora.r: input should be greater than 0, got 0 — the default is 16"),
        ({"lora": "{}", "quantization": "{load_in_4bit: off}"}, "r.yaml:6: quantization.load_in_4bit: input should be"),
        ({"logging": "{report_to: stdout}"}, "r.yaml:5: logging.report_to: input should be 'none', 'tensorboard'"),
        ({"trl": "[seed]"}, "r.yaml:5: trl: input should be a valid dictionary"),
    ],
)
def test_a_wrong_value(sections: dict[str, str], problem: str, refused: Refused) -> None:
    (said,) = refused(**sections)
    assert said.startswith(problem)


@pytest.mark.parametrize(
    "sections",
    [
        {"dpo": "{loss_type: sigmod}"},
        {"dpo": "{loss_type: [sigmoid, hnge]}"},
        {"training": "{learning_rate: 1, gradient_checkpointing: maybe}"},
        {"lora": "{target_modules: 5}"},
    ],
)
def test_one_wrong_value_is_one_problem(sections: dict[str, str], refused: Refused) -> None:
    assert len(refused(**sections)) == 1


SOURCES = """\

    - path: a
    - path: b
      take: 0
    - split: c"""


def test_a_mistake_in_a_list_is_placed_at_its_item(
    write: Write, minimal: Callable[..., str], problems: Refused
) -> None:
    first, second = problems(write(minimal(data=f"\n  train:{SOURCES}")))
    assert first.startswith("r.yaml:6: data.train.1.take: input should be greater than 0, got 0")
    assert second.startswith("r.yaml:7: data.train.2.path: is missing")


# --- the method


@pytest.mark.parametrize(
    ("sections", "method", "problem"),
    [
        ({"dpo": None}, None, "r.yaml:1: no method — add a section, e.g. `dpo: {}`"),
        ({"dpo": None}, "orpo", "r.yaml:1: no method — add a section, e.g. `orpo: {}`"),
        ({"dpo": "null"}, "dpo", "r.yaml:4: dpo: is empty — write `dpo: {}` to keep the defaults"),
        ({"orpo": "{}"}, None, "r.yaml:5: dpo and orpo: a recipe has one method — keep one"),
        ({"orpo": "{}"}, "orpo", "r.yaml:5: dpo and orpo: a recipe has one method — keep one"),
        ({"sft": "{}", "orpo": "{}"}, None, "r.yaml:4: sft and dpo and orpo: a recipe has one method — keep one"),
        ({}, "sft", "r.yaml:4: this is a recipe for dpo — run `alignctl dpo`"),
        ({"dpo": None, "sft": "{}"}, "dpo", "r.yaml:4: this is a recipe for sft — run `alignctl sft`"),
    ],
)
def test_a_recipe_has_one_method(
    sections: dict[str, str | None], method: str | None, problem: str, refused: Refused
) -> None:
    assert refused(method=method, **sections) == [problem]


def test_null_takes_a_method_away(accepted: Accepted) -> None:
    assert accepted(dpo="null", sft="{}").recipe.method == "sft"


# --- pairs of keys


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"quantization": "{}"}, "r.yaml:5: quantization: 4-bit weights cannot be trained — add a `lora:` section"),
        (
            {"lora": "null", "quantization": "{}"},
            "r.yaml:6: quantization: 4-bit weights cannot be trained — add a `lora:` section",
        ),
        (
            {"data": "{train: [{path: a}], eval: [{path: b}], eval_fraction: 0.1}"},
            "r.yaml:2: data.eval_fraction: data.eval is given too — keep one of the two",
        ),
        (
            {"training": "{learning_rate: 1, warmup_ratio: 0, warmup_steps: 0}"},
            "r.yaml:3: training.warmup_steps: training.warmup_ratio is given too — keep one of the two",
        ),
        (
            {"dpo": "{loss_type: [sigmoid, sft], loss_weights: [1.0]}"},
            "r.yaml:4: dpo.loss_weights: must have as many numbers as dpo.loss_type has losses (2) — give one weight "
            "for each loss",
        ),
        (
            {"dpo": "{loss_weights: [1, 2]}"},
            "r.yaml:4: dpo.loss_weights: must have as many numbers as dpo.loss_type has losses (1) — give one weight "
            "for each loss",
        ),
        (
            {"dpo": "{loss_type: exo_pair}"},
            "r.yaml:4: dpo.label_smoothing: must be above 0 for exo_pair — the paper recommends 1e-3",
        ),
        (
            {"dpo": "{loss_type: exo_pair, label_smoothing: 0.0}"},
            "r.yaml:4: dpo.label_smoothing: must be above 0 for exo_pair — the paper recommends 1e-3",
        ),
        (
            {"dpo": "{loss_type: [exo_pair, sft]}"},
            "r.yaml:4: dpo.label_smoothing: must be above 0 for exo_pair — the paper recommends 1e-3",
        ),
        (
            {"dpo": "{loss_type: [exo_pair]}"},
            "r.yaml:4: dpo.label_smoothing: must be above 0 for exo_pair — the paper recommends 1e-3",
        ),
    ],
)
def test_a_pair_that_contradicts_itself(sections: dict[str, str], problem: str, refused: Refused) -> None:
    assert refused(**sections) == [problem]


@pytest.mark.parametrize(
    "sections",
    [
        {"quantization": "{}", "lora": "{}"},
        {"quantization": "{}", "model": "{name_or_path: m, adapter: runs/a}"},
        {"quantization": "null"},
        {"data": "{train: [{path: a}], eval: null, eval_fraction: 0.1}"},
        {"training": "{learning_rate: 1, warmup_ratio: null, warmup_steps: 5}"},
        {"dpo": "{loss_type: [sigmoid, sft], loss_weights: [1.0, 2]}"},
        {"dpo": "{loss_weights: [2.0]}"},
        {"dpo": "{loss_type: exo_pair, label_smoothing: 1e-3}"},
    ],
)
def test_a_pair_that_agrees(sections: dict[str, str], accepted: Accepted) -> None:
    assert accepted(**sections).recipe.method == "dpo"


# --- the chat template


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("zephir", "unknown template 'zephir' — did you mean zephyr?"),
        ("chat-ml", "unknown template 'chat-ml' — did you mean chatml?"),
        ("none", f"unknown template 'none' — one of model, {', '.join(catalog.templates())}, or a .jinja file"),
        ("own.jinja", "no such file own.jinja — it is looked for beside the recipe and in the current folder"),
    ],
)
def test_an_unknown_template(template: str, problem: str, refused: Refused) -> None:
    assert refused(model=f"{{name_or_path: m, chat_template: {template}}}") == [
        f"r.yaml:1: model.chat_template: {problem}"
    ]


@pytest.mark.parametrize("template", ["model", *catalog.templates()])
def test_a_known_template(template: str, accepted: Accepted) -> None:
    model = accepted(model=f"{{name_or_path: m, chat_template: {template}}}").recipe.model
    assert model.chat_template == template


@pytest.mark.parametrize(
    ("files", "hit"),
    [
        (["mine/own.jinja", "own.jinja", "built-in/own.jinja"], "mine/own.jinja"),
        (["own.jinja", "built-in/own.jinja"], "own.jinja"),
        (["built-in/own.jinja"], "built-in/own.jinja"),
    ],
)
def test_a_template_file_is_looked_for_beside_the_recipe_then_here_then_built_in(
    files: list[str],
    hit: str,
    here: Path,
    write: Write,
    minimal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalog, "folder", lambda: here / "built-in")
    for file in files:
        write("{{ messages }}", file)
    path = write(minimal(model="{name_or_path: m, chat_template: own.jinja}"), "mine/r.yaml")
    assert load(path).recipe.model.chat_template == str((here / hit).resolve())
