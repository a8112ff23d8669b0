"""A conversation with the models of a run: what was asked, the numbered answers, and the pairs made of them.

Nothing here knows a model or a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from alignctl.errors import Problem, RecipeError
from alignctl.formats import Canonical, Message

COMMANDS = {
    "/again": "another answer to the last question",
    "/save K R [FILE]": "keep answer K over answer R: a preference pair for alignctl dpo",
    "/undo": "take the last question back",
    "/history": "the conversation so far",
    "/system [TEXT]": "set the system message, or take it away",
    "/reset": "forget the conversation; the system message stays",
    "/help": "this list",
    "/quit": "leave, like Ctrl-D; Ctrl-C stops an answer",
}


@dataclass(frozen=True)
class Reply:
    """An answer: whose it is, its text, and whether it ended by itself, at the longest length, or by Ctrl-C."""

    by: str
    text: str
    end: Literal["stopped", "cut", "interrupted"]


@dataclass
class Turn:
    """A question as the models saw it, with all that came before, and the answers to it.

    The conversation goes on from `replies[kept]`.
    """

    asked: Sequence[Message]
    replies: list[Reply]
    kept: int = -1

    @property
    def question(self) -> Message:
        return self.asked[-1]

    @property
    def answer(self) -> Message:
        return _said(self.replies[self.kept])


@dataclass
class Session:
    """The state of a chat."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, question: str) -> list[Message]:
        """The conversation so far with `question` at its end."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        before = [message for turn in self.turns for message in (turn.question, turn.answer)]
        return [*system, *before, {"role": "user", "content": question}]

    def add(self, asked: Sequence[Message], replies: list[Reply]) -> None:
        """A question was asked and answered."""
        self.turns.append(Turn(asked, replies))

    def last(self) -> Turn:
        """The last question.

        Raises:
            RecipeError: there is none.
        """
        if not self.turns:
            raise RecipeError(Problem("chat", "nothing has been asked yet", "type a question"))
        return self.turns[-1]

    def undo(self) -> str:
        """Take the last question back.

        Raises:
            RecipeError: there is none.
        """
        self.last()
        return self.turns.pop().question["content"]

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def pair(self, kept: int, rejected: int) -> Canonical:
        """The last question as a preference row; answers count from 1. The conversation goes on from the kept one.

        Raises:
            RecipeError: there are no two different answers of those numbers.
        """
        turn = self.last()
        texts = [_text(turn, number) for number in (kept, rejected)]
        if texts[0] == texts[1]:
            raise RecipeError(Problem("/save", f"answers {kept} and {rejected} are the same", "/again gives another"))
        turn.kept = kept - 1
        chosen, other = (_said(turn.replies[number - 1]) for number in (kept, rejected))
        return {"prompt": list(turn.asked), "chosen": [chosen], "rejected": [other]}


def numbers(words: Sequence[str], turn: Turn) -> tuple[int, int]:
    """The answers to keep and to reject that `words` name; never guessed.

    Raises:
        RecipeError: they do not say.
    """
    if len(turn.replies) < 2:
        raise RecipeError(Problem("/save", "a pair needs two answers", "/again gives another"))
    if len(words) < 2 or not all(word.isdecimal() for word in words[:2]):
        way_out = f"/save KEPT REJECTED, two of 1 to {len(turn.replies)}"
        raise RecipeError(Problem("/save", "must be told which answer is kept, and which is rejected", way_out))
    return int(words[0]), int(words[1])


def _said(reply: Reply) -> Message:
    return {"role": "assistant", "content": reply.text}


def _text(turn: Turn, number: int) -> str:
    count = len(turn.replies)
    if not 1 <= number <= count:
        raise RecipeError(Problem("/save", f"there is no answer {number}", f"they are numbered 1 to {count}"))
    text = turn.replies[number - 1].text.strip()
    if not text:
        raise RecipeError(Problem("/save", f"answer {number} is empty", "training would leave the pair out"))
    return text
