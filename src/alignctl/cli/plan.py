"""`alignctl plan`: what a recipe takes, before anything is downloaded."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import typer

from alignctl import quiet
from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.plan import config, data, estimate, fixes, gpus
from alignctl.plan.duration import seconds
from alignctl.plan.estimate import Plan
from alignctl.plan.fixes import Fix
from alignctl.plan.gpus import GIB, Here
from alignctl.plan.memory import Line, total
from alignctl.recipe import catalog, tree
from alignctl.recipe.load import Loaded, load
from alignctl.rundir import write_text
from alignctl.terminal import as_json as json_text
from alignctl.terminal import harmless

# Without a GPU to plan for, these GiB are looked at.
USUAL = (8, 12, 16, 24, 48, 80)
# Lines below this many bytes are counted, and not shown.
SMALL = GIB // 200


def command(
    name: str,
    overrides: list[str] | None,
    *,
    gpu_memory: str | None,
    rows: Path | None,
    fix: bool,
    as_json: bool,
    measure: bool,
) -> None:
    """Print the plan; a run that does not fit the memory given ends it with exit code 4."""
    here = gpus.found() if gpu_memory is None else Here("", gpus.amount(gpu_memory))
    path = catalog.find(name)
    loaded = load(path, overrides)
    plan = estimate.of(loaded.recipe, config.shape_of(loaded.recipe.model), data.of(loaded, rows))
    changes = plan.fixes(here.memory) if here is not None else []
    if as_json:
        measured = _measured(loaded, shown=False) if measure else None
        typer.echo(json_text(_values(plan, here, changes) | {"measured": measured}))
    else:
        _show(loaded.name, plan, here, changes)
        if measure:
            _show_measured(plan, _measured(loaded, shown=True))
    if here is not None and plan.memory.needed > here.memory:
        _way_out(loaded, path, plan, here, changes, write=fix)
    elif fix and here is None:
        raise RecipeError(Problem("--fix", "no GPU is here to fit", "say which with --gpu-memory 24GiB"))


def _way_out(loaded: Loaded, path: Path, plan: Plan, here: Here, changes: list[Fix], *, write: bool) -> None:
    """Write the recipe that fits, or end with what to change."""
    what = f"{plan.memory.needed / GIB:.1f} GiB are needed, and there are {here.memory / GIB:.1f}"
    least = changes[-1].needed if changes else plan.memory.needed
    if least > here.memory:
        way_out = "a smaller model, or a GPU with more memory"
        raise MachineError(Problem("memory", f"{what}; no change is enough ({least / GIB:.1f} GiB at least)", way_out))
    if not write:
        way_out = f"{' '.join(map(str, changes))}; --fix writes a recipe with that"
        raise MachineError(Problem("memory", what, way_out))
    target = _beside(path, here)
    if target.exists():
        raise RecipeError(Problem("--fix", f"{target} exists", "move it away, or remove it"))
    values = fixes.changed_by(loaded.recipe, fixes.together(changes))
    fixed = Loaded(values, loaded.name, loaded.secrets)
    head = f"# {loaded.name}, changed to fit {here.memory / GIB:g} GiB: {' '.join(map(str, changes))}\n"
    try:
        write_text(target, head + tree.dump(fixed.resolved()))
    except OSError as error:
        what = f"{target} cannot be written: {error.strerror or error}"
        raise RecipeError(Problem("--fix", what, "copy the recipe to another place")) from error
    typer.echo(harmless(f"\nwritten: {target}"))


def _beside(path: Path, here: Here) -> Path:
    """The new recipe's place: beside its own, or here when that is a built-in one."""
    folder = Path() if path.parent == catalog.folder() else path.parent
    return folder / f"{path.stem}-{round(here.memory / GIB)}gib.yaml"


def _show(name: str, plan: Plan, here: Here | None, changes: list[Fix]) -> None:
    batch, memory = plan.batch, plan.memory
    say = [
        f"{name}: {_what(plan)}",
        f"largest batch: {_count(plan)}, {batch.tokens:,} tokens computed, {batch.supervised:,} projected",
        f"lengths: {plan.lengths.source}",
        *(f"note: {note}" for note in plan.notes),
        "",
        f"  GiB  at the peak, which is in: {memory.phase}",
        *(_line(line) for line in memory.lines if line.bytes > SMALL),
        _line(Line("tensors", memory.allocated)),
        *map(_line, memory.around),
        _line(Line("needed", memory.needed)),
    ]
    if memory.host:
        say.append(
            f"and {memory.host / GIB:.2f} of optimizer state in paged memory, which moves to the host when it must"
        )
    say += ["", *_verdicts(plan, here, changes), "", *_times(plan, here)]
    typer.echo(harmless("\n".join(say)))


