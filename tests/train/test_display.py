"""What a person sees, and that text from a data set cannot move the terminal."""

from __future__ import annotations

import io

import pytest

from alignctl.terminal import harmless
from alignctl.train.display import Display


@pytest.fixture
def shown() -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    return Display(stream), stream


ROW = {
    "loss": 0.5,
    "rewards/margins": 1.25,
    "rewards/accuracies": 0.75,
    "pairs_per_second": 2.0,
    "peak_memory_gib": 3.0,
}


def test_plain_lines_on_a_pipe(shown: tuple[Display, io.StringIO]) -> None:
    display, stream = shown
    with display.training("pairs"):
        for step in range(1, 201):
            display.step({**ROW, "step": step, "eta_seconds": 61.0}, 200)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 21
    assert lines[0] == "step 1/200  loss 0.5000  margin 1.250  accuracy 0.75  pairs/s 2.00  GiB 3.00  eta 0:01:01"
    assert lines[-1].startswith("step 200/200 ")


def test_evaluation_rows_are_not_steps(shown: tuple[Display, io.StringIO]) -> None:
    display, stream = shown
    display.step({"step": 1, "eval_loss": 0.1}, 10)
    assert stream.getvalue() == ""


HOSTILE = "\x1b[2J\x1b]0;owned\x07 [bold]no markup[/bold] \u202etxt"


def test_hostile_answers_are_shown_as_text(shown: tuple[Display, io.StringIO]) -> None:
    display, stream = shown
    display.answers([{"prompt": HOSTILE, "before": HOSTILE, "after": "fine"}])
    out = stream.getvalue()
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
    assert out.count("[bold]no markup[/bold]") == 2


def test_harmless_keeps_what_reads() -> None:
    assert harmless("naïve\n\tcafé 漢字 🙂") == "naïve\n\tcafé 漢字 🙂"


def test_long_answers_are_cut(shown: tuple[Display, io.StringIO]) -> None:
    display, stream = shown
    display.answers([{"prompt": "p", "before": "x" * 1000, "after": "y"}])
    assert stream.getvalue().count("x") == 300 and "…" in stream.getvalue()


def test_long_words_are_broken_not_cut(shown: tuple[Display, io.StringIO]) -> None:
    display, stream = shown
    display.facts({"folder": "y" * 500})
    display.next([("z" * 500, "what")])
    assert stream.getvalue().count("y") == 500 and stream.getvalue().count("z") == 500
