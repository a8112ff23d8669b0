"""`alignctl chat` as it is typed: on a pipe and in a terminal, and what `alignctl dpo` makes of the pairs."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alignctl.recipe.schema import Source
from alignctl.train import encode, sources

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def chat(here: Run, finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Chat with a finished run; `said` is what stands on the pipe."""
    monkeypatch.chdir(tmp_path)

    def run(said: str, *options: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        return here("chat", str(finished("dpo")), "--max-new-tokens", "8", *options)

    return run


def test_a_pipe_gets_answers_and_nothing_else(chat: Run) -> None:
    done = chat("Say 3 and tea.\n", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "loading" not in done.stdout and "\x1b" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[0].startswith("loading")
    both = chat("Say 3 and tea.\n", "--temperature", "0", "--compare").stdout
    assert both.startswith("[1] base\n") and both.endswith("[2] tuned\n" + done.stdout)
    base = chat("Say 3 and tea.\n", "--temperature", "0", "--base").stdout
    assert both == f"[1] base\n{base}[2] tuned\n{done.stdout}"


def test_a_seed_is_kept(chat: Run) -> None:
    first, again, other = (
        chat("Say 3 and tea.\n/again\n", "--temperature", "3", "--seed", seed).stdout for seed in ("7", "7", "8")
    )
    assert first == again != other


def test_saved_pairs_are_read_and_trained_on(
    chat: Run, here: Run, finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    said = "".join(f"Say {i} and tea.\n/save 2 1\n" for i in range(4))
    done = chat(said, "--compare", "--seed", "1", "--temperature", "2", "--system", "Be kind.", "--save", "mine.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [len(row["prompt"]) for row in rows] == [2, 4, 6, 8] and rows[0].keys() == {"prompt", "chosen", "rejected"}
    shape, read, _ = encode.shaped(Source(path="mine.jsonl"), "dpo", sources.read(Source(path="mine.jsonl")))
    assert shape.name == "conversational" and [shape.read(raw.values) for raw in read] == rows
    recipe = yaml.safe_load((finished("dpo") / "recipe.yaml").read_text())
    recipe["data"] = {"train": [{"path": "mine.jsonl"}]}
    recipe["training"]["max_steps"] = 1
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    trained = here("dpo", "mine.yaml")
    assert trained.returncode == 0, trained.stderr
    ledger = json.loads((tmp_path / "runs/mine/ledger.json").read_text())["train"]
    assert (ledger["rows"], ledger["kept"]) == (4, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base", "--compare"], "contradict each other"),
        (["--save", "no/such/file.jsonl"], "cannot be a file"),
        (["--temperature", "-1"], "--temperature"),
    ],
)
def test_options_that_make_no_sense(chat: Run, options: list[str], said: str) -> None:
    done = chat("", *options)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


def test_a_folder_without_a_run(here: Run, tmp_path: Path) -> None:
    done = here("chat", str(tmp_path))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(
        "is no run — give the folder that --output named"
    )


def test_a_mistake_on_a_pipe_is_the_exit_code(chat: Run) -> None:
    done = chat("/svae 1 2\nSay 3 and tea.\n")
    assert done.returncode == 2 and "did you mean /save?" in done.stderr and done.stdout == ""


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
            os.execv(sys.executable, [sys.executable, "-m", "alignctl", *arguments])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def until(self, text: str, seconds: float = 120) -> str:
        """What is shown until `text` is, and behind it nothing yet."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.end], [], [], 1)[0]:
                self.seen += os.read(self.end, 65536).decode(errors="replace")
        shown, self.seen = self.seen.split(text, 1)
        return shown

    def leave(self, key: str) -> int:
        """The exit code after `key`; readline sees a signal that came before it waited only with the next key."""
        for _ in range(6):
            self.type(key)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.1)
        raise AssertionError(f"{key!r} does not leave")


def test_ctrl_c_stops_an_answer_and_then_the_chat(finished: Callable[..., Path]) -> None:
    """Greedy, the tiny model repeats itself and never ends."""
    shown = Terminal("chat", str(finished("dpo")), "--max-new-tokens", "100000", "--temperature", "0")
    shown.until("\n> ")
    shown.type("Say 3 and tea.\n")
    shown.until("[1] tuned")
    shown.type("\x03")
    shown.until("\n> ")
    shown.type("/history\n")
    assert "Say 3 and tea." in shown.until("assistant:")
    shown.until("\n> ")
    assert shown.leave("\x03") == 0


def test_ctrl_d_leaves(finished: Callable[..., Path]) -> None:
    shown = Terminal("chat", str(finished("dpo")), "--compare", "--temperature", "0", "--max-new-tokens", "8")
    assert "/help lists the commands" in shown.until("\n> ")
    shown.type("Say 3 and tea.\n")
    shown.until("[2] tuned")
    shown.until("\n> ")
    shown.type("/save\n")
    assert "must be told which answer is kept" in shown.until("\n> ")
    assert shown.leave("\x04") == 0
