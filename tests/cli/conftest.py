"""A model folder made on the spot, and recipes around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

RECIPE = """model: {{name_or_path: {model}}}
lora: {{r: 4}}
data:
  train: [{{path: rows.jsonl}}]
training: {{learning_rate: 1e-3}}
{method}: {{}}
"""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer and template are those of SmolLM2."""
    from alignctl.train import standin

    folder = tmp_path_factory.mktemp("tiny")
    corpus = folder / "corpus.txt"
    corpus.write_text("The user asks about tea, and the assistant answers in one sentence.\n", encoding="utf-8")
    family = standin.family("smollm")[0]
    standin._tokenizer(family, corpus, folder / "model")
    standin._model(family, folder / "model")
    return folder / "model"


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> Callable[..., Path]:
    """`rows.jsonl` and a recipe `r.yaml` for it in an empty folder, which has a cache of its own."""
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def write(rows: Iterable[dict[str, Any]], method: str = "dpo", name: str = "rows.jsonl") -> Path:
        (tmp_path / "r.yaml").write_text(RECIPE.format(model=model_folder, method=method), encoding="utf-8")
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
