"""Run folders written by hand, and a real browser to open pages in."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignctl import rundir

ROWS = 40


def metrics(steps: int, *, scale: float = 1.0) -> list[dict[str, Any]]:
    """The log of a DPO run that learns: a line a step, a held-out line every quarter."""
    out: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        far = scale * (1 - math.exp(-3 * step / steps))
        jump = 0.06 * math.sin(step * 7.3)
        row = {"step": step, "epoch": round(step / steps, 4), "lr": 5e-5 * (1 - step / steps), "grad_norm": 2 + jump}
        row |= {"loss": 0.6931 - 0.3 * far + jump, "rewards/chosen": -0.4 * far, "rewards/rejected": -1.6 * far + jump}
        row |= {"rewards/margins": 1.2 * far - jump, "rewards/accuracies": min(1.0, 0.5 + 0.4 * far + jump)}
        row |= {
            "logps/chosen": -90 - 4 * far,
            "logps/rejected": -200 - 16 * far,
            "mean_token_accuracy": 0.4 + 0.1 * far,
        }
        row |= {"tokens_per_second": 2400 + 900 * jump, "pairs_per_second": 4.1, "eta_seconds": float(steps - step)}
        out.append(row | {"peak_memory_gib": 3.1 + 0.2 * (step > steps / 3), "peak_host_gib": 4.4})
        if step % max(1, steps // 4) == 0:
            held = {"eval_loss": 0.6931 - 0.26 * far, "eval_rewards/margins": 1.1 * far}
            out.append({"step": step, "epoch": row["epoch"], "eval_rewards/accuracies": 0.5 + 0.42 * far, **held})
    return out


def scores(method: str, shift: float) -> dict[str, list[float]]:
    """One score a held-out row; `shift` moves them all, by hand-checkable amounts."""
    if method == "sft":
        return {"nll": [2.0 - shift + 0.01 * (i % 5) for i in range(ROWS)]}
    gaps = [shift + (0.1 if i % 4 else -0.3) for i in range(ROWS)]
    chosen = [-1.5 + 0.01 * (i % 3) for i in range(ROWS)]
    return {
        "chosen_rewards": [gap / 2 for gap in gaps],
        "rejected_rewards": [-gap / 2 for gap in gaps],
        "chosen_logps_per_token": chosen,
        "rejected_logps_per_token": [c - gap for c, gap in zip(chosen, gaps, strict=True)],
    }


def recipe(method: str, beta: float) -> str:
    return (
        "model:\n  name_or_path: some/model\n  dtype: bfloat16\ndata:\n  train:\n  - path: train.jsonl\n    take: 400\n"
        f"training:\n  learning_rate: 5.0e-05\n  seed: 42\n{method}:\n"
        + ("  beta: null\n" if method == "sft" else f"  beta: {beta}\n")
    )


def ledger_part(method: str, rows: int, path: str) -> dict[str, Any]:
    sides = ("input",) if method == "sft" else ("prompt", "chosen", "rejected")
    shapes = {side: [rows // 2 >> i for i in range(8 - k)] + [0] * k for k, side in enumerate(sides)}
    return {
        "rows": rows + 3,
        "kept": rows,
        "dropped": {"an answer is empty": {"rows": 2, "first": [f"{path}:3", f"{path}:9"]}},
        "set_aside": {"more than the source's weight": {"rows": 1, "first": []}},
        "cut": {},
        "formats": {"prompt, chosen and rejected as strings": rows},
        "sources": [{"path": path, "format": "prompt-chosen-rejected", "rows": rows + 3, "kept": rows}],
        "duplicates": {"rows": 1, "first": [f"{path}:7"]},
        "tokens": {side: {"p5": 10, "p50": 30, "p95": 70, "p99": 76, "p100": 80} for side in sides},
        "lengths": {"edges": list(range(0, 90, 10)), "counts": shapes, "mean": dict.fromkeys(sides, 20.0)},
        "supervised_share": 0.81,
        "fingerprint": "f" * 64,
    }


def summary(method: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "method": method,
        "verdict": "better",
        "difference": 0.9,
        "difference_interval": [0.7, 1.1],
    }
    if method == "sft":
        sides = [{"loss": x, "n": ROWS, "nll": x, "nll_interval": [x - 0.1, x + 0.1]} for x in (2.9, 2.0)]
        values["measure"] = "fall of the negative log-likelihood a token"
    else:
        values["measure"] = "rise of the reward margin"
        before = {"loss": 0.6931, "n": ROWS, "reward_accuracy": 0.5, "reward_accuracy_interval": [0.35, 0.65]}
        before |= {"margin": 0.0, "margin_interval": [0.0, 0.0], "chosen_logps_per_token": -1.4}
        after = before | {"loss": 0.4, "reward_accuracy": 0.9, "reward_accuracy_interval": [0.77, 0.96], "margin": 0.9}
        sides = [before, after | {"margin_interval": [0.7, 1.1], "chosen_logps_per_token": -1.5}]
    values |= dict(zip(("before", "after"), sides, strict=True))
    samples = {"n": 4, "mean_tokens": {"before": 60.0, "after": 21.5}, "stop_rate": {"before": 0.5, "after": 1.0}}
    return values | {"samples": samples}


def samples(count: int, words: int = 30) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Question {i}: why is tea hot?",
            "preferred": "Because of the water.",
            "before": "Well, tea is hot, and hot tea is hot. " * (words // 9),
            "after": "Because of the water." if i % 3 else "Well, tea is hot, and hot tea is hot. " * (words // 9),
            "before_tokens": 9 * (words // 9),
            "after_tokens": 5 + i,
            "before_stopped": i % 2 == 0,
            "after_stopped": i % 5 != 4,
        }
        for i in range(count)
    ]


def gates(**changes: dict[str, Any]) -> dict[str, Any]:
    given = {"verdict": "passed", "said": "nothing wrong", "value": None, "limit": None, "step": None}
    found = {name: dict(given) for name in ("targets", "memory", "reference", "finite", "moved", "drift", "reload")}
    found["noise"] = given | {"verdict": "off", "said": "switched off in the recipe"}
    return found | {name: given | change for name, change in changes.items()}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run's folder: `steps` log lines, `answers` samples, scores moved by `shift`; `record` is for run.json."""

    def build(
        name: str = "run",
        method: str = "dpo",
        *,
        beta: float = 0.1,
        steps: int = 60,
        answers: int = 4,
        shift: float = 1.0,
        held_out: str = "a" * 64,
        words: int = 30,
        **record: Any,
    ) -> Path:
        run = tmp_path / name
        (run / "logs").mkdir(parents=True)
        values: dict[str, Any] = {
            "status": "finished",
            "started": "2026-11-25T17:00:00+00:00",
            "ended": "2026-11-25T17:05:00+00:00",
            "seconds": 300.0,
            "command": f"alignctl {method} demo-{method}",
            "method": method,
            "gates": gates(),
            "model": {"name_or_path": "some/model", "parameters": 1000, "trainable": 10, "base_fingerprint": "b" * 64},
            "reference": "some/model, with the new adapter switched off" if method == "dpo" else None,
            "machine": {"device": "cpu", "name": "a CPU", "dtype": "bfloat16"},
            "seed": 42,
            "versions": {"python": "3.11", "trl": "1.16.0"},
            "data": {
                "train": {"rows": 400, "fingerprint": "f" * 64},
                "eval": {"rows": ROWS, "fingerprint": held_out},
            },
        }
        rundir.write_json(run / "run.json", values | record)
        rundir.write_text(run / "recipe.yaml", recipe(method, beta))
        parts = {"train": ledger_part(method, 400, "train.jsonl"), "eval": ledger_part(method, ROWS, "test.jsonl")}
        odd = {
            "name": "shortcut.length",
            "said": "the shorter answer is chosen in 99 %",
            "warns": True,
            "meaning": "Short.",
        }
        rundir.write_json(run / "ledger.json", parts | {"findings": [odd]})
        rundir.write_jsonl(run / "metrics.jsonl", metrics(steps, scale=shift))
        rundir.write_json(run / "summary.json", summary(method))
        rundir.write_jsonl(run / "samples.jsonl", samples(answers, words))
        for when, by in (("before", 0.0), ("after", shift)):
            rundir.write_json(run / "logs" / f"{when}.json", {"loss": 0.6, "scores": scores(method, by)})
        return run

    return build


