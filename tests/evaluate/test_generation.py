"""Numbers of generated answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignctl.evaluate import generation
from alignctl.evaluate.generation import Answer, distinct, refuses, repeats, summary

PAD = 0
STOPS = [1, 2]
SIZES = {
    "vocab_size": 24,
    "tie_word_embeddings": False,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
# Full attention; a window that the answers outgrow; layers whose state is no list of keys.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "mamba": {"state_size": 4},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
PROMPTS = [[5, 9, 3, 4], [6, 7, 8], [10], [11, 12, 13, 14, 15, 16], [17, 18], [19, 3, 3]]


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 2, 1.0),
        ("a b a b", 2, 2 / 3),  # ab, ba, ab
        ("a a a a a", 2, 1 / 4),
        ("  a\n b\ta b ", 2, 2 / 3),
        ("A a A a", 2, 2 / 3),
        ("a b a b", 1, 1 / 2),
        ("a b a b", 3, 1.0),  # aba, bab
        ("a b c a b c a", 3, 3 / 5),
        ("a b", 2, 1.0),
        ("a", 2, 1.0),
        ("", 2, 1.0),
    ],
)
def test_distinct(text: str, n: int, share: float) -> None:
    assert distinct(text, n) == share


def test_pairs_of_words_are_what_is_counted() -> None:
    assert distinct("a b a b a") == 2 / 4


def test_summary_is_a_mean_over_answers() -> None:
    """Not over words: a long answer that repeats itself weighs as a short one."""
    answers = [Answer("a b a b", 4, True), Answer("a " * 101, 101, False), Answer("", 0, True), Answer("a b", 2, True)]
    assert summary(answers) == {"stop_rate": 3 / 4, "distinct_2": pytest.approx((2 / 3 + 1 / 100 + 1 + 1) / 4)}


def test_summary_of_one_answer() -> None:
    assert summary([Answer("a a a", 3, False)]) == {"stop_rate": 0.0, "distinct_2": 0.5}


@pytest.mark.parametrize(
    ("text", "share"), [("a b c d a b c d", 1 / 5), ("a b c d e", 0.0), ("a b", 0.0), ("a a a a a a", 2 / 3)]
)
def test_repeats(text: str, share: float) -> None:
    assert repeats(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry. That is not something I do.", True),
        ("As an AI, I have no birthday.", True),
        ("As a language model I cannot say.", True),
        ("I cannot provide instructions for this.", True),
        ("I am unable to answer.", True),
        ("I can help with that.", False),
        ("Sorry is the hardest word.", False),
        ("Boil the water first. " * 10 + "I'm sorry, but I can't help.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_how_an_answer_begins(text: str, refused: bool) -> None:
    assert refuses(text) is refused


def tiny(kind: str) -> PreTrainedModel:
    """A random model whose answers stop early and late."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()  # type: ignore[no-any-return]


def generated(model: PreTrainedModel, leg: int, monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[list[int]]:
    """Answers to `PROMPTS`, in legs of `leg` tokens."""
    monkeypatch.setattr(generation, "LEG", leg)
    tokenizer: Any = SimpleNamespace(pad_token_id=PAD)
    return generation.generate(model, tokenizer, PROMPTS, STOPS, 40, **{"batch_size": 8} | how)


@pytest.mark.parametrize("kind", KINDS)
def test_legs_do_not_change_an_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    whole = generated(model, 40, monkeypatch)
    assert len({len(row) for row in whole}) > 2
    assert all(row[-1] in STOPS or len(row) == 40 for row in whole)
    assert not any(token in STOPS for row in whole for token in row[:-1])
    for leg in (1, 3, 16):
        assert generated(model, leg, monkeypatch) == whole
    assert generated(model, 3, monkeypatch, batch_size=1) == whole


@pytest.mark.parametrize("cache", ["dynamic", "offloaded", "static", "hybrid"])
def test_the_cache_that_a_model_asks_for_does_not_matter(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    whole = generated(model, 40, monkeypatch)
    model.generation_config.cache_implementation = cache
    assert generated(model, 3, monkeypatch) == whole


def test_an_answer_that_stopped_is_not_computed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: rows.append(given[0].shape))
    lengths = [len(row) for row in generated(model, 4, monkeypatch)]
    # The prompt is the first step, so a leg of 4 tokens is 4 of them, after the first leg too.
    alive = [sum(length > 4 * (step // 4) for length in lengths) for step in range(max(lengths))]
    assert [shape[0] for shape in rows][: len(alive)] == alive
    assert {shape[1] for shape in rows[1:]} == {1}


def test_drawn_answers_in_legs_are_the_same_for_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    once, again, other = (generated(model, 4, monkeypatch, seed=seed) for seed in (1, 1, 2))
    assert once == again != other
