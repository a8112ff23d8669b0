"""What a look at model, rows and machine finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignctl.errors import DataError, RecipeError
from alignctl.init.facts import Wanted
from alignctl.train import look, machine, standin

PAIR = {"prompt": "What is one plus one?", "chosen": "It is two.", "rejected": "Perhaps three, or so."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and a template."""
    at = tmp_path_factory.mktemp("look")
    corpus = at / "corpus.txt"
    corpus.write_text("The user asks about tea.\n", encoding="utf-8")
    family = standin.family("smollm")[0]
    standin._tokenizer(family, corpus, at / "model")
    standin._model(family, at / "model")
    return at / "model"


@pytest.fixture
def notes() -> list[str]:
    return []


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_model_in_a_folder(folder: Path, notes: list[str]) -> None:
    found = look.model(Wanted("dpo", str(folder), "rows.jsonl"), notes.append)
    real = AutoModelForCausalLM.from_pretrained(folder)
    assert found.parameters == real.num_parameters() and found.counted
    assert (found.context, found.template, found.kind, found.commit) == (4096, True, "llama", None)
    assert found.knows_chatml and notes == []


def test_a_tokenizer_without_a_template(folder: Path, tmp_path: Path, notes: list[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.chat_template = None
    (bare / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(bare)
    assert look.model(Wanted("dpo", str(bare), "rows.jsonl"), notes.append).template is False


def test_a_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = look.model(Wanted("dpo", "nobody/nothing-7b", "rows.jsonl"), notes.append)
    assert (found.parameters, found.counted, found.template) == (7_000_000_000, False, None)
    assert len(notes) == 1 and "the hub has no such model" in notes[0]


def test_a_folder_that_is_not_there(notes: list[str]) -> None:
    with pytest.raises(RecipeError, match="no such folder"):
        look.model(Wanted("dpo", "./nowhere", "rows.jsonl"), notes.append)


def test_rows_are_counted_and_measured(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "SAMPLE", 3)
    data = write(tmp_path / "rows.jsonl", *[PAIR | {"prompt": "Why? " * n} for n in range(1, 6)])
    found = look.rows(Wanted("dpo", str(folder), data), "model", tokenizer=True)
    assert found.count == 5 and len(found.tokens) == 3 and found.counted and found.answer is None
    assert found.shape == "prompt, chosen and rejected as strings"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Why? "}, {"role": "assistant", "content": PAIR["rejected"]}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert found.tokens[0] == len(ids) - 1  # the template's line break behind the end is not trained


def test_without_a_tokenizer_tokens_are_guessed_from_characters(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIR, PAIR)
    found = look.rows(Wanted("orpo", "nobody/nothing", data), "model", tokenizer=False)
    characters = len(PAIR["prompt"]) + len(PAIR["rejected"])
    assert found.tokens == (characters // 3,) * 2 and not found.counted and found.count == 2


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        ({"messages": [{"role": "user", "content": "a" * 30}, {"role": "assistant", "content": "b" * 60}]}, 30),
        ({"text": "c" * 90}, 30),
        ({"prompt": "a" * 30, "completions": [{"text": t, "score": s} for t, s in (("b" * 60, 1), ("c", 2))]}, 30),
    ],
)
def test_guesses_of_other_shapes(tmp_path: Path, row: dict[str, Any], tokens: int) -> None:
    data = write(tmp_path / "rows.jsonl", row)
    method = "dpo" if "completions" in row else "sft"
    assert look.rows(Wanted(method, "nobody/nothing", data), "model", tokenizer=False).tokens == (tokens,)


def test_sft_on_a_preference_set_takes_the_chosen_answers(folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIR, PAIR)
    found = look.rows(Wanted("sft", str(folder), data), "model", tokenizer=True)
    assert found.answer == "chosen" and found.count == 2


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_rows_of_no_known_shape(folder: Path, tmp_path: Path, method: str) -> None:
    data = write(tmp_path / "rows.jsonl", {"a": "b"})
    with pytest.raises(DataError, match="none of the shapes"):
        look.rows(Wanted(method, str(folder), data), "model", tokenizer=True)


def test_rows_that_are_all_dropped(folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIR | {"rejected": PAIR["chosen"]})
    with pytest.raises(DataError, match="none is left"):
        look.rows(Wanted("dpo", str(folder), data), "model", tokenizer=True)


def test_memory_of_a_gpu_or_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "detect", lambda: machine.Machine("cuda", "NVIDIA X", bf16=True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1, 24 * machine.GIB))
    assert vars(look.memory()) == {"gib": 24.0, "what": "NVIDIA X", "gpu": True}
    monkeypatch.setattr(machine, "detect", lambda: machine.Machine("cpu", "x86", bf16=True))
    monkeypatch.setattr(machine, "host_memory_gib", lambda: 16.0)
    assert look.memory().gib == 16.0 and not look.memory().gpu
