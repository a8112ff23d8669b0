"""`alignctl chat`: talk to what a run trained, and keep preference pairs."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from alignctl import quiet
from alignctl.cli import signals
from alignctl.errors import Interrupted, Problem, RecipeError

if TYPE_CHECKING:
    from alignctl.proof.speaker import Speaker


def command(
    folder: Path,
    *,
    base: bool,
    compare: bool,
    system: str,
    temperature: float,
    max_new_tokens: int,
    seed: int | None,
    save: Path | None,
) -> None:
    """Load the run in `folder`, and talk until the input ends.

    Raises:
        RecipeError: it is no run with a model, options contradict each other, or the pairs' file cannot be one.
    """
    if base and compare:
        raise RecipeError(Problem("--base", "and --compare contradict each other", "keep one of them"))
    if save is not None and (save.is_dir() or not save.absolute().parent.is_dir()):
        raise RecipeError(Problem("--save", f"{save} cannot be a file", "name one in a folder that exists"))
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with _own(1, sys.stdout) as out, _own(2, sys.stderr) as err:
        speaker = _load(folder, out if terminal else err, temperature, max_new_tokens, seed, start=base or compare)
        from alignctl.proof.chat import Session
        from alignctl.proof.speaker import BASE, TUNED
        from alignctl.proof.talk import Screen, Talk

        who = (BASE, TUNED) if compare else (BASE,) if base else (TUNED,)
        talk = Talk(Session(system), speaker, who, Screen(out, err, terminal), save or folder / "preferences.jsonl")
        if terminal:
            talk.greet()
        talk.run(_typed() if terminal else _piped())


def _load(
    folder: Path, shown: TextIO, temperature: float, max_new_tokens: int, seed: int | None, *, start: bool
) -> Speaker:
    """The run's models; `shown` gets a line, or a spinner, meanwhile."""
    with quiet.libraries(Path(os.devnull)):
        from transformers import set_seed

        from alignctl.proof import trained
        from alignctl.proof.speaker import Speaker
        from alignctl.train.display import Display
        from alignctl.train.translate import refused, translated

        signals.check()
        run = trained.opened(folder)
        with Display(shown).waiting(f"loading {folder}"), translated(), refused():
            models = run.load(start=start)
        if seed is not None:
            set_seed(seed)
        return Speaker(run, models, temperature, max_new_tokens)


@contextlib.contextmanager
def _own(descriptor: int, like: TextIO) -> Iterator[TextIO]:
    """A stream to where `descriptor` leads now, wherever the libraries' output is turned later."""
    with os.fdopen(os.dup(descriptor), "w", encoding=like.encoding, errors="replace") as own:
        yield own


def _typed() -> Iterator[str]:
    """Lines of a terminal, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (the keys that edit a line, and earlier lines)
    _forgiving()
    while True:
        try:
            line = input("> ")
        except (EOFError, Interrupted) as ended:
            if isinstance(ended, Interrupted) and ended.exit_code != 128 + signal.SIGINT:
                raise
            print()
            return
        yield line


def _piped() -> Iterator[str]:
    _forgiving()
    yield from sys.stdin


def _forgiving() -> None:
    """What is no text is replaced, not an error."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
