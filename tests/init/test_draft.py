"""A recipe is written with reasons, and reads back as the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignctl.init import draft
from alignctl.init.draft import Choice
from alignctl.recipe import tree


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5e-7, "5e-7"),
        (2e-4, "2e-4"),
        (1.25e-5, "1.25e-5"),
        (0.05, "0.05"),
        (1.0, "1.0"),
        (0.0, "0.0"),
        (True, "true"),
        ("no", "'no'"),
        ("1e-5", "'1e-5'"),
        ([{"path": "a, b.jsonl"}], "[{path: 'a, b.jsonl'}]"),
    ],
)
def test_values_are_written_as_a_person_would(value: object, text: str) -> None:
    assert draft.shown(value) == text
    assert tree.scalar(text) == value


@given(st.floats(min_value=1e-12, max_value=1e-2))
def test_no_digit_of_a_small_number_is_lost(value: float) -> None:
    assert tree.scalar(draft.shown(value)) == pytest.approx(value, rel=1e-14)


def test_reasons_stand_beside_or_above(tmp_path: Path) -> None:
    long = "because " * 30
    given = {"training": {"learning_rate": Choice(1e-5, "tried"), "seed": Choice(1, long)}, "dpo": {}}
    text = draft.text(given, ["A recipe."], ["", "The end."])
    lines = text.splitlines()
    assert lines[:3] == ["# A recipe.", "training:", "  learning_rate: 1e-5  # tried"]
    assert lines[-3:] == ["dpo: {}", "#", "# The end."]
    assert all(line.startswith("  # because") for line in lines[3:-4]) and len(lines) == 10
    assert max(map(len, lines)) <= 120
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert tree.read(tmp_path / "r.yaml").values == {"training": {"learning_rate": 1e-5, "seed": 1}, "dpo": {}}
    assert draft.values(given) == {"training": {"learning_rate": 1e-5, "seed": 1}, "dpo": {}}


def test_a_reason_from_elsewhere_stays_a_comment(tmp_path: Path) -> None:
    given = {"dpo": {"beta": Choice(0.1, "a\n  loss_type: hinge\x1b[31m")}}
    text = draft.text(given, ["x\nmodel: {}"], [])
    assert "\x1b" not in text
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert tree.read(tmp_path / "r.yaml").values == {"dpo": {"beta": 0.1}}