def _what(plan: Plan) -> str:
    trained = f"an adapter of r {plan.setup.rank}" if plan.setup.adapts else "all weights"
    how = " on 4-bit weights" if plan.setup.trains == "adapter on 4 bits" else ""
    recipe = plan.recipe
    return f"{recipe.method} of {recipe.model.name_or_path}, {plan.shape.parameters():,} parameters, {trained}{how}"


def _count(plan: Plan) -> str:
    size = plan.recipe.training.per_device_train_batch_size
    what = "row" if plan.recipe.method == "sft" else "pair"
    return f"{size} {what}{'' if size == 1 else 's'} of at most {plan.batch.longest:,} tokens a side"


def _line(line: Line) -> str:
    return f"{line.bytes / GIB:5.2f}  {line.name}"


def _verdicts(plan: Plan, here: Here | None, changes: list[Fix]) -> list[str]:
    if here is None:
        fitting = [size for size in USUAL if plan.memory.needed <= size * GIB]
        cells = [f"{size} GiB {'yes' if size in fitting else 'no'}" for size in USUAL]
        return [f"fits: {', '.join(cells)}  (no GPU is here; --gpu-memory says which, and what to change)"]
    given = f"{here.memory / GIB:.1f} GiB{f' of {here.name}' if here.name else ''}"
    if plan.memory.needed <= here.memory:
        return [f"fits {given}, with {(here.memory - plan.memory.needed) / GIB:.1f} GiB to spare"]
    out = [f"does not fit {given}; in order of least harm, each with those before it:"]
    return out + [f"{fix.needed / GIB:5.2f}  {fix}  ({fix.cost})" for fix in changes]


def _times(plan: Plan, here: Here | None) -> list[str]:
    """A pass, a step and the whole run on a few GPUs."""
    shown = gpus.like(here)
    steps = plan.recipe.training.gradient_accumulation_steps
    out = [f"{plan.work.total / 1e12:,.1f} TFLOP a pass: " + ", ".join(_shares(plan))]
    for gpu in shown:
        one = seconds(plan.work, gpu)
        whole = f", the run {span(one * plan.passes)}" if plan.passes is not None else ""
        how = "measured" if gpu.efficiency else "assumed"
        share = gpu.efficiency or gpus.ASSUMED
        out.append(f"{gpu.name}: a step {span(one * steps)}{whole} ({share:.0%} of {gpu.rate:g} TFLOP/s, {how})")
    return out


def _shares(plan: Plan) -> list[str]:
    return [f"{name} {value / plan.work.total:.0%}" for name, value in plan.work.parts.items()]


def span(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 0.95:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _values(plan: Plan, here: Here | None, changes: list[Fix]) -> dict[str, Any]:
    memory = plan.memory
    return {
        "model": plan.recipe.model.name_or_path,
        "model_type": plan.shape.model_type,
        "parameters": plan.shape.parameters(),
        "batch": vars(plan.batch),
        "lengths": plan.lengths.source,
        "notes": plan.notes,
        "phase": memory.phase,
        "phases": {name: total(lines) for name, lines in memory.phases.items()},
        "lines": [vars(line) for line in (*memory.lines, *memory.around)],
        "allocated_bytes": memory.allocated,
        "needed_bytes": memory.needed,
        "host_bytes": memory.host,
        "gpu": None if here is None else vars(here),
        "fits": None if here is None else memory.needed <= here.memory,
        "fixes": [{"changes": fix.changes, "cost": fix.cost, "needed_bytes": fix.needed} for fix in changes],
        "flop": {**plan.work.parts, "total": plan.work.total},
        "passes": plan.passes,
        "seconds_per_pass": {gpu.name: seconds(plan.work, gpu) for gpu in gpus.GPUS},
    }


def _measured(loaded: Loaded, *, shown: bool) -> dict[str, float]:
    """Three steps of the recipe, timed, in a folder that is gone afterwards; `shown` with what a run shows."""
    with tempfile.TemporaryDirectory() as scratch, quiet.libraries(Path(os.devnull)) as out:
        from alignctl.train import measure
        from alignctl.train.display import Display

        return measure.three_steps(loaded, Path(scratch) / "run", Display(out if shown else io.StringIO()))


def _show_measured(plan: Plan, measured: dict[str, float]) -> None:
    """Beside what was planned."""
    step = measured["seconds_per_step"]
    steps = plan.recipe.training.gradient_accumulation_steps
    whole = f", the run {span(step * plan.passes / steps)}" if plan.passes is not None else ""
    peak = f"peak {measured['peak_gib']:.2f} GiB, and {plan.memory.allocated / GIB:.2f} were planned"
    typer.echo(
        f"measured: a step {span(step)}{whole}; {peak}{'' if measured['cuda'] else ' for a GPU, which is not here'}"
    )