@pytest.fixture
def evaluation() -> Callable[..., dict[str, Any]]:
    """One file of `evaluations/`."""

    def build(
        name: str = "held-out", fingerprint: str = "a" * 64, shift: float = 1.0, **changes: Any
    ) -> dict[str, Any]:
        number = {
            "name": "reward_accuracy",
            "label": "reward accuracy",
            "group": "preferences",
            "unit": "share",
            "n": ROWS,
            "better": "higher",
            "reference": {"value": 0.5, "interval": [0.35, 0.65]},
            "tuned": {"value": 0.98, "interval": [0.87, 1.0]},
            "difference": {"value": 0.48, "interval": [0.4, 0.5], "p": 0.0005},
        }
        given = {"text": "Hot.", "tokens": 2, "stopped": True}
        return {
            "name": name,
            "made": "2026-11-25T18:00:00+00:00",
            "data": {"path": f"{name}.jsonl", "rows": ROWS, "prompts": ROWS, "fingerprint": fingerprint},
            "against": {"what": "start", "name": "some/model"},
            "verdict": "better",
            "reason": "It tells 98 % of the pairs apart, and 50 % before.",
            "numbers": [number],
            "rows": {"place": [], "prompt": [], "reference": scores("dpo", 0.0), "tuned": scores("dpo", shift)},
            "answers": [
                {
                    "prompt": "Why?",
                    "preferred": "So.",
                    "reference": given,
                    "tuned": given | {"text": name},
                    "drawn": given,
                }
            ],
            "judges": [
                {
                    "judge": "length",
                    "n": 4,
                    "wins": 3,
                    "ties": 1,
                    "losses": 0,
                    "win_rate": {"value": 0.875, "interval": [0.4, 1.0]},
                }
            ],
        } | changes

    return build


class Browser:
    """Chromium without a window, driven by its own protocol over a pipe."""

    def __init__(self, program: str, profile: Path) -> None:
        command_in, self._to = os.pipe()
        self._from, answer_out = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        command = [program, *flags, f"--user-data-dir={profile}", "about:blank"]
        script = f'exec 3<&{command_in} 4>&{answer_out}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(command_in, answer_out), stderr=subprocess.DEVNULL
        )
        os.close(command_in)
        os.close(answer_out)
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return dict(found["result"])
            self.events.append(found)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def open(self, page: Path, width: int = 1280, *, dark: bool = False) -> float:
        """Open a page, and say how many seconds it took until it was loaded."""
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media="", features=[scheme])
        began = time.monotonic()
        self("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        return time.monotonic() - began

    def ask(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Whatever the console would show: errors, exceptions, refused and failed requests."""
        self.ask("1")
        wanted = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in wanted]

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real browser; where none is installed, what needs it is left out."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium is installed")
    with tempfile.TemporaryDirectory() as profile:
        opened = Browser(program, Path(profile))
        yield opened
        opened.close()
