"""`alignctl init`: a commented recipe from a few answers, flags, or a recipe of another tool."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import typer

from alignctl import quiet, rundir
from alignctl.cli import signals
from alignctl.cli.plan import span
from alignctl.errors import AlignctlError, Interrupted, MachineError, Problem, RecipeError
from alignctl.init import choose, convert, draft, fit
from alignctl.init.facts import Memory, Model, Rows, Wanted
from alignctl.init.fit import Fitted
from alignctl.plan import config, data, duration, estimate, fixes, gpus
from alignctl.plan.estimate import Plan
from alignctl.plan.fixes import Fix
from alignctl.plan.gpus import GIB, Here
from alignctl.recipe.load import Loaded, load
from alignctl.recipe.schema import METHODS
from alignctl.terminal import harmless


@dataclass(frozen=True)
class Asked:
    """The options of `alignctl init`."""

    method: str | None
    model: str | None
    data: str | None
    output: Path | None
    split: str
    eval_data: str | None
    eval_split: str
    adapter: str
    template: str | None
    gpu_memory: str | None


def command(asked: Asked) -> None:
    """Look at model, rows and machine, write the recipe so that it fits, and check it.

    Raises:
        AlignctlError: an option is missing or wrong, the file is there already, the rows cannot be read, or nothing
            makes the recipe fit.
    """
    _known("--method", asked.method, METHODS)
    _known("--adapter", asked.adapter, choose.ADAPTERS)
    asked = _answered(asked) if _at_a_terminal() else asked
    memory = _given_memory(asked.gpu_memory)
    wanted, output = _wanted(asked)
    _free(output)
    with quiet.libraries(Path(os.devnull)) as out:
        notes: list[str] = []
        rows, model, memory = _looked(wanted, memory, notes, out)
        fitted = _fitted(wanted, output, rows, model, memory, notes)
    for line in [*(f"note: {note}" for note in notes), *_outcome(fitted, memory, output)]:
        typer.echo(harmless(line))
    head = choose.head(wanted, fitted.adapter, output)
    with _written(output, draft.text(fitted.draft, head, [])) as written:
        load(written, method=wanted.method)
        if model.template is None:
            typer.echo("note: the rows are not checked, because the tokenizer could not be loaded")
        else:
            from alignctl.cli import check

            check.command(str(written), None, as_json=False, name=str(output))
    typer.echo(f"\nwritten: {output}")
    if fitted.plan is not None and fitted.least > memory.bytes:
        raise _too_large(fitted.plan, memory)
    typer.echo(f"next: alignctl {wanted.method} {output}")


def _looked(wanted: Wanted, memory: Memory | None, notes: list[str], out: TextIO) -> tuple[Rows, Model, Memory]:
    from alignctl.train import look
    from alignctl.train.display import Display

    signals.check()
    with Display(out).waiting(f"looking at {wanted.model} and {wanted.data}"):
        memory = memory or look.memory()
        model = look.model(wanted, notes.append)
        template = str(choose.template(wanted, model).value)
        rows = look.rows(wanted, template, tokenizer=model.template is not None)
    return rows, model, memory


def _fitted(wanted: Wanted, output: Path, rows: Rows, model: Model, memory: Memory, notes: list[str]) -> Fitted:
    """The draft for `output`, planned where the model's config can be had."""
    planned = None
    try:
        adapter = choose.chosen_adapter(wanted, model, memory)
        planned = fit.planner(choose.draft(wanted, rows, model, memory, adapter), rows)
    except AlignctlError as error:
        notes.append(f"not planned: {error.problems[0]}")
    return fit.fitted(_beside(wanted, output), rows, model, memory, planned)


def _outcome(fitted: Fitted, memory: Memory, output: Path) -> list[str]:
    """The plan in a line, and what was changed for it in another."""
    here = Here(memory.what, memory.bytes) if memory.gpu else None
    out = [] if fitted.plan is None else [_planned(fitted.plan, here, output)]
    if fitted.changes:
        before = f"{fitted.drafted / GIB:.1f} GiB were needed"
        out.append(f"changed to fit {memory.size()}, where {before}: {_together(fitted.changes)}")
    return out


