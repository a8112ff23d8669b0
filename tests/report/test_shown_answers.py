"""Answers on the page: which are told apart by the filters, and that all together stay small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from alignctl.report import answers, html, measures
from alignctl.report.answers import Asked, Reply, fitted
from alignctl.report.gather import gather

MakeRun = Callable[..., Path]


def asked(before: str, after: str, **changes: Any) -> Asked:
    return Asked("Why?", "", (Reply("before", before), Reply("after", after, **changes)))


def test_what_the_filters_tell_apart() -> None:
    assert asked("a", "b").changed
    assert not asked("a", "a").changed
    assert asked("a", "b", stopped=False).runs_on
    assert not asked("a", "b", stopped=None).runs_on
    assert not Asked("", "", (Reply("before", "a", stopped=False), Reply("after", "a", stopped=True))).runs_on
    assert asked("a" * 99, "bb", tokens=7).length == 7
    assert asked("a" * 99, "bb").length == 2


def size(rows: list[Asked]) -> int:
    texts = [t for row in rows for t in (row.prompt, row.preferred, *(reply.text for reply in row.replies))]
    return sum(len(str(escape(text)).encode()) for text in texts)


def test_what_fits_is_left_alone() -> None:
    rows = [asked("a" * 100, "b" * 100)]
    assert fitted(rows, 1000) is rows


@pytest.mark.parametrize("text", ["tea ", "<&>\"'", "茶", "🍵\u202e"])
def test_long_answers_are_cut_and_short_ones_are_not(text: str) -> None:
    rows = [asked("short", text * 400), asked(text * 9000, "short")]
    found = fitted(rows, 5000)
    assert size(found) <= 5000 + 2 * len("…".encode())
    assert found[0].replies[0] == Reply("before", "short")
    assert found[1].replies[0].cut
    assert found[1].replies[0].text.endswith("…")
    assert len(found[1].replies[0].text) > 200


def test_a_page_of_very_many_long_answers_stays_below_three_megabytes(make_run: MakeRun) -> None:
    run = make_run(answers=1200, words=2000, steps=200)
    page = html.page(gather(run))
    assert len(page.encode()) < 3_000_000
    assert page.count("<article") == answers.MOST
    assert "The first 1000 of 1200" in page


def test_an_evaluation_without_answers_leaves_the_samples(make_run: MakeRun) -> None:
    run = gather(make_run(answers=3))
    (found,) = answers.answers(run, measures.evaluations(run))
    assert (found.name, found.total) == ("held-out", 3)
    assert [reply.label for reply in found.asked[0].replies] == ["before", "after"]
    assert answers.answers(gather(make_run("none", answers=0)), []) == []
