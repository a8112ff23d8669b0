"""Curves and histograms as SVG that takes its colours and its letters from the page around it."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from alignctl.report.curves import Curve, Line
from alignctl.terminal import harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More points than this are drawn as the lowest and the highest of each group, so that no peak is lost.
MOST = 300
# From so many points on the moving mean is drawn over a faint line.
SMOOTHED = 80
# What matplotlib draws with, and what the page's style sheet calls it.
_INK, _GRID, _BAND = "#010203", "#010204", "#010205"
LINES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
_VARIABLES = {_INK: "currentColor", _GRID: "var(--line)", _BAND: "var(--band)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(LINES)
}
_DASHES = ("-", "--", ":", "-.")
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.labelpad": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.limits": (-4, 5),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.6,
}


def curve(shown: Curve) -> str:
    """`shown` as an SVG element."""
    with _axes(shown.key, "step", shown.unit) as (figure, axes):
        if shown.normal is not None:
            axes.axhspan(*shown.normal, color=_BAND, linewidth=0)
        if shown.level is not None:
            axes.axhline(shown.level[0], color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
        for line in shown.lines:
            _draw(axes, line, noisy=shown.noisy)
        return _svg(figure, shown.key, shown.alternative)


def histogram(key: str, edges: list[float], counts: dict[str, list[float]]) -> str:
    """How many rows have how many tokens, a step line a side."""
    with _axes(key, "tokens", "rows") as (figure, axes):
        for i, values in enumerate(counts.values()):
            colour = LINES[i % len(LINES)]
            axes.stairs(values, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(values, edges, color=colour, linewidth=1.4)
        axes.set_ylim(bottom=0)
        said = "; ".join(f"{side} up to {edges[last(values) + 1]:.0f}" for side, values in counts.items())
        return _svg(figure, key, f"Rows by their length in tokens: {said}")


def last(counts: list[float]) -> int:
    """The last bar that has any rows."""
    return max((i for i, count in enumerate(counts) if count), default=0)


@contextmanager
def _axes(key: str, below: str, beside: str) -> Iterator[tuple[Figure, Axes]]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its fonts is no user's business
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own style is
        matplotlib.rcParams.update(_SETTINGS | {"svg.hashsalt": key})
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(below)
        axes.set_ylabel(beside)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(length=3)
        yield figure, axes


def _draw(axes: Axes, line: Line, *, noisy: bool) -> None:
    colour, dashes = LINES[line.colour % len(LINES)], _DASHES[line.colour // len(LINES) % len(_DASHES)]
    if line.dots or len(line.values) == 1:
        axes.plot(line.steps, line.values, color=colour, marker="o", markersize=4, linewidth=1, linestyle=dashes)
        return
    smooth = noisy and len(line.values) >= SMOOTHED
    faint: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if smooth else {}
    axes.plot(*extremes(line.steps, line.values), color=colour, linestyle="-" if smooth else dashes, **faint)
    if smooth:
        axes.plot(*extremes(line.steps, mean(line.values)), color=colour, linestyle=dashes)


def extremes(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most twice `MOST` points: the lowest and the highest of as many neighbours as it takes."""
    size = -(-len(values) // MOST)
    if size == 1:
        return steps, values
    kept: set[int] = {0, len(values) - 1}
    for start in range(0, len(values), size):
        part = range(start, min(start + size, len(values)))
        kept |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def mean(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, a fortieth of all."""
    half = max(1, len(values) // 80)
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in ends]


def _svg(figure: Figure, key: str, alternative: str) -> str:
    """The SVG without what a page does not need, its names made its own, its colours made variables."""
    from markupsafe import escape

    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;]*;", "", re.sub(r"\n\s*", "\n", text))
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", text)
    for sentinel, variable in _VARIABLES.items():
        text = text.replace(sentinel, variable)
    opening = f'<svg role="img" aria-label="{escape(harmless(alternative))}" '
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", opening, 1).strip()