def _planned(plan: Plan, here: Here | None, output: Path) -> str:
    needed = f"{plan.memory.needed / GIB:.1f} GiB at the peak"
    if here is None:
        return f"plan: {needed} on a GPU; `alignctl plan {output} --gpu-memory 24GiB` says more"
    size = f"{round(here.memory / GIB, 1):g} GiB"
    if plan.memory.needed > here.memory:
        return f"plan: {needed}, which does not fit {size}"
    return f"plan: {needed}, which fits {size}{_time(plan, here)}"


def _time(plan: Plan, here: Here) -> str:
    """How long the run takes on such a GPU: on the fastest and the slowest of that size."""
    if plan.passes is None:
        return ""
    times = sorted((duration.seconds(plan.work, gpu) * plan.passes, gpu.name) for gpu in gpus.like(here))
    ends = dict.fromkeys((times[0], times[-1])) if times else {}
    said = " to ".join(f"{span(seconds)} ({name})" for seconds, name in ends)
    return f"; the run takes about {said}" if said else ""


def _too_large(plan: Plan, memory: Memory) -> MachineError:
    """What is said of a recipe that was written all the same."""
    what = f"{plan.memory.needed / GIB:.1f} GiB are needed, and {memory.what} has {memory.size()}"
    changes = plan.fixes(memory.bytes)
    least = changes[-1].needed if changes else plan.memory.needed
    if least <= memory.bytes:
        way_out = "another --adapter, shorter rows, or a GPU with more memory"
        return MachineError(Problem("memory", f"{what}; it fits only with {_together(changes)}", way_out))
    what = f"{what}; no change is enough ({least / GIB:.1f} GiB at least)"
    return MachineError(Problem("memory", what, "a smaller model, or a GPU with more memory"))


def _together(changes: Sequence[Fix]) -> Fix:
    return replace(changes[-1], changes=fixes.together(list(changes)))


def from_other(
    path: Path, dialect: str | None, method: str | None, output: Path | None, gpu_memory: str | None
) -> None:
    """Write the recipe that `path`, a recipe of another tool, means here, and say what became of each key.

    Raises:
        RecipeError: the file cannot be read, or trains what alignctl does not.
    """
    _known("--method", method, METHODS)
    _known("--dialect", dialect, convert.DIALECTS)
    found = convert.convert(path, dialect, method)
    output = output or Path(f"{path.stem}-{found.method}.yaml")
    _free(output)
    template = output.with_suffix(".jinja")
    if found.template is not None:
        _free(template)
        found.draft["model"]["chat_template"] = replace(found.draft["model"]["chat_template"], value=template.name)
    text = draft.text(found.draft, found.head(path, output), found.tail(path))
    here = gpus.found() if gpu_memory is None else Here("", gpus.amount(gpu_memory))
    with _beside_it(template, found.template), _written(output, text) as written:
        line = _plan_of(convert.accepted(written, found.method, path), here, output)
    for key, what in found.carried:
        typer.echo(harmless(f"✓ {key} → {what}"))
    for key, why in found.left.items():
        typer.echo(harmless(f"– {key}: not carried over: {why}"))
    typer.echo(harmless(line))
    typer.echo(f"\nwritten: {output} (from {found.dialect})\nnext: alignctl check {output}")


def _plan_of(loaded: Loaded, here: Here | None, output: Path) -> str:
    """The plan of a recipe that stays as it is."""
    try:
        plan = estimate.of(loaded.recipe, config.shape_of(loaded.recipe.model, fetch=False), data.of(loaded, None))
    except AlignctlError as error:
        return f"note: not planned: {error.problems[0]}"
    line = _planned(plan, here, output)
    if here is None or plan.memory.needed <= here.memory:
        return line
    return f"{line}; `alignctl plan {output} --gpu-memory {here.memory / GIB:.4g}GiB` says what to change"


def contradiction(options: dict[str, str | None]) -> RecipeError:
    """What is said of options that are given beside `--from`."""
    given = " and ".join(name for name, value in options.items() if value is not None)
    return RecipeError(
        Problem(given, "and --from contradict each other", "the other recipe says it; change the new one")
    )


