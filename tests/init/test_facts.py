"""What a model's name and a size of memory mean."""

from __future__ import annotations

import pytest

from alignctl.init import facts
from alignctl.init.facts import Model, Rows


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mistralai/Mistral-7B-v0.1", 7_000_000_000),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_500_000_000),
        ("google/gemma-2-9b", 9_000_000_000),
        ("4b-lab/model", None),
        ("microsoft/phi-2", None),
    ],
)
def test_a_name_may_tell_the_size(name: str, parameters: int | None) -> None:
    assert facts.by_name(name) == parameters


def test_percentiles_and_shares() -> None:
    rows = Rows(100, "pairs", tuple(range(1, 101)))
    assert (rows.percentile(0.95), rows.percentile(0.99)) == (96, 100)
    assert rows.over(90) == 0.1 and rows.over(100) == 0


def test_a_size_in_words() -> None:
    assert Model(parameters=134_515_008).size() == "135M parameters"
    assert Model(parameters=7_000_000_000, counted=False).size() == "7B parameters, by its name"
    assert Model().size() == "of unknown size" and Model().gib is None
    assert Model(parameters=2**30).gib == 2
