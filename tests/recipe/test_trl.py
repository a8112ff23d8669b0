"""What a recipe hands on to TRL."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alignctl.recipe.load import Loaded

Refused = Callable[..., list[str]]
Accepted = Callable[..., Loaded]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("adam_bta1", "TRL's dpo config has no such argument — did you mean trl.adam_beta1?"),
        ("qqqqqq", "TRL's dpo config has no such argument — see TRL's documentation"),
        ("learning_rate", "alignctl sets this itself — use training.learning_rate"),
        ("warmup_ratio", "alignctl sets this itself — use training.warmup_ratio"),
        ("beta", "alignctl sets this itself — use dpo.beta"),
        ("loss_type", "alignctl sets this itself — use dpo.loss_type"),
        ("max_length", "alignctl sets this itself — use data.max_length"),
        ("output_dir", "alignctl sets this itself — use the option --output DIR"),
        ("bf16", "alignctl sets this itself — use model.dtype"),
        ("report_to", "alignctl sets this itself — use logging.report_to"),
        ("save_strategy", "alignctl sets this itself — use training.save_steps"),
        ("eval_strategy", "alignctl sets this itself — use training.eval_steps"),
        ("resume_from_checkpoint", "alignctl sets this itself — use the option --resume"),
    ],
)
def test_a_name_under_trl_that_is_refused(key: str, problem: str, refused: Refused) -> None:
    assert refused(trl=f"{{{key}: 1}}") == [f"r.yaml:5: trl.{key}: {problem}"]


def test_names_under_trl_are_those_of_the_method(refused: Refused, accepted: Accepted) -> None:
    assert accepted(trl="{sync_ref_model: true}").recipe.trl == {"sync_ref_model": True}
    (problem,) = refused(dpo=None, orpo="{}", trl="{sync_ref_model: true}")
    assert problem.startswith("r.yaml:5: trl.sync_ref_model: TRL's orpo config has no such argument")
    assert refused(dpo=None, orpo="{}", trl="{beta: 1}") == [
        "r.yaml:5: trl.beta: alignctl sets this itself — use orpo.beta"
    ]


def test_a_name_that_trl_knows_is_passed_on_as_it_is(accepted: Accepted) -> None:
    loaded = accepted(trl="{adam_beta1: 0.8, lr_scheduler_kwargs: {power: 2}, pad_to_multiple_of: null}")
    expected = {"adam_beta1": 0.8, "lr_scheduler_kwargs": {"power": 2}, "pad_to_multiple_of": None}
    assert loaded.recipe.trl == loaded.resolved()["trl"] == expected
