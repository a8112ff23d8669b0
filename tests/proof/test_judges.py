"""Judges: counted, kept, and asked in both orders; a reward model, a rule, and a server that speaks the protocol."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from alignctl.errors import MachineError, RecipeError
from alignctl.evaluate.numbers import Estimate
from alignctl.proof import judges, jury
from alignctl.proof.judges import Match
from alignctl.statistics import wilson
from alignctl.train.display import Display
from alignctl.train.machine import Machine


def match(reference: str, tuned: str, asked: str = "Why?") -> Match:
    return Match([{"role": "user", "content": asked}], reference, tuned)


def quiet() -> Display:
    return Display(io.StringIO())


# --- counting and keeping ------------------------------------------------------------------------------------------


def test_a_tie_counts_half_and_what_cannot_be_read_counts_for_nobody() -> None:
    found = judges.count("j", ["win", "win", "tie", "loss", "unreadable"])
    assert (found.n, found.wins, found.ties, found.losses, found.unreadable) == (4, 2, 1, 1, 1)
    assert found.win_rate is not None and found.win_rate.value == 2.5 / 4
    assert judges.count("j", ["win"] * 20).win_rate == Estimate(1.0, wilson(20, 20))


def test_a_judge_that_could_not_be_read_says_nothing() -> None:
    found = judges.count("j", ["unreadable"] * 3)
    assert (found.win_rate, found.voice().word) == (None, "no evidence")


@pytest.mark.parametrize(("results", "word"), [(["win"] * 20, "better"), (["loss"] * 20, "worse")])
def test_a_win_rate_away_from_one_half_is_a_voice(results: list[judges.Result], word: str) -> None:
    assert judges.count("j", results).voice().word == word
    assert judges.count("j", [*results, *(["tie"] * 2000)]).voice().word != "broken"


def test_an_even_judge_is_no_evidence() -> None:
    assert judges.count("j", ["win", "loss"] * 20).voice().word == "no evidence"


@dataclass
class Longer:
    """Prefers the longer answer, and notes what it was asked; fails when `left` is used up."""

    name: str = "longer"
    identity: str = "1"
    together: int = 1
    left: int = 100
    heard: list[Match] = field(default_factory=list)

    def compare(self, match: Match) -> judges.Result:
        if not self.left:
            raise MachineError()
        self.left -= 1
        self.heard.append(match)
        return "win" if len(match.tuned) > len(match.reference) else "loss"


def test_what_was_judged_is_not_judged_again(tmp_path: Path) -> None:
    matches = [match("a", "a" * i) for i in range(6)]
    with pytest.raises(MachineError):
        judges.ask(Longer(left=4), matches, tmp_path, quiet())
    again = Longer()
    found = judges.ask(again, matches, tmp_path, quiet())
    assert (found.wins, found.losses, len(again.heard)) == (4, 2, 2)
    other = Longer(identity="2")
    judges.ask(other, matches, tmp_path, quiet())
    assert len(other.heard) == 6
    changed = Longer()
    judges.ask(changed, [*matches[:5], match("a", "bbbbb")], tmp_path, quiet())
    assert [heard.tuned for heard in changed.heard] == ["bbbbb"]


def test_a_judgment_that_was_being_written_is_judged_again(tmp_path: Path) -> None:
    matches = [match("a", "bb"), match("aa", "b")]
    judges.ask(Longer(), matches, tmp_path, quiet())
    file = tmp_path / judges.FILE
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    again = Longer()
    assert judges.ask(again, matches, tmp_path, quiet()).wins == 1
    assert len(again.heard) == 1


# --- a rule in Python ----------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_rule_prefers_what_has_more_points(tmp_path: Path) -> None:
    file = write(tmp_path / "rule.py", "def short(prompt, answer):\n    return -len(answer)\n")
    judge = jury.rule(f"{file}:short")
    assert [judge.compare(match(*both)) for both in (("aa", "a"), ("a", "aa"), ("a", "b"))] == ["win", "loss", "tie"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none.py:f", "no such file"),
        ("rule.py", "no such file"),
        ("rule.py:g", "KeyError"),
        ("broken.py:f", "SyntaxError"),
    ],
)
def test_a_rule_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rule.py", "def f(prompt, answer):\n    return 1\n")
    write(tmp_path / "broken.py", "def f(:\n")
    with pytest.raises(RecipeError, match=said):
        jury.rule(given)


def test_a_rule_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    file = write(tmp_path / "rule.py", "def f(prompt, answer):\n    return 1 / len(answer)\n")
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        jury.rule(f"{file}:f").compare(match("", "a"))


def test_points_that_are_no_number_are_unreadable(tmp_path: Path) -> None:
    file = write(tmp_path / "rule.py", "def f(prompt, answer):\n    return float('nan')\n")
    assert jury.rule(f"{file}:f").compare(match("a", "b")) == "unreadable"


# --- a reward model ------------------------------------------------------------------------------------------------

CPU = Machine("cpu", "test", False)


def reward_folder(workshop: Path, folder: Path, labels: int = 1) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(workshop / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=labels,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_reads_the_whole_conversation(workshop: Path, tmp_path: Path) -> None:
    folder = reward_folder(workshop, tmp_path / "reward")
    judge = jury.reward_model(str(folder), CPU)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    points = []
    for answer in ("tea", "rain and bread"):
        turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        with torch.no_grad():
            points.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item())
    assert points[0] != points[1]
    assert judge.compare(match("tea", "rain and bread")) == ("win" if points[1] > points[0] else "loss")
    assert judge.compare(match("rain and bread", "tea")) == ("loss" if points[1] > points[0] else "win")
    assert judge.compare(match("tea", "tea")) == "tie"


def test_a_classifier_is_no_reward_model(workshop: Path, tmp_path: Path) -> None:
    folder = reward_folder(workshop, tmp_path / "classes", labels=3)
    with pytest.raises(RecipeError, match="gives 3 numbers"):
        jury.reward_model(str(folder), CPU)


# --- an endpoint ---------------------------------------------------------------------------------------------------

Reply = Callable[[dict[str, Any]], tuple[int, str]]


@dataclass
class Server:
    """A server that speaks the protocol; `reply` makes status and text of a request's body."""

    url: str
    reply: Reply = lambda body: (200, "verdict: tie")
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.bodies.append(body)
            found.keys.append(self.headers["Authorization"])
            status, text = found.reply(body) if self.path == "/v1/chat/completions" else (404, "no such page")
            payload = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield found
    http.shutdown()
    http.server_close()


