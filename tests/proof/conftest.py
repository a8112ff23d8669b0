"""Finished runs on a tiny model, trained once for all tests of a method."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from alignctl.train import standin
from commandline import invoke

WORDS = ("tea", "rain", "bread", "stone", "river", "lamp", "cloud", "wheel")


def pairs(first: int, count: int) -> list[dict[str, Any]]:
    """Preference pairs numbered from `first` on, all with prompts of their own."""
    out = []
    for i in range(first, first + count):
        a, b = WORDS[i % 8], WORDS[(3 * i + 1) % 8]
        out.append({"prompt": f"Say {i} and {a}.", "chosen": f"{a} {i} {b}", "rejected": f"{b} {i} {a}, twice"})
    return out


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model `base`, `train.jsonl` and `test.jsonl`, in which the runs of all workers are made."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "workshop"
    with FileLock(root / "workshop.lock"):
        if not folder.exists():
            _furnish(folder)
    return folder


def _furnish(folder: Path) -> None:
    folder.mkdir()
    for name, rows in (("train", pairs(0, 24)), ("test", pairs(100, 8)), ("other", pairs(200, 8))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    family = standin.family("smollm")[0]
    standin._tokenizer(family, folder / "train.jsonl", folder / "base")
    standin._model(family, folder / "base")


@pytest.fixture(scope="session")
def finished(workshop: Path) -> Callable[..., Path]:
    """The folder of a run of `method`, finished; the same sections give the same run. Nobody may change it."""

    @cache
    def train(method: str = "dpo", sections: str = "{}") -> Path:
        answer = {"answer": "chosen"} if method == "sft" else {}
        values: dict[str, Any] = {
            "model": {"name_or_path": str(workshop / "base"), "dtype": "float32"},
            "lora": {"r": 4},
            "data": {
                "train": [{"path": "train.jsonl", **answer}],
                "eval": [{"path": "test.jsonl", **answer}],
            },
            "training": {"learning_rate": 5e-4, "max_steps": 6},
            method: {},
            "evaluation": {"samples": 4, "max_new_tokens": 8},
            "gates": {"reload": False},
        }
        for name, section in json.loads(sections).items():
            values[name] = None if section is None else {**(values.get(name) or {}), **section}
        values = {name: section for name, section in values.items() if section is not None}
        text = yaml.safe_dump(values)
        name = f"{method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        folder = workshop / "runs" / name
        with FileLock(workshop / f"{name}.lock"):
            if not folder.exists():
                (workshop / f"{name}.yaml").write_text(text, encoding="utf-8")
                _train(workshop, method, name)
        return folder

    return lambda method="dpo", **sections: train(method, json.dumps(sections, sort_keys=True))


def _train(workshop: Path, method: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        patch.setenv("ALIGNCTL_CACHE", str(workshop / "cache"))
        assert invoke(method, f"{name}.yaml") == 0
