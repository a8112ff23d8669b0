"""`alignctl check`: recipe, data and tokenizer, before a weight is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from alignctl.cli.rows import Opened, opened
from alignctl.terminal import as_json as json_text
from alignctl.terminal import harmless

if TYPE_CHECKING:
    from rich.console import Console

    from alignctl.train.data import Rows
    from alignctl.train.findings import Finding


def command(recipe: str, overrides: list[str] | None, *, as_json: bool, name: str | None = None) -> None:
    """Print the ledger and the findings, `name` being what the recipe is called when not as it was given.

    Too many dropped rows end it with exit code 3.
    """
    with opened(recipe, overrides) as rows:
        from alignctl.train import data
        from alignctl.train.findings import examine

        findings = examine(rows.recipe, rows.encoder, rows.train, rows.held_out)
        if as_json:
            rows.out.write(json_text(_values(rows, findings)) + "\n")
        else:
            _show(rows, findings, name or recipe)
        rows.out.flush()
        data.check_lost(rows.recipe, rows.train, rows.held_out)


def _values(rows: Opened, findings: list[Finding]) -> dict[str, Any]:
    return {
        "method": rows.recipe.method,
        "encoder": _encoder(rows),
        "ledger": {name: part.summary() for name, part in rows.parts().items()},
        "findings": [asdict(finding) for finding in findings],
    }


def _encoder(rows: Opened) -> dict[str, Any]:
    from alignctl.train.tokenizer import template_hash

    encoder = rows.encoder
    return {
        "model": rows.recipe.model.name_or_path,
        "template": rows.recipe.model.chat_template,
        "template_sha256": template_hash(encoder),
        "system_role": encoder.has_system,
        "stops_on": encoder.tokenizer.convert_ids_to_tokens(list(encoder.stop_ids)),
        "max_length": rows.recipe.data.max_length,
        "overlong": rows.recipe.data.overlong,
    }


def _show(rows: Opened, findings: list[Finding], name: str) -> None:
    from rich.text import Text

    from alignctl.train.display import Display

    display = Display(rows.out)
    about = _encoder(rows)
    display.facts(
        {
            "recipe": f"{name}: {rows.recipe.method}, no mistake found",
            "model": about["model"],
            "template": f"{about['template']} (sha256 {about['template_sha256'][:12]}), "
            f"{'with' if about['system_role'] else 'without'} a system role, stops on {' '.join(about['stops_on'])}",
            "length": f"at most {about['max_length']} tokens; longer rows: {about['overlong']}",
        }
    )
    for source in {part.path: part for held in rows.parts().values() for part in held.sources}.values():
        display.say(f"{source.path} read as {source.shape.name} ({source.shape.what}); cache {source.cache}")
    display.say("")
    for part, held in rows.parts().items():
        _ledger(display.console, part, held)
    console: Console = display.console
    for finding in (f for f in findings if f.warns):
        console.print(Text.assemble(("! ", "bold yellow"), (finding.name, "bold"), f"  {harmless(finding.said)}"))
        for line in (_first(finding), finding.meaning, f"→ {finding.way_out}"):
            if line:
                console.print(Text(f"    {harmless(line)}"))
    fine = [f for f in findings if not f.warns]
    for finding in fine:
        console.print(Text.assemble(("✓ ", "green"), (finding.name, "bold"), f"  {harmless(finding.said)}"))


def _first(finding: Finding) -> str:
    return f"rows: {', '.join(finding.first)}" if finding.first else ""


def _ledger(console: Console, name: str, rows: Rows) -> None:
    """Where the rows went, and how long they are."""
    from rich.table import Table
    from rich.text import Text

    ledger = rows.ledger
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_row(f"{ledger.rows:,}", Text(harmless(f"rows in {name}"), style="bold"))
    for reasons, what in ((ledger.aside, "set aside"), (ledger.dropped, "dropped")):
        for reason, places in sorted(reasons.items(), key=lambda item: -item[1].rows):
            first = f" ({', '.join(places.first)})" if places.first else ""
            table.add_row(f"−{places.rows:,}", Text(harmless(f"{what}: {reason}{first}")))
    table.add_row(f"{ledger.kept:,}", Text("kept", style="bold"))
    for reason, places in rows.cut().items() if len(rows) else ():
        table.add_row(f"{places.rows:,}", Text(harmless(f"of them cut: {reason} ({', '.join(places.first)})")))
    console.print(table)
    if len(rows):
        _lengths(console, rows.summary())
    console.print()


def _lengths(console: Console, summary: dict[str, Any]) -> None:
    from rich.table import Table

    percentiles = next(iter(summary["tokens"].values()))
    table = Table("tokens", *percentiles, box=None, padding=(0, 2), header_style="dim")
    for column in percentiles:
        table.columns[1 + list(percentiles).index(column)].justify = "right"
    for side, values in summary["tokens"].items():
        table.add_row(side, *(f"{value:,}" for value in values.values()))
    console.print(table)
    longer = f"; chosen is longer in {summary['chosen_longer']:.1%}" if "chosen_longer" in summary else ""
    console.print(f"  supervised tokens {summary['supervised_share']:.1%}{longer}")
