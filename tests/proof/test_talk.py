"""A chat's lines and what is shown of them, with scripted answers in the place of a model."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.formats import Message
from alignctl.proof.chat import Reply, Session
from alignctl.proof.speaker import Question
from alignctl.proof.talk import Line, Screen, Talk, interruptible


@dataclass
class Scripted:
    """Gives the next of `script`, in pieces of a few characters; more than three messages have no room."""

    script: list[str | Reply | Exception]
    context: int = 99
    asked: list[Sequence[Message]] = field(default_factory=list)

    def question(self, prompt: Sequence[Message]) -> Question:
        return Question(prompt[-3:], max(0, len(prompt) - 3), [])

    def answer(self, by: str, asked: Question, write: Callable[[str], None], stop: threading.Event) -> Reply:
        self.asked.append(asked.messages)
        given = self.script.pop(0)
        if isinstance(given, Exception):
            raise given
        reply = given if isinstance(given, Reply) else Reply(by, given, "stopped")
        for start in range(0, len(reply.text), 3):
            write(reply.text[start : start + 3])
        return reply


@dataclass
class Ran:
    out: str
    err: str
    session: Session
    speaker: Scripted
    pairs: list[dict[str, Any]]


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)

    def run(
        lines: Sequence[str],
        script: list[str | Reply | Exception],
        who: Sequence[str] = ("tuned",),
        *,
        terminal: bool = False,
        system: str = "",
    ) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        session, speaker = Session(system), Scripted(script)
        file = tmp_path / "pairs.jsonl"
        found: Any = speaker
        Talk(session, found, who, Screen(out, err, terminal), file).run(iter([f"{line}\n" for line in lines]))
        pairs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return Ran(out.getvalue(), err.getvalue(), session, speaker, pairs)

    return run


def test_on_a_pipe_stdout_holds_the_answers_alone(talk: Callable[..., Ran]) -> None:
    ran = talk(["Tea?", "", "/again", "/save 2 1", "/help"], ["No.", "\n Yes."])
    assert ran.out == "No.\nYes.\n"
    assert "answer 2 is kept over 1" in ran.err and "/save K R" in ran.err
    assert ran.pairs == [
        {
            "prompt": [{"role": "user", "content": "Tea?"}],
            "chosen": [{"role": "assistant", "content": "\n Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
    ]


def test_two_models_answer_one_after_the_other(talk: Callable[..., Ran]) -> None:
    ran = talk(["Tea?", "/again"], ["No.", "Yes.", "Never.", "Always."], ["base", "tuned"])
    assert ran.out == "[1] base\nNo.\n[2] tuned\nYes.\n[3] base\nNever.\n[4] tuned\nAlways.\n"
    assert ran.session.prompt("")[-2]["content"] == "Always."


def test_the_conversation_goes_on_from_what_was_saved(talk: Callable[..., Ran]) -> None:
    ran = talk(["Tea?", "/save 1 2", "Milk?"], ["No.", "Yes.", "a", "b"], ["base", "tuned"], system="")
    assert [m["content"] for m in ran.speaker.asked[-1]] == ["Tea?", "No.", "Milk?"]


def test_oldest_turns_that_are_left_out_are_said_and_not_saved(talk: Callable[..., Ran]) -> None:
    ran = talk(["a?", "b?", "/again", "/save 1 2"], ["a.", "b.", "c."], system="Be kind.")
    assert "note: the 1 oldest messages are left out; the model takes 99 tokens" in ran.err
    assert [m["content"] for m in ran.pairs[0]["prompt"]] == ["a?", "a.", "b?"]


def test_a_cut_answer_is_said(talk: Callable[..., Ran]) -> None:
    ran = talk(["Tea?", "/again", "/save 1 2"], [Reply("tuned", "Yes, bec", "cut"), "No."])
    assert "answer 1 was cut" in ran.err and "did not end by itself" in ran.err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["/save"], "nothing has been asked"),
        (["Tea?", "/save"], "/again gives another"),
        (["Tea?", "/again", "/save"], "/save KEPT REJECTED, two of 1 to 2"),
        (["/agian"], "did you mean /again?"),
        (["/etc/hosts"], "// begins a question"),
        (["Tea?", "/again", "/save 1 2 no/such/folder.jsonl"], "cannot be written"),
    ],
)
def test_a_mistake_ends_a_script_and_not_a_talk(talk: Callable[..., Ran], lines: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as found:
        talk([*lines, "Milk?"], ["a", "b", "c"])
    assert said in str(found.value)
    ran = talk([*lines, "Milk?"], ["a", "b", "c"], terminal=True)
    assert said in ran.out and ran.speaker.asked[-1][-1]["content"] == "Milk?" and ran.pairs == []


def test_an_answer_that_fails_is_no_turn(talk: Callable[..., Ran]) -> None:
    full = MachineError(Problem("memory", "is full"))
    ran = talk(["Tea?", "Milk?"], [full, "Yes."], terminal=True)
    assert "memory: is full" in ran.out and [turn.question["content"] for turn in ran.session.turns] == ["Milk?"]


def test_commands_change_the_conversation(talk: Callable[..., Ran]) -> None:
    ran = talk(["a?", "/undo", "/system  Be kind. ", "//b?", "/history", "/reset", "c?"], ["a.", "b.", "c."])
    assert [m["content"] for m in ran.speaker.asked[1]] == ["Be kind.", "/b?"]
    assert [m["content"] for m in ran.speaker.asked[2]] == ["Be kind.", "c?"]
    assert "taken back: a?" in ran.err and "system: Be kind.\nuser: /b?\nassistant: b.\n" in ran.out
    assert talk(["/system x", "/system", "a?"], ["a."]).session.system == ""


def test_quit_leaves(talk: Callable[..., Ran]) -> None:
    assert talk(["/quit", "a?"], []).speaker.asked == []


def test_what_a_model_writes_does_not_steer_the_terminal(talk: Callable[..., Ran]) -> None:
    """Sequences come in pieces of three characters."""
    evil = "a\x1b]0;owned\x07b\x1b[31mc\x9b2Jd\re\u202ef"
    ran = talk(["Tea?", "/history"], [evil], terminal=True)
    bare = ran.out.replace("\x1b[1;36m", "").replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert not set(bare) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}
    assert "a�]0;owned�b�[31mc�2Jd�e�f" in bare


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["one ", "two ", "three"], "one two\nthree"),  # 7 of 9 columns, and 6 more
        (["one two ", "t"], "one two t"),  # 9 of 9
        (["a\n", "  b\n\n", "c "], "a\n  b\n\nc"),
        (["longer than ", "nine"], "longer\nthan nine"),
        (["x ", "unbreakable ", "y"], "x\nunbreakable\ny"),
        (["茶茶茶茶 ", "茶"], "茶茶茶茶\n茶"),  # two columns each
    ],
)
def test_lines_break_between_words(pieces: list[str], shown: str) -> None:
    line = Line(9)
    assert "".join(map(line.fit, pieces)) == shown


def test_pairs_are_added_line_by_line(talk: Callable[..., Ran], tmp_path: Path) -> None:
    """Behind a line that someone left without its end, too."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "x"}', encoding="utf-8")
    ran = talk(["Tea?", "/again", "/save 1 2", "/save 2 1"], ["No.", "Ünd."])
    assert len(ran.pairs) == 3 and ran.pairs[2]["chosen"][0]["content"] == "Ünd."


def test_a_pair_that_cannot_be_written_whole_leaves_nothing(
    talk: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(["Tea?", "/again", "/save 1 2"], ["No.", "Yes."])
    before = (tmp_path / "pairs.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="disk is full"):
        talk(["Tea?", "/again", "/save 2 1"], ["No.", "Yes."])
    assert (tmp_path / "pairs.jsonl").read_bytes() == before


def test_ctrl_c_sets_the_event_and_nothing_else() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible(True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGINT) is before
    with interruptible(False) as stop:
        assert signal.getsignal(signal.SIGINT) is before and not stop.is_set()
