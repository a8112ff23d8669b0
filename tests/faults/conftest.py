"""Real runs on a tiny model, into which a fault is planted."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Trainer, TrainerCallback

from alignctl.report import html
from alignctl.train import fit, standin

Fault = Callable[[Trainer], None]

# The gate `reload` starts a process, which takes seconds: the tests that are not about it leave it out.
QUICK = {"reload": False}


@dataclass(frozen=True)
class Ran:
    """How a run ended: its exit code, what it printed, and what its folder says."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """run.json."""
        return dict(json.loads((self.folder / "run.json").read_text(encoding="utf-8")))

    def verdict(self, gate: str) -> str:
        """What run.json says of a gate; `silent` when it says nothing."""
        return str(self.record.get("gates", {}).get(gate, {}).get("verdict", "silent"))


def pairs(count: int = 16) -> list[dict[str, Any]]:
    """Preference pairs of which neither side can be told by its length, its words or its first token."""
    words = ["tea", "rain", "bread", "stone", "river", "lamp", "cloud", "wheel"]
    picked = [(words[i % 8], words[(3 * i + 1) % 8]) for i in range(count)]
    return [
        {"prompt": f"Say {i} and {a}.", "chosen": f"{a} {i} {b}", "rejected": f"{b} {i} {a}"}
        for i, (a, b) in enumerate(picked)
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model whose tokenizer and template are those of SmolLM2."""
    folder = tmp_path_factory.mktemp("tiny")
    corpus = folder / "corpus.txt"
    corpus.write_text("Say tea and rain, bread and stone, river and lamp, cloud and wheel.\n", encoding="utf-8")
    family = standin.family("smollm")[0]
    standin._tokenizer(family, corpus, folder / "model")
    standin._model(family, folder / "model")
    return folder / "model"


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the page of a run takes a second: the tests that are not about it leave it out."""
    monkeypatch.setattr(html, "made", lambda folder: f"report: {folder}, left out")


@pytest.fixture
def train(
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., Ran]:
    """Train `rows` in this process by `alignctl METHOD r.yaml …`, into the folder `run`.

    `sections` are merged into a recipe of four steps of four pairs in float32, with an adapter; None takes one away.
    `gates` are those that are switched off or on besides `reload`, which is off.
    """
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(
        method: str = "dpo",
        rows: Iterable[dict[str, Any]] | None = None,
        *options: str,
        gates: dict[str, bool] | None = None,
        folder: str = "run",
        **sections: dict[str, Any] | None,
    ) -> Ran:
        values: dict[str, Any] = {
            "model": {"name_or_path": str(tiny), "dtype": "float32"},
            "lora": {"r": 4},
            "data": {"train": [{"path": "rows.jsonl", **({"answer": "chosen"} if method == "sft" else {})}]},
            "training": {"learning_rate": 5e-4, "max_steps": 4, "lr_scheduler_type": "constant"},
            method: {},
            "evaluation": {"samples": 0},
            "gates": QUICK | (gates or {}),
        }
        for name, section in sections.items():
            values[name] = None if section is None else {**(values.get(name) or {}), **section}
        text = yaml.safe_dump({name: section for name, section in values.items() if section is not None})
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        given = pairs() if rows is None else rows
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        done = here(method, "r.yaml", "--output", folder, *options)
        return Ran(done.returncode, done.stdout, done.stderr, tmp_path / folder)

    return run


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    """Change every trainer after it is built."""

    def planted(fault: Fault) -> None:
        for method, build in list(fit.BUILD.items()):
            monkeypatch.setitem(fit.BUILD, method, partial(_faulty, build, fault))

    return planted


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainerCallback], None]:
    """Give every trainer that is built a callback, before all others."""

    def with_callback(callback: TrainerCallback) -> None:
        def build(*given: Any, built: Callable[..., Trainer]) -> Trainer:
            trainer = built(*given)
            trainer.callback_handler.callbacks.insert(1, callback)
            return trainer

        for method, built in fit.BUILD.items():
            monkeypatch.setitem(fit.BUILD, method, partial(build, built=built))

    return with_callback


def _faulty(build: Callable[..., Trainer], fault: Fault, *given: Any) -> Trainer:
    trainer = build(*given)
    fault(trainer)
    return trainer
