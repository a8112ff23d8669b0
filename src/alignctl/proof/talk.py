"""A chat in a terminal, or on a pipe: lines in, answers out."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from alignctl import quiet, rundir
from alignctl.errors import AlignctlError, Problem, RecipeError
from alignctl.proof import chat
from alignctl.proof.chat import Reply, Session
from alignctl.proof.speaker import Question, Speaker
from alignctl.terminal import harmless
from alignctl.train.translate import translated


@dataclass
class Line:
    """Breaks text that comes in pieces between words, at `width` columns of a terminal."""

    width: int
    column: int = 0
    blanks: str = ""

    def fit(self, text: str) -> str:
        """`text`; the blanks at its end wait for the next word, which may begin a line."""
        out = ""
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            if part.isspace() and part != "\n":
                self.blanks += part
                continue
            size = cell_len(self.blanks + part)
            if part == "\n" or (self.column and self.column + size > self.width):
                out += "\n" + part.strip()
                self.column = cell_len(part.strip())
            else:
                out += self.blanks + part
                self.column += size
            self.blanks = ""
        return out


class Screen:
    """Answers go to `out`. What is said about them goes there too in a terminal, and to `err` on a pipe."""

    def __init__(self, out: TextIO, err: TextIO, terminal: bool) -> None:
        self.terminal = terminal
        self.out = Console(file=out, highlight=False, soft_wrap=True)
        self.err = self.out if terminal else Console(file=err, highlight=False, soft_wrap=True)
        self._begun, self._line = False, Line(self.out.width)

    def note(self, line: str) -> None:
        """One line about the chat."""
        self.err.print(Text(harmless(line), style="dim"))

    def heading(self, name: str) -> None:
        """Whose answer follows."""
        self.out.print(Text(harmless(name), style="bold cyan"))

    def piece(self, text: str) -> None:
        """The next piece of an answer, without the white space that it may begin with."""
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        self.out.file.write(self._line.fit(harmless(text)) if self.terminal else harmless(text))
        self.out.file.flush()

    def end(self) -> None:
        """Behind an answer."""
        self._begun, self._line = False, Line(self.out.width)
        self.out.print("\n" if self.terminal else "")

    def message(self, role: str, content: str) -> None:
        """A message of the conversation."""
        self.out.print(Text.assemble((f"{role}: ", "bold"), harmless(content)))


class Talk:
    """One chat: `who` answers every question, in that order; pairs go to `file`."""

    def __init__(self, session: Session, speaker: Speaker, who: Sequence[str], screen: Screen, file: Path) -> None:
        self.session, self.speaker, self.who, self.screen, self.file = session, speaker, who, screen, file
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "/again": self._again,
            "/save": self._save,
            "/undo": self._undo,
            "/history": self._history,
            "/system": self._system,
            "/reset": self._reset,
            "/help": self._help,
        }

    def greet(self) -> None:
        """What is talked to."""
        run = self.speaker.run
        self.screen.note(f"{run.run.path}: {run.recipe.method} from {run.start_name}, {run.run.status}")
        self.screen.note("/help lists the commands; Ctrl-D leaves")

    def run(self, lines: Iterator[str]) -> None:
        """Answer `lines` until there are no more, or one says so.

        Raises:
            AlignctlError: something went wrong, and nobody is there to read of it and go on.
        """
        for line in lines:
            if line.strip() == "/quit":
                return
            try:
                with translated():
                    self._line(line.strip())
            except AlignctlError as error:
                if not self.screen.terminal:
                    raise
                self.screen.note(str(error))

    def _line(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, *words = line.split()
            if name not in self._commands:
                near = get_close_matches(name, self._commands, 1)
                way_out = f"did you mean {near[0]}?" if near else "/help lists them; // begins a question with a slash"
                raise RecipeError(Problem(name, "no such command", way_out))
            self._commands[name](words if name != "/system" else [line.removeprefix(name).strip()])
        elif line:
            self._ask(line.removeprefix("/"))

    def _ask(self, text: str) -> None:
        asked = self.speaker.question(self.session.prompt(text))
        if asked.left_out:
            what = f"note: the {asked.left_out} oldest messages are left out"
            self.screen.note(f"{what}; the model takes {self.speaker.context:,} tokens")
        self.session.add(asked.messages, self._answers(asked, 0))

    def _again(self, words: list[str]) -> None:
        turn = self.session.last()
        turn.replies += self._answers(self.speaker.question(turn.asked), len(turn.replies))

    def _answers(self, asked: Question, before: int) -> list[Reply]:
        """An answer of each model; `before` are there already."""
        replies = []
        for number, by in enumerate(self.who, before + 1):
            with interruptible(self.screen.terminal) as stop:
                if self.screen.terminal or len(self.who) > 1:
                    self.screen.heading(f"[{number}] {by}")
                with quiet.libraries(Path(os.devnull)):
                    reply = self.speaker.answer(by, asked, self.screen.piece, stop)
            self.screen.end()
            if reply.end == "cut":
                self.screen.note(f"note: answer {number} was cut at its longest length (--max-new-tokens)")
            replies.append(reply)
        return replies

    def _save(self, words: list[str]) -> None:
        turn = self.session.last()
        kept, rejected = chat.numbers(words, turn)
        row = self.session.pair(kept, rejected)
        file = Path(words[2]) if len(words) > 2 else self.file
        rundir.append_row(file, row)
        self.screen.note(f"answer {kept} is kept over {rejected}: {file}")
        if turn.replies[kept - 1].end != "stopped":
            self.screen.note(f"note: answer {kept} did not end by itself; training will teach to end there")

    def _undo(self, words: list[str]) -> None:
        self.screen.note(f"taken back: {self.session.undo()}")

    def _history(self, words: list[str]) -> None:
        for message in self.session.prompt("")[:-1]:
            self.screen.message(message["role"], message["content"])

    def _system(self, words: list[str]) -> None:
        (self.session.system,) = words
        self.screen.note("from the next question on" if self.session.system else "no system message any more")

    def _reset(self, words: list[str]) -> None:
        self.session.reset()
        self.screen.note("the conversation is forgotten")

    def _help(self, words: list[str]) -> None:
        for command, what in chat.COMMANDS.items():
            self.screen.note(f"{command:<18}{what}")


@contextlib.contextmanager
def interruptible(wanted: bool) -> Iterator[threading.Event]:
    """Inside, Ctrl-C sets the event and does nothing else; on a pipe it ends the command, as everywhere."""
    stop = threading.Event()
    if not wanted:
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
