"""The judges that there are: a reward model, an endpoint that speaks OpenAI's protocol, and a rule in Python."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from urllib3.util import Retry

from alignctl.errors import AlignctlError, MachineError, Problem, RecipeError
from alignctl.formats import Message
from alignctl.proof.judges import Match, Result
from alignctl.train.machine import Machine
from alignctl.train.model import fingerprint

# The environment's names for the key of an endpoint, the first that is set.
KEYS = ("ALIGNCTL_JUDGE_KEY", "OPENAI_API_KEY")
_PATIENCE = 120
_REPLY_TOKENS = 1024
_VERDICT = re.compile(r"verdict\W{0,6}(A|B|tie)\b", re.IGNORECASE)
_INSTRUCTION = """You compare two answers, A and B, to the same request. Judge which of them serves the person better: \
is it correct, does it do what was asked, is it clear, and does it leave out what nobody needs? Length by itself \
counts for nothing, and neither does the order in which the answers stand. Explain yourself in one or two sentences. \
Then end with one line: "verdict: A", "verdict: B", or "verdict: tie" when neither is better."""


def _by_points(reference: float, tuned: float) -> Result:
    if not (math.isfinite(reference) and math.isfinite(tuned)):
        return "unreadable"
    if tuned == reference:
        return "tie"
    return "win" if tuned > reference else "loss"


@dataclass(frozen=True)
class RewardModel:
    """A model that gives a conversation one number."""

    name: str
    identity: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    together: int = 1

    def compare(self, match: Match) -> Result:
        return _by_points(self._points(match.prompt, match.reference), self._points(match.prompt, match.tuned))

    @torch.inference_mode()
    def _points(self, prompt: list[Message], answer: str) -> float:
        turns = [*prompt, {"role": "assistant", "content": answer}]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:  # as reward models before chat templates were trained: question and answer as two texts
            ids = self.tokenizer(prompt[-1]["content"], answer, return_tensors="pt")
        out = self.model(**ids.to(self.model.device))
        return float(out.logits.float().item())


def reward_model(path: str, where: Machine) -> RewardModel:
    """The reward model in a folder or on the hub.

    Raises:
        RecipeError: it gives more than one number.
    """
    dtype = torch.bfloat16 if where.kind == "cuda" and where.bf16 else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, use_safetensors=True, device_map={"": where.device}
    )
    if model.config.num_labels != 1:
        what = f"gives {model.config.num_labels} numbers, and a reward is one"
        raise RecipeError(Problem("--reward-model", f"{path} {what}", "give a model with one label"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return RewardModel(f"reward model {path}", f"{path} {fingerprint(model)}", model.eval(), tokenizer)


@dataclass(frozen=True)
class Rule:
    """A function `(prompt, answer) -> number` of a Python file: more is better."""

    name: str
    identity: str
    points: Callable[[str, str], Any]
    together: int = 1

    def compare(self, match: Match) -> Result:
        asked = match.prompt[-1]["content"]
        return _by_points(self._number(asked, match.reference), self._number(asked, match.tuned))

    def _number(self, asked: str, answer: str) -> float:
        try:
            return float(self.points(asked, answer))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RecipeError(Problem(f"--judge-rule {self.name}", what, "mend the function")) from error


def rule(given: str) -> Rule:
    """The rule `FILE.py:FUNCTION`. Its code runs here, as any Python file that is named on a command line does.

    Raises:
        RecipeError: there is no such file or function, or it cannot be imported.
    """
    file, _, name = given.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise RecipeError(Problem(f"--judge-rule {given}", "no such file", "write it as FILE.py:FUNCTION"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RecipeError(Problem(f"--judge-rule {given}", "is no Python file", "write it as FILE.py:FUNCTION"))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        points = vars(module)[name]
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise RecipeError(Problem(f"--judge-rule {given}", what, "mend the file")) from error
    return Rule(f"rule {path.name}:{name}", hashlib.sha256(path.read_bytes()).hexdigest() + name, points)


@dataclass(frozen=True)
class Endpoint:
    """A model behind an endpoint. It sees both orders of the answers, and wins only when both say the same."""

    url: str
    model: str
    session: requests.Session = field(repr=False)
    together: int = 4

    @property
    def name(self) -> str:
        return self.model

    @property
    def identity(self) -> str:
        return f"{self.url} {self.model} {_INSTRUCTION}"

    def compare(self, match: Match) -> Result:
        first = self._verdict(match, match.tuned, match.reference)
        second = self._verdict(match, match.reference, match.tuned)
        if first is None or second is None:
            return "unreadable"
        if (first, second) == ("a", "b"):
            return "win"
        return "loss" if (first, second) == ("b", "a") else "tie"

    def _verdict(self, match: Match, a: str, b: str) -> str | None:
        """`a`, `b` or `tie`; None when the reply holds no verdict."""
        asked = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in match.prompt)
        text = f"# The conversation\n\n{asked}\n\n# Answer A\n\n{a}\n\n# Answer B\n\n{b}"
        messages = [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": text}]
        found = _VERDICT.findall(self._reply(messages))
        return found[-1].lower() if found else None

    def _reply(self, messages: list[Message]) -> str:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": _REPLY_TOKENS,
        }
        try:
            reply = self.session.post(f"{self.url.rstrip('/')}/chat/completions", json=body, timeout=_PATIENCE)
            if not reply.ok:
                raise self._refused(reply)
            return str(reply.json()["choices"][0]["message"]["content"] or "")
        except (requests.RequestException, ValueError, LookupError, TypeError) as error:
            what = f"{self.url} does not answer as it should: {' '.join(str(error).split())[:300]}"
            way_out = "check the address and the network; what was judged is kept, run it again"
            raise MachineError(Problem("--judge-url", what, way_out)) from error

    def _refused(self, reply: requests.Response) -> AlignctlError:
        code, said = reply.status_code, " ".join(reply.text.split())[:300]
        way_out = "what was judged is kept, run it again"
        if code in (401, 403):
            way_out = f"set {' or '.join(KEYS)}; {way_out}"
        elif code in (400, 404):
            way_out = "check --judge-url (it ends in /v1 as a rule) and --judge-model"
        return MachineError(Problem("--judge-url", f"{self.url} answers {code}: {said}", way_out))


def endpoint(url: str, model: str) -> Endpoint:
    """The model `model` behind `url`, with the environment's key where there is one."""
    session = requests.Session()
    retry = Retry(total=4, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None)
    retry = retry.new(raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
    if key is not None:
        session.headers["Authorization"] = f"Bearer {key}"
    return Endpoint(url, model, session)
