"""`alignctl inspect`: rows as the model will see them, and rows as a file of messages."""

from __future__ import annotations

import errno
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignctl import rundir
from alignctl.cli.rows import Opened, opened
from alignctl.errors import Problem, RecipeError
from alignctl.terminal import as_json as json_text
from alignctl.terminal import harmless

if TYPE_CHECKING:
    from rich.text import Text

    from alignctl.formats import Canonical
    from alignctl.train.data import Rows
    from alignctl.train.view import Span


@dataclass(frozen=True)
class Shown:
    """A row to show; without `ids` it is not among the rows, and `dropped` says why."""

    title: str
    place: str
    canonical: Canonical
    ids: dict[str, list[int]] | None
    dropped: str = ""


def command(
    recipe: str,
    overrides: list[str] | None,
    *,
    row: str | None,
    longest: bool,
    at_random: bool,
    part: str,
    side: str | None,
    ids: bool,
    as_json: bool,
    export: Path | None,
) -> None:
    """Show one row, or write every row of a part to a file."""
    if sum((row is not None, longest, at_random, export is not None)) > 1:
        what = "each say which rows, in its own way"
        raise RecipeError(Problem("--row, --longest, --random, --export", what, "keep one"))
    with opened(recipe, overrides) as rows:
        held = rows.parts().get(part)
        if held is None:
            raise RecipeError(Problem("--part", f"the recipe has no rows for {part!r}", "one of train, eval"))
        if export is not None:
            _export(rows, held, export)
            return
        by_place = row is not None and not row.isdecimal()
        shown = _by_place(rows, part, str(row)) if by_place else _kept(held, part, row, longest, at_random)
        if as_json:
            rows.out.write(json_text(_values(rows, shown, side)) + "\n")
        else:
            _show(rows, shown, side, ids=ids)


def _export(rows: Opened, held: Rows, file: Path) -> None:
    try:
        if file.exists():
            raise RecipeError(Problem("--export", f"{file} exists", "name another file, or remove it"))
        rundir.write_jsonl(file, (held.canonical(i) for i in range(len(held))))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"{file} cannot be written: {error.strerror or error}"
        raise RecipeError(Problem("--export", what, "name another file")) from error
    rows.out.write(harmless(f"{len(held):,} rows written to {file}") + "\n")


def _kept(held: Rows, part: str, row: str | None, longest: bool, at_random: bool) -> Shown:
    """A row that is kept, by its number, its length or by chance."""
    if not len(held):
        raise RecipeError(Problem("--part", f"no row of {part} is kept", "alignctl check says why"))
    i = 0 if row is None else int(row) - 1
    if longest:
        i = held.longest()
    if at_random:
        i = random.randrange(len(held))
    if not 0 <= i < len(held):
        what = f"{part} has no row {row}"
        raise RecipeError(Problem("--row", what, f"1 to {len(held):,}, or a place such as {held.place(0)}"))
    return _of(held, part, i)


def _of(held: Rows, part: str, i: int) -> Shown:
    title = f"{part} row {i + 1:,} of {len(held):,}"
    return Shown(title, held.place(i), held.canonical(i), held.encoded(i))


def _by_place(rows: Opened, part: str, place: str) -> Shown:
    """The row at a place in a source, kept or not."""
    from alignctl.formats import Dropped
    from alignctl.train import encode

    data = rows.recipe.data
    i = rows.parts()[part].find(place)
    if i is not None:
        return _of(rows.parts()[part], part, i)
    for source in data.eval if part == "eval" and data.eval else data.train:
        found = encode.look(source, rows.recipe.method, rows.encoder, data, rows.recipe.training.seed, place)
        if found is not None:
            why = found.encoded.reason if isinstance(found.encoded, Dropped) else _ELSEWHERE
            return Shown(f"not in {part}", place, found.canonical or found.raw.values, None, why)
    raise RecipeError(Problem("--row", f"no row of {part} stands at {place}", "a place such as pairs.jsonl:17"))


_ELSEWHERE = "it is held out, its prompt is in the held-out rows, or more than its source's weight"


def _chosen_sides(rows: Opened, shown: Shown, side: str | None) -> dict[str, list[Span]]:
    from alignctl.train import view

    found = view.sides(rows.encoder, shown.ids or {})
    if side is None:
        return found
    if side not in found:
        raise RecipeError(Problem("--side", f"the row has no {side!r}", f"one of {', '.join(found)}"))
    return {side: found[side]}


def _values(rows: Opened, shown: Shown, side: str | None) -> dict[str, Any]:
    out: dict[str, Any] = {"place": shown.place, "canonical": shown.canonical, "dropped": shown.dropped or None}
    if shown.ids is not None:
        found = _chosen_sides(rows, shown, side)
        out["sides"] = {name: [asdict(span) for span in spans] for name, spans in found.items()}
        out["asked_with"] = _asked_with(shown)
    return out | {"stop_ids": list(rows.encoder.stop_ids)}


def _asked_with(shown: Shown) -> list[int]:
    """The ids that generation is asked with: all before the last answer."""
    assert shown.ids is not None
    if "prompt_ids" in shown.ids:
        return shown.ids["prompt_ids"]
    labels = shown.ids["labels"]
    end = len(labels)
    while end and labels[end - 1] != -100:
        end -= 1
    return shown.ids["input_ids"][:end]


def _show(rows: Opened, shown: Shown, side: str | None, *, ids: bool) -> None:
    from rich.text import Text

    from alignctl.train.display import Display

    display = Display(rows.out)
    sides = {} if shown.ids is None else _chosen_sides(rows, shown, side)
    display.say(f"{shown.title}: {shown.place}")
    if shown.ids is None:
        display.say(f"dropped: {shown.dropped}")
        display.say(json_text(shown.canonical))
        return
    colours = display.console.is_terminal and display.console.color_system is not None
    for name, spans in sides.items():
        trained = sum(len(span.ids) for span in spans if span.supervised)
        total = sum(len(span.ids) for span in spans)
        display.say("")
        display.console.print(Text(f"{name}: {trained} of {total} tokens are trained", style="bold"))
        if colours:
            display.console.print(Text("").join(_painted(rows, span) for span in spans), soft_wrap=True)
        else:
            rows.out.write("".join(map(_marked, spans)) + "\n")
        for span in spans if ids else ():
            display.say(f"{'trained' if span.supervised else 'given'} ids: {span.ids}")
    stops = ", ".join(
        f"{token} ({i})" for i, token in zip(rows.encoder.stop_ids, _tokens(rows, rows.encoder.stop_ids), strict=True)
    )
    display.say("")
    display.say(f"the model is asked with the first {len(_asked_with(shown))} tokens, and stops on {stops}")


def _tokens(rows: Opened, ids: tuple[int, ...]) -> list[str]:
    out: list[str] = rows.encoder.tokenizer.convert_ids_to_tokens(list(ids))
    return out


def _marked(span: Span) -> str:
    """A span where there are no colours: what is trained stands between ⟦ ⟧."""
    return f"⟦{harmless(span.text)}⟧" if span.supervised else harmless(span.text)


def _painted(rows: Opened, span: Span) -> Text:
    """A span with its special tokens in magenta and what is trained in green."""
    from rich.text import Text

    out = Text(harmless(span.text), style="underline green" if span.supervised else "")
    out.highlight_regex(rows.encoder.special, "magenta")
    return out