def sides(body: dict[str, Any]) -> tuple[str, str]:
    """The answers A and B of a request."""
    text = body["messages"][-1]["content"]
    _, _, both = text.partition("# Answer A\n\n")
    a, _, b = both.partition("\n\n# Answer B\n\n")
    return a, b


def prefers_longer(body: dict[str, Any]) -> tuple[int, str]:
    a, b = sides(body)
    return 200, f"The longer one.\n\n**Verdict:** {'A' if len(a) > len(b) else 'B'}"


def test_an_endpoint_must_say_the_same_in_both_orders(server: Server) -> None:
    judge = jury.endpoint(server.url, "m")
    server.reply = prefers_longer
    assert judge.compare(match("a", "aaa")) == "win"
    assert judge.compare(match("aaa", "a")) == "loss"
    assert sides(server.bodies[0]) == sides(server.bodies[1])[::-1] == ("aaa", "a")
    assert server.bodies[0]["model"] == "m" and server.bodies[0]["temperature"] == 0
    assert "user: Why?" in server.bodies[0]["messages"][-1]["content"]


def test_a_judge_that_prefers_a_place_finds_ties(server: Server) -> None:
    server.reply = lambda body: (200, "verdict: A")
    assert jury.endpoint(server.url, "m").compare(match("a", "b")) == "tie"


def test_the_last_verdict_of_a_reply_counts(server: Server) -> None:
    server.reply = lambda body: (
        200,
        f"At first verdict: tie, but no.\nverdict: {'A' if sides(body)[0] == 'b' else 'B'}",
    )
    assert jury.endpoint(server.url, "m").compare(match("a", "b")) == "win"


def test_a_reply_without_a_verdict_is_unreadable(server: Server) -> None:
    server.reply = lambda body: (200, "Both are fine answers.")
    assert jury.endpoint(server.url, "m").compare(match("a", "b")) == "unreadable"


def test_a_busy_endpoint_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.util.retry.Retry.get_backoff_time", lambda self: 0)
    server.reply = lambda body: (429, "later") if len(server.bodies) < 3 else prefers_longer(body)
    assert jury.endpoint(server.url, "m").compare(match("a", "aaa")) == "win"
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    ("status", "said"), [(401, "ALIGNCTL_JUDGE_KEY"), (404, "--judge-model"), (400, "--judge-model")]
)
def test_an_endpoint_that_refuses(server: Server, status: int, said: str) -> None:
    server.reply = lambda body: (status, "no")
    with pytest.raises(MachineError, match=said) as error:
        jury.endpoint(server.url, "m").compare(match("a", "b"))
    assert f"answers {status}" in str(error.value)


def test_an_endpoint_that_is_not_there() -> None:
    with pytest.raises(MachineError, match="does not answer"):
        judge = jury.endpoint("http://127.0.0.1:9/v1", "m")
        judge.session.adapters.clear()
        judge.session.mount("http://", jury.HTTPAdapter(max_retries=0))
        judge.compare(match("a", "b"))


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({}, None),
        ({"OPENAI_API_KEY": "sk-one"}, "Bearer sk-one"),
        ({"OPENAI_API_KEY": "sk-one", "ALIGNCTL_JUDGE_KEY": "sk-two"}, "Bearer sk-two"),
    ],
)
def test_the_key_comes_from_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], key: str | None
) -> None:
    for name in jury.KEYS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    judge = jury.endpoint(server.url, "m")
    judge.compare(match("a", "b"))
    assert server.keys == [key, key]
    assert "sk-" not in repr(judge) + judge.identity
