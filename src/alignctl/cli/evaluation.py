"""`alignctl eval`: did it get better?"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignctl import quiet, secrets
from alignctl.cli import signals
from alignctl.errors import Problem, RecipeError
from alignctl.terminal import as_json, harmless

if TYPE_CHECKING:
    from rich.table import Table

    from alignctl.proof.judges import Judge
    from alignctl.proof.trained import Trained
    from alignctl.train.display import Display

GROUPS = {
    "preferences": "Preferences",
    "likelihood": "Likelihood",
    "drift": "Distance from the reference",
    "answers": "Answers",
    "forgetting": "Forgetting",
    "tasks": "Tasks",
}
# Numbers that only the file holds.
LESSER = ("drawn_", "distinct_1")


@dataclass(frozen=True)
class Judges:
    """The judges that the command line names."""

    reward_model: str | None
    url: str | None
    model: str | None
    rule: str | None

    def check(self) -> None:
        """An endpoint needs the name of its model.

        Raises:
            RecipeError: it has none, or the name stands alone.
        """
        if (self.url is None) != (self.model is None):
            raise RecipeError(Problem("--judge-url", "and --judge-model go together", "give both"))

    def appear(self, trained: Trained) -> list[Judge]:
        """Load them."""
        from alignctl.proof import jury

        found: list[Judge] = []
        if self.rule is not None:
            found.append(jury.rule(self.rule))
        if self.reward_model is not None:
            found.append(jury.reward_model(self.reward_model, trained.machine))
        if self.url is not None and self.model is not None:
            found.append(jury.endpoint(self.url, self.model))
        return found


def command(
    folder: Path,
    *,
    data: str | None,
    against: str,
    samples: int | None,
    max_new_tokens: int | None,
    seed: int,
    judges: Judges,
    tasks: list[str],
    json: bool,
) -> None:
    """Evaluate the run in `folder`, keep the numbers there, and print them."""
    judges.check()
    if not (folder / "run.json").is_file():
        raise RecipeError(Problem(str(folder), "is no run", "give the folder that --output named"))
    with secrets.kept_out(folder), quiet.libraries(folder / "logs" / "libraries.log") as user:
        from alignctl.proof import evaluation, trained
        from alignctl.proof import tasks as harness
        from alignctl.report import html
        from alignctl.train.display import Display
        from alignctl.train.translate import refused, translated

        signals.check()
        harness.check(tasks)
        display = Display(user)
        with translated(), refused():
            run = trained.opened(folder)
            wanted = evaluation.Wanted(data, against, samples, max_new_tokens, seed)
            work = evaluation.prepare(run, wanted)
            found = evaluation.evaluate(work, judges.appear(run), tasks, Display(sys.stderr) if json else display)
        page = html.made(folder)
        if json:
            user.write(as_json(found) + "\n")
        else:
            show(display, found, run.run.path)
            display.say(page)


def show(display: Display, found: dict[str, Any], folder: Path) -> None:
    """The numbers by group, and the verdict."""
    from rich.text import Text

    data = found["data"]
    display.say(
        f"{data['rows']} rows of {data['prompts']} prompts ({data['path']}); reference: {found['against']['name']}"
    )
    if data["overlap"]:
        display.say(f"note: {data['overlap']} rows that were trained on ask prompts of these: they are not held out")
    display.console.print()
    display.console.print(_table(found["numbers"]))
    for score in found["judges"]:
        rate = score["win_rate"]
        said = "nothing could be read" if rate is None else f"win rate {_estimate(rate, 'share')}"
        counts = f"{score['wins']} won, {score['ties']} tied, {score['losses']} lost, {score['unreadable']} unreadable"
        display.say(f"\n{score['judge']}: {said}; {counts}")
    display.console.print()
    style = {"better": "bold green", "worse": "bold red", "broken": "bold red"}.get(found["verdict"], "bold yellow")
    display.console.print(Text.assemble((found["verdict"], style), f": {harmless(found['reason'])}"))
    display.say(f"\n{folder / 'evaluations' / found['name']}.json, {found['seconds']:.0f} s")


def _table(numbers: list[dict[str, Any]]) -> Table:
    """What matters most of the numbers, by group; the file holds all of them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in ("", "n", "reference", "tuned", "difference", "p"):
        table.add_column(column, no_wrap=column != "difference")
    for group, title in GROUPS.items():
        shown = [number for number in numbers if number["group"] == group and not number["name"].startswith(LESSER)]
        if shown:
            table.add_row(Text(title, style="bold"))
        for number in shown:
            unit, gap = number["unit"], number["difference"]
            cells = [_estimate(each, unit) for each in (number["reference"], number["tuned"])]
            cells.append(_estimate(gap, "nats" if unit == "perplexity" else unit, "+"))
            table.add_row(f"  {harmless(number['label'])}", str(number["n"]), *cells, _p(gap))
    return table


def _p(gap: dict[str, Any] | None) -> str:
    return "" if gap is None or gap["p"] is None else f"{gap['p']:.3f}" if gap["p"] >= 0.001 else "<0.001"


def _estimate(found: dict[str, Any] | None, unit: str, sign: str = "") -> str:
    """A value and its interval, as a share in per cent; empty when it was not measured."""
    if found is None:
        return ""
    factor, digits = 100 if unit == "share" else 1, 1 if unit in ("share", "tokens", "perplexity") else 3
    numbers = (found["value"], *found["interval"])
    value, low, high = ("?" if each is None else f"{each * factor:{sign}.{digits}f}" for each in numbers)
    spread = "" if low == high == value else f" [{low}, {high}]"
    return f"{value}{spread}{' %' if unit == 'share' else ''}"