def _at_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _answered(asked: Asked) -> Asked:
    """`asked` with the answers to what it leaves open."""
    from rich.console import Console
    from rich.prompt import Prompt

    console = Console()
    try:
        method = asked.method or Prompt.ask("Method", choices=list(METHODS), default="dpo", console=console)
        model = asked.model or _ask("Model (a hub name or a folder)")
        data = asked.data or _ask("Training rows (a file, a folder or a hub name)")
        gpu_memory = asked.gpu_memory or _ask("GPU memory, such as 24GiB (empty: this machine's)", needed=False)
        default = str(asked.output or _default_output(str(method), str(model)))
        output = asked.output or Path(str(Prompt.ask("Recipe", default=default, console=console)))
    except EOFError as error:
        raise RecipeError(Problem("init", "the input ended before the last answer", "give the options")) from error
    return replace(asked, method=method, model=model, data=data, gpu_memory=gpu_memory, output=output)


def _ask(what: str, *, needed: bool = True) -> str | None:
    from rich.prompt import Prompt

    while not (answer := Prompt.ask(what, default="", show_default=False).strip()) and needed:
        continue
    return answer or None


def _wanted(asked: Asked) -> tuple[Wanted, Path]:
    """What is asked for, and the file.

    Raises:
        RecipeError: with one problem for each missing option.
    """
    needed = {
        "--method": (asked.method, f"one of {', '.join(METHODS)}"),
        "--model": (asked.model, "a hub name, or a model's folder"),
        "--data": (asked.data, "a file, a folder or a hub name"),
    }
    missing = [Problem(name, "is missing", f"give {what}") for name, (value, what) in needed.items() if not value]
    if missing or asked.method is None or asked.model is None or asked.data is None:
        raise RecipeError(*missing)
    wanted = Wanted(
        asked.method,
        asked.model,
        asked.data,
        asked.split,
        asked.eval_data,
        asked.eval_split,
        asked.adapter,
        asked.template,
    )
    return wanted, asked.output or _default_output(asked.method, asked.model)


def _default_output(method: str, model: str) -> Path:
    name = Path(model.removeprefix("pypi:").partition("==")[0]).name or "model"
    return Path(f"{name.lower()}-{method}.yaml")


def _beside(wanted: Wanted, output: Path) -> Wanted:
    """`wanted` with its local rows as the recipe in `output` finds them."""

    def seen(path: str | None) -> str | None:
        if path is None or Path(path).is_absolute() or not Path(path).exists():
            return path
        return os.path.relpath(path, output.parent)

    return replace(wanted, data=seen(wanted.data) or wanted.data, eval_data=seen(wanted.eval_data))


def _known(option: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise RecipeError(Problem(option, f"is {value!r}", f"one of {', '.join(known)}"))


def _given_memory(text: str | None) -> Memory | None:
    if text is None:
        return None
    return Memory(gpus.amount(text) / GIB, "the GPU", gpu=True)


def _free(path: Path) -> None:
    """Nothing is overwritten."""
    if path.exists():
        raise RecipeError(Problem(str(path), "exists already", "--output FILE with another name"))
    if not path.parent.is_dir():
        raise RecipeError(Problem(str(path), "its folder does not exist", "make it, or name another"))


@contextlib.contextmanager
def _written(path: Path, text: str) -> Iterator[Path]:
    """A file beside `path` with `text`, which gets its name at the end.

    What is wrong with the rows does not take the recipe away: it is where that is mended.
    """
    beside = path.with_name(f".{path.name}")
    try:
        rundir.write_text(beside, text)
    except OSError as error:
        raise RecipeError(Problem(str(path), f"cannot be written: {error.strerror}", "another place")) from error
    try:
        yield beside
    except AlignctlError as error:
        if not isinstance(error, RecipeError):
            _named(beside, path)
            typer.echo(f"written: {path}, but it does not pass `alignctl check` yet")
        raise
    else:
        _named(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _named(beside: Path, path: Path) -> None:
    _free(path)
    beside.rename(path)


@contextlib.contextmanager
def _beside_it(path: Path, text: str | None) -> Iterator[None]:
    """The template in `path`, taken away again when the recipe is not written."""
    if text is not None:
        rundir.write_text(path, text)
    try:
        yield
    except (Exception, Interrupted):
        if text is not None:
            path.unlink(missing_ok=True)
        raise
