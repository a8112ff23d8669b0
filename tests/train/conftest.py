"""Tokenizers made on the spot, encoders around them, and recipes around files of rows."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from starts import ROWS, make_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainingArguments

from alignctl.recipe import catalog
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir
from alignctl.train import data, fit, machine, standin, tokens
from alignctl.train.data import Rows
from alignctl.train.gates import Gates
from alignctl.train.parts import Parts
from alignctl.train.preflight import Built
from alignctl.train.tokenizer import load_encoder
from alignctl.train.tokens import Encoder

CORPUS = "The user asks a question about tea, and the assistant gives an answer in one short sentence.\n" * 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has an empty cache of its own: the user's is neither read nor written."""
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedTokenizerBase]:
    """A new byte-level tokenizer with the special tokens of the family that a model's name belongs to."""
    folder = tmp_path_factory.mktemp("tokenizers")
    corpus = folder / "corpus.txt"
    corpus.write_text(CORPUS, encoding="utf-8")

    def build(name: str) -> PreTrainedTokenizerBase:
        if not (folder / name).is_dir():
            standin._tokenizer(standin.family(name)[0], corpus, folder / name)
        return PreTrainedTokenizerFast.from_pretrained(folder / name)

    return build


@pytest.fixture(scope="session")
def make_encoder(make_tokenizer: Callable[[str], PreTrainedTokenizerBase]) -> Callable[[str, str], Encoder]:
    """The encoder of a family's tokenizer with a built-in template; asked twice, it is the same one."""

    @cache
    def build(name: str, template: str) -> Encoder:
        tokenizer = make_tokenizer(name)
        tokenizer.chat_template = catalog.template(template)
        return tokens.encoder(tokenizer)

    return build


@pytest.fixture(scope="session")
def encoder(make_encoder: Callable[[str, str], Encoder]) -> Encoder:
    """The one that tests of rows use, where which one it is does not matter."""
    return make_encoder("mistral", "chatml")


@pytest.fixture(scope="session")
def plain_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """A new tokenizer with `<s>` and `</s>` alone, which merges blank lines as large vocabularies do."""

    def build(*, adds_bos: bool = False, eos: str | None = "</s>") -> PreTrainedTokenizerBase:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<s>", "</s>"]
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
        core.train_from_iterator(["tea\n\n\ntea\n\ntea"] * 9, trainer)
        if adds_bos:
            core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)

    return build


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """A `.jsonl` file with these rows."""

    def write(rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def data_recipe() -> Callable[..., Recipe]:
    """A recipe for `method` whose `data` section reads `train`, and whatever `more` sources there are."""

    def build(
        method: str,
        train: Path,
        source: dict[str, Any] | None = None,
        *,
        seed: int = 42,
        more: Iterable[dict[str, Any]] = (),
        **data: Any,
    ) -> Recipe:
        return Recipe.model_validate(
            {
                "model": {"name_or_path": "nobody/nothing"},
                "data": {"train": [{"path": str(train), **(source or {})}, *more], **data},
                "training": {"learning_rate": 1e-4, "seed": seed},
                method: {},
            }
        )

    return build


@pytest.fixture
def said() -> list[str]:
    """What the gates said aloud."""
    return []


@pytest.fixture
def make_gates(tmp_path: Path, data_recipe: Callable[..., Recipe], said: list[str]) -> Callable[..., Gates]:
    """The gates of the run in `tmp_path`, with these switches; what stands in its run.json is read first."""

    def build(**switches: bool) -> Gates:
        recipe = data_recipe("dpo", Path("unused.jsonl"))
        given = Recipe.model_validate(recipe.model_dump() | {"gates": switches})
        return Gates(given, RunDir(tmp_path), said.append)

    return build


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "checkpoints" / ".writing"), use_cpu=True, logging_steps=1)


@pytest.fixture
def make_rows(
    write_rows: Callable[..., Path], data_recipe: Callable[..., Recipe], encoder: Encoder
) -> Callable[..., Rows]:
    """So many encoded pairs, or rows of an SFT run; row i stands at rows.jsonl:i + 1."""

    def build(count: int = 6, method: str = "dpo") -> Rows:
        given = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No {i}"} for i in range(count)]
        source = {"answer": "chosen"} if method == "sft" else {}
        return data.prepare(data_recipe(method, write_rows(given), source), encoder)[0]

    return build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with its tokenizer: two blocks of seven linear layers."""
    folder = tmp_path_factory.mktemp("tiny")
    standin.stand_in(make_recipe("dpo", Path("tiny-llama"), folder), folder)
    return folder / "model"


@pytest.fixture
def make(tiny: Path, tmp_path: Path, make_gates: Callable[..., Gates]) -> Callable[..., Built]:
    """What a run of `method` on the six rows starts with."""

    def build(method: str = "dpo", **sections: Any) -> Built:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        recipe = make_recipe(method, tiny, file, **sections)
        encoder = load_encoder(recipe)
        rows, _ = data.prepare(recipe, encoder)
        where = machine.Machine("cpu", "test", True)
        parts = Parts(where, where.precision(recipe.model.dtype), encoder, rows.dataset(), None, tmp_path)
        return Built(recipe, parts, fit.BUILD[method](recipe, parts), rows, make_gates())

    return build


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the installed package need `needs`, and `versions` be what is installed."""

    def fake(needs: list[str], **versions: str) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
        monkeypatch.setattr(importlib.metadata, "version", version)

    return fake
