"""How long rows are, before a tokenizer is loaded: from an earlier run, from a file, or from the recipe's limit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alignctl import formats, rundir
from alignctl.errors import Problem, RecipeError
from alignctl.formats import Dropped, RowError
from alignctl.formats.preference import best, by_prompt
from alignctl.plan.activations import Batch
from alignctl.recipe import tree
from alignctl.recipe.load import Loaded
from alignctl.recipe.schema import Recipe, Source

CHARACTERS = 4  # of English to a token, roughly
_LOOKED_AT = 100
_MOST = 20_000


@dataclass(frozen=True)
class Row:
    """Tokens of a pair, or of a dialogue, which is all `chosen`."""

    prompt: int
    chosen: int
    rejected: int = 0

    def within(self, limit: int) -> Row:
        """The row as far as `data.max_length` lets it be."""
        prompt = min(self.prompt, limit - 1)
        return Row(prompt, min(self.chosen, limit - prompt), min(self.rejected, limit - prompt))

    @property
    def size(self) -> int:
        return self.prompt + self.chosen + self.rejected


@dataclass(frozen=True)
class Lengths:
    """The longest rows, the longest first; one of mean length; how many there are, where known; and from where."""

    longest: tuple[Row, ...]
    mean: Row
    count: int | None
    source: str


def batch(rows: Sequence[Row], recipe: Recipe, *, packed: bool) -> Batch:
    """What a forward pass over `rows` computes."""
    rows = [row.within(recipe.data.max_length) for row in rows]
    sides = 1 if recipe.method == "sft" else 2
    longest = max(row.prompt + max(row.chosen, row.rejected) for row in rows)
    supervised = sum(row.chosen + row.rejected for row in rows)
    if recipe.orpo is not None and recipe.orpo.nll_on_prompt:
        supervised += sum(row.prompt for row in rows)
    padded = sides * len(rows) * longest
    tokens = sum(row.size for row in rows) if packed else padded
    keys = sum(row.size + (sides - 1) * row.prompt for row in rows) if packed else padded
    return Batch(sides * len(rows), longest, tokens, keys, supervised)


def largest(lengths: Lengths, recipe: Recipe, *, packed: bool) -> Batch:
    """The forward pass over the longest rows, which the gate `memory` tries."""
    size = recipe.training.per_device_train_batch_size
    rows = list(lengths.longest[:size])
    return batch(rows + [rows[-1]] * (size - len(rows)), recipe, packed=packed)


def of(loaded: Loaded, file: Path | None) -> Lengths:
    """What is known of the lengths of a recipe's rows.

    Raises:
        RecipeError: `file` cannot be read as rows.
    """
    if file is not None:
        return _counted([Source(path=str(file))], loaded.recipe)
    return _noted(Path("runs") / loaded.name, loaded) or of_recipe(loaded.recipe)


def of_recipe(recipe: Recipe) -> Lengths:
    """From the recipe's own files where they are at hand, else what is at most."""
    train = recipe.data.train
    if all(source.path.endswith((".jsonl", ".json")) and Path(source.path).is_file() for source in train):
        return _counted(train, recipe)
    return at_most(recipe)


def at_most(recipe: Recipe) -> Lengths:
    """Rows of which nothing is known: all as long as `data.max_length` lets them be, without a prompt to share."""
    limit, sources = recipe.data.max_length, recipe.data.train
    row = Row(0, limit) if recipe.method == "sft" else Row(0, limit, limit)
    taken = [source.take for source in sources]
    count = sum(take for take in taken if take) if all(taken) else None
    return Lengths((row,), row, count, f"data.max_length {limit:,}, since the rows are not at hand: at most")


def _noted(run: Path, loaded: Loaded) -> Lengths | None:
    """From the ledger of an earlier run on the same rows."""
    try:
        ledger = rundir.read_json(run / "ledger.json")["train"]
        if tree.read(run / "recipe.yaml").values["data"] != loaded.resolved()["data"]:
            return None
        tokens = ledger["tokens"]
        names = ("input",) if loaded.recipe.method == "sft" else ("prompt", "chosen", "rejected")
        sides = {p: [int(tokens[name][p]) for name in names] for p in ("p50", "p100")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    longest, middle = (Row(0, *side) if len(side) == 1 else Row(*side) for side in (sides["p100"], sides["p50"]))
    return Lengths((longest,), middle, int(ledger["kept"]), f"{run / 'ledger.json'}: the longest and the median row")


def _counted(sources: Sequence[Source], recipe: Recipe) -> Lengths:
    """Characters of the rows in files, four to a token."""
    rows = [_row(values, recipe) for source in sources for values in _canonical(source, recipe)]
    if not rows:
        raise RecipeError(Problem(sources[0].path, "holds no row that can be trained on", "see `alignctl check`"))
    ordered = sorted(rows, key=lambda row: -row.within(recipe.data.max_length).size)
    parts = zip(*((row.prompt, row.chosen, row.rejected) for row in rows), strict=True)
    mean = Row(*(round(sum(part) / len(rows)) for part in parts))
    more = " (the first ones)" if len(rows) >= _MOST else ""
    what = f"{len(rows):,} rows{more}, estimated as a token for {CHARACTERS} characters"
    return Lengths(tuple(ordered[:256]), mean, len(rows) if not more else None, what)


def _canonical(source: Source, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The rows of one file as messages; what breaks a rule is left out, as it is in training."""
    raw = list(islice(_values(Path(source.path)), min(source.take or _MOST, _MOST)))
    columns: dict[str, str] = {str(ours): theirs for ours, theirs in (source.columns or {}).items()}
    preference = recipe.method != "sft" or source.answer is not None
    try:
        renamed = [formats.renamed(row, columns) for row in raw]
        shape = (
            formats.named(source.format)
            if source.format
            else formats.detect(renamed[:_LOOKED_AT], preference=preference)
        )
    except (RowError, IndexError) as error:
        raise RecipeError(Problem(source.path, f"cannot be read as rows: {error}", "see docs/data.md")) from error
    if shape.per_answer:
        renamed = [dict(row) for _, row in by_prompt(("", row) for row in renamed)]
        shape = formats.named("completions")
    for row in renamed:
        try:
            canonical = formats.read(shape, row)
            if "answers" in canonical:
                canonical = best(canonical, source.rejected, source.tie_margin or 0, "")
            yield dict(formats.chosen_dialogue(canonical) if recipe.method == "sft" and preference else canonical)
        except (RowError, Dropped):
            continue


def _values(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a `.jsonl` file, or in the list of a `.json` file."""
    try:
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text) if file.suffix == ".json" else (json.loads(line) for line in text.split("\n") if line)
        yield from (row for row in rows if isinstance(row, dict))
    except (OSError, ValueError) as error:
        what = f"cannot be read: {error.strerror if isinstance(error, OSError) else error}"
        raise RecipeError(Problem(str(file), what, "give a .jsonl file of rows")) from error


def _row(row: dict[str, Any], recipe: Recipe) -> Row:
    def tokens(column: str) -> int:
        return -(-sum(len(message["content"]) for message in row.get(column, ())) // CHARACTERS)

    if recipe.method == "sft":
        return Row(0, tokens("messages") or -(-len(row.get("text", "")) // CHARACTERS) or 1)
    return Row(tokens("prompt"), tokens("chosen"), tokens("rejected"))
