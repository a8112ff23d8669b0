"""A new recipe and the memory that it is for: its plan, and what is changed until it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile

from alignctl.init import choose
from alignctl.init.draft import Choice, Draft, values
from alignctl.init.facts import GIB, Memory, Model, Rows, Wanted
from alignctl.plan import config, data, estimate
from alignctl.plan.estimate import Plan
from alignctl.plan.fixes import Fix
from alignctl.recipe.schema import Recipe

Planner = Callable[[Draft], Plan]
# Of the rows: what a shorter `data.max_length` may drop.
MOST_DROPPED = 0.5


@dataclass(frozen=True)
class Fitted:
    """A draft, what it trains, and its plan where there is one.

    Attributes:
        changes: those that made it fit; they are in `draft` and `plan`.
        least: bytes with every change that may be made.
        drafted: bytes without any.
    """

    draft: Draft
    adapter: Choice
    plan: Plan | None = None
    changes: tuple[Fix, ...] = ()
    least: int = 0
    drafted: int = 0


def planner(drafted: Draft, rows: Rows) -> Planner:
    """What plans drafts for the same model and rows as `drafted`, whose paths are seen from here.

    Rows are as long as they were counted, or as `alignctl plan` estimates where that takes more: it is to agree.

    Raises:
        AlignctlError: the config of the model is not at hand, or it or the rows cannot be read.
    """
    recipe = Recipe.model_validate(values(drafted))
    shape, lengths = config.shape_of(recipe.model, fetch=False), [data.of_recipe(recipe)]
    lengths += [rows.lengths] if rows.lengths is not None else []
    most = max(lengths, key=lambda each: estimate.of(recipe, shape, each).memory.needed)
    return lambda draft: estimate.of(Recipe.model_validate(values(draft)), shape, most)


def fitted(wanted: Wanted, rows: Rows, model: Model, memory: Memory, planned: Planner | None) -> Fitted:
    """The draft that fits a GPU with the least harm; by the size of the weights where there is no plan or no GPU."""
    adapter = choose.chosen_adapter(wanted, model, memory)
    if planned is None or not memory.gpu:
        draft = choose.draft(wanted, rows, model, memory, adapter)
        return Fitted(draft, adapter, planned and planned(draft))

    def within(adapter: Choice) -> Fitted:
        return _changed(choose.draft(wanted, rows, model, memory, adapter), adapter, rows, memory, planned)

    if wanted.adapter != "auto":
        return within(adapter)
    plain = within(Choice("lora", f"{memory.size()} are enough without 4 bits"))
    if plain.least <= memory.bytes:
        return plain
    return within(Choice("qlora", f"{memory.size()}: {plain.least / GIB:.1f} GiB would be needed without, at least"))


def _changed(draft: Draft, adapter: Choice, rows: Rows, memory: Memory, planned: Planner) -> Fitted:
    """`draft` with the changes that make it fit; as it is where they do not."""

    def may(fix: Fix) -> bool:
        sections = "lora" in fix.changes or "quantization" in fix.changes  # another adapter is another draft
        return not sections and rows.over(fix.changes.get("data.max_length", rows.tokens[-1])) <= MOST_DROPPED

    plan = planned(draft)
    drafted = plan.memory.needed
    changes = tuple(takewhile(may, plan.fixes(memory.bytes)))
    least = changes[-1].needed if changes else drafted
    if least > memory.bytes or not changes:
        return Fitted(draft, adapter, plan, (), least, drafted)
    draft = _with(draft, changes, drafted, rows, memory)
    return Fitted(draft, adapter, planned(draft), changes, least, drafted)


def _with(draft: Draft, changes: tuple[Fix, ...], needed: int, rows: Rows, memory: Memory) -> Draft:
    """`draft` with `changes`, each with what was `needed` before it."""
    out = {section: dict(choices) for section, choices in draft.items()}
    for fix in changes:
        for number, (dotted, value) in enumerate(fix.changes.items()):
            section, _, key = dotted.partition(".")
            before = out[section].get(key)
            without = f"with {before.value}" if before else "without"
            why = f"{memory.size()}: {needed / GIB:.1f} GiB would be needed {without}; {fix.cost}"
            out[section][key] = replace(before, value=value) if number and before else Choice(value, why)
        needed = fix.needed
    return out | {"data": out["data"] | choose.dropped(rows, out["data"]["max_length"].value)}
