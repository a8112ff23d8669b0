"""The page of one run, and the page of several beside each other: one file each that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignctl import __version__, rundir
from alignctl.errors import Interrupted
from alignctl.report import answers, curves, measures, plots, shown, view
from alignctl.report.comparison import Comparison
from alignctl.report.gather import Run, gather
from alignctl.terminal import harmless

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

NAME = "report.html"


def write(folder: Path) -> Path:
    """Write `report.html` into the run's folder, whole or not at all.

    Raises:
        RecipeError: the folder holds no run.
        OSError: it cannot be written.
    """
    rundir.write_text(folder / NAME, page(gather(folder)))
    return folder / NAME


def made(folder: Path) -> str:
    """Write the page at the end of a run, and say in one line where it is, or why there is none.

    Whatever goes wrong with a page, a signal included, the run has ended as it has.
    """
    try:
        return f"report: {write(folder)}"
    except (Exception, Interrupted) as error:  # noqa: BLE001 (see above)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return f"no report was made: {said} — alignctl report {folder} tries again"


def page(run: Run) -> str:
    """The page of one run."""
    measured = measures.evaluations(run)
    gates = view.gates(run)
    return _render(
        "report.html.jinja",
        title=run.name,
        run=run,
        banner=view.banner(run, measured),
        cards=view.cards(run, measured),
        facts=view.facts(run),
        gates=gates,
        gate_counts=view.gate_counts(gates),
        plots=[_figure(each) for each in curves.curves(run)],
        parts=[(part, _histogram(part)) for part in view.parts(run)],
        findings=view.findings(run),
        evaluations=measured,
        answers=answers.answers(run, measured),
        memory=view.memory(run),
        recipe=_yaml(run.recipe_text) if run.recipe_text else None,
        commands=view.commands(run),
        pins=view.pins(run),
    )


def comparison(found: Comparison) -> str:
    """The page of several runs beside each other."""
    return _render(
        "compare.html.jinja",
        title=" · ".join(found.names),
        found=found,
        plots=[_figure(each) for each in found.curves],
    )


def _figure(curve: curves.Curve) -> dict[str, Any]:
    """A plot with its title, its legend and the sentence below it."""
    from markupsafe import Markup

    return {"curve": curve, "svg": Markup(plots.curve(curve)), "palette": len(plots.LINES)}


def _histogram(part: view.Part) -> Markup | None:
    from markupsafe import Markup

    if not part.lengths:
        return None
    return Markup(plots.histogram(f"lengths-{part.name}", part.lengths["edges"], part.lengths["counts"]))


def _yaml(text: str) -> Markup:
    """A recipe with its keys, values and comments in colours."""
    from markupsafe import Markup
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import YamlLexer

    return Markup(highlight(_clean(text), YamlLexer(), HtmlFormatter(nowrap=True)))


def _clean(value: object) -> object:
    """What an expression in a template becomes before it is escaped: text from elsewhere is made harmless."""
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return harmless(value.replace("\r\n", "\n"))
    return value


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("alignctl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": shown.estimate, "difference": shown.difference, "moment": shown.moment}
    environment.globals |= {"version": __version__, "now": rundir.now}
    return environment


def _render(template: str, **values: Any) -> str:
    from markupsafe import Markup

    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values |= {"style": Markup(_part("page.css")), "script": Markup(script), "script_hash": digest}
    return _environment().get_template(template).render(**values)


def _part(name: str) -> str:
    return (resources.files("alignctl.report") / "templates" / name).read_text(encoding="utf-8")
