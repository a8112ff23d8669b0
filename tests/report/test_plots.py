"""Plots as SVG: small, without names that clash, in the colours of the page, and no peak is lost."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import matplotlib
import pytest

from alignctl.report import plots
from alignctl.report.curves import Curve, Line


def one(key: str = "loss", n: int = 50, **changes: object) -> Curve:
    line = Line("training rows", 0, [float(i) for i in range(n)], [1 / (1 + i) for i in range(n)])
    values: dict[str, object] = {"key": key, "title": "Loss", "unit": "loss", "lines": [line]} | changes
    return Curve(**values)  # type: ignore[arg-type]


def test_it_is_xml_with_words_for_those_who_do_not_see_it() -> None:
    root = ElementTree.fromstring(plots.curve(one()))
    assert root.get("role") == "img"
    assert root.get("aria-label") == "Loss against step: training rows from 1 to 0.02 over 50 points"
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"step", "loss"} <= set(texts)


def test_its_colours_are_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "#123456")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    text = plots.curve(one(level=(0.5, "half"), normal=(-0.3, 0.0)))
    assert not re.findall(r"#[0-9a-f]{6}", text)
    assert {"var(--c0)", "var(--band)", "var(--line)", "currentColor"} <= set(
        re.findall(r"var\([^)]*\)|currentColor", text)
    )
    assert "font-size: 9px" in text


def test_no_name_of_two_plots_is_the_same() -> None:
    names = [set(re.findall(r' id="([^"]*)"', plots.curve(one(key)))) for key in ("loss", "margins")]
    assert all(names)
    assert not names[0] & names[1]
    for key in ("loss", "margins"):
        text = plots.curve(one(key))
        used = set(re.findall(r'(?:url\(#|href="#)([^")]*)', text))
        assert used <= set(re.findall(r' id="([^"]*)"', text))


def test_nothing_in_it_reaches_out_of_the_page() -> None:
    text = plots.curve(one())
    assert not re.search(r"<(style|script|image|metadata|foreignObject)|<!|@import|url\((?!#)", text)
    addresses = set(re.findall(r"https?://[^\"]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_names_of_runs_are_escaped_and_made_harmless() -> None:
    hostile = Line('<script>"\u202e', 0, [1.0, 2.0], [1.0, 2.0])
    text = plots.curve(one(lines=[hostile]))
    assert "<script>" not in text
    assert "&lt;script&gt;&#34;\N{REPLACEMENT CHARACTER}" in text
    ElementTree.fromstring(text)


def test_thousands_of_points_become_few_and_keep_the_peak() -> None:
    steps = [float(i) for i in range(5000)]
    values = [0.0] * 5000
    values[2717], values[3333] = 9.0, -9.0
    drawn_steps, drawn = plots.extremes(steps, values)
    assert len(drawn) <= 2 * plots.MOST + 2
    assert (max(drawn), min(drawn)) == (9.0, -9.0)
    assert drawn_steps[drawn.index(9.0)] == 2717
    assert drawn_steps == sorted(drawn_steps)
    assert (drawn_steps[0], drawn_steps[-1]) == (0, 4999)
    assert plots.extremes(steps[:300], values[:300]) == (steps[:300], values[:300])


def test_the_mean_over_neighbours() -> None:
    """Of 160 values each is the mean of itself and two on either side; at the ends of those that there are."""
    found = plots.mean([float(i) for i in range(160)])
    assert found[0] == pytest.approx((0 + 1 + 2) / 3)
    assert found[80] == pytest.approx(80)
    assert found[159] == pytest.approx((157 + 158 + 159) / 3)


def test_long_logs_are_small_and_what_is_exact_is_not_smoothed() -> None:
    long = one(n=5000)
    assert len(plots.curve(long)) < 60_000
    assert plots.curve(long).count("opacity: 0.3") == 1
    assert plots.curve(one("lr", n=5000)).count("opacity: 0.3") == 0


def test_a_single_point_is_seen() -> None:
    assert "<use" in plots.curve(one(n=1)).split("stroke: var(--c0)")[0]


def test_a_histogram_of_lengths() -> None:
    text = plots.histogram("lengths-train", [0, 10, 20, 30], {"chosen": [3, 1, 0], "rejected": [0, 2, 2]})
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == "Rows by their length in tokens: chosen up to 20; rejected up to 30"
    assert "var(--c0)" in text
    assert "var(--c1)" in text
