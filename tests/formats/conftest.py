"""A tokenizer with a chat template, small enough to be made on the spot."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignctl.train import standin


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with Qwen's special tokens and the chatml template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "corpus.txt"
    corpus.write_text("How long does tea draw? I think it draws for three minutes.\n" * 3, encoding="utf-8")
    standin._tokenizer(standin.family("qwen2")[0], corpus, folder / "made")
    return PreTrainedTokenizerFast.from_pretrained(folder / "made")
