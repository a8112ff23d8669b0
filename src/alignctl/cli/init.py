"""`alignctl init`: a commented recipe from a few answers, flags, or a recipe of another tool."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import typer

from alignctl import quiet, rundir
from alignctl.cli import signals
from alignctl.errors import AlignctlError, Interrupted, Problem, RecipeError
from alignctl.init import choose, convert, draft, facts
from alignctl.init.facts import Memory, Model, Rows, Wanted
from alignctl.recipe.load import load
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
    """Look at model, rows and machine, write the recipe, and check it.

    Raises:
        AlignctlError: an option is missing or wrong, the file is there already, or the rows cannot be read.
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
    for note in notes:
        typer.echo(f"note: {harmless(note)}")
    recipe = choose.draft(_beside(wanted, output), rows, model, memory)
    head = choose.head(wanted, model, memory, output)
    with _written(output, draft.text(recipe, head, [])) as written:
        load(written, method=wanted.method)
        if model.template is None:
            typer.echo("note: the rows are not checked, because the tokenizer could not be loaded")
        else:
            from alignctl.cli import check

            check.command(str(written), None, as_json=False, name=str(output))
    typer.echo(f"\nwritten: {output}\nnext: alignctl {wanted.method} {output}")


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


def from_other(path: Path, dialect: str | None, method: str | None, output: Path | None) -> None:
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
    with _beside_it(template, found.template), _written(output, text) as written:
        convert.accepted(written, found.method, path)
    for key, what in found.carried:
        typer.echo(harmless(f"✓ {key} → {what}"))
    for key, why in found.left.items():
        typer.echo(harmless(f"– {key}: not carried over: {why}"))
    typer.echo(f"\nwritten: {output} (from {found.dialect})\nnext: alignctl check {output}")


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
    gib = facts.gib(text)
    if gib is None:
        raise RecipeError(Problem("--gpu-memory", f"is {text!r}", "a size such as 24GiB"))
    return Memory(gib, "the GPU", gpu=True)


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
