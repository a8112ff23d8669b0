"""Answers to held-out prompts: batched, left-padded, greedy, until a stop token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Words of more characters than this on average are none: the text has no spaces.
LONGEST = 16


@dataclass(frozen=True)
class Answer:
    """One generated answer: its text, its tokens without the stop token, and whether it ended by itself."""

    text: str
    tokens: int
    stopped: bool


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """One greedy answer to each prompt of token ids, in the order given."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = _generate(model, tokenizer, [prompts[i] for i in part], stop_ids, max_new_tokens)
        answers |= {i: _read(tokenizer, row, stop_ids) for i, row in zip(part, rows, strict=True)}
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def distinct(text: str, n: int = 2) -> float:
    """Share of the runs of `n` words in `text` that are different; 1 where there are none.

    Distinct-n of https://arxiv.org/abs/1510.03055, by characters where a text is written without spaces.
    """
    words = text.split()
    units = words if len(text) <= LONGEST * len(words) else list(text)
    runs = list(zip(*(units[i:] for i in range(n)), strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of answers that stop by themselves, and the mean of `distinct` over them."""
    n = len(answers)
    return {
        "stop_rate": sum(answer.stopped for answer in answers) / n,
        "distinct_2": sum(distinct(answer.text) for answer in answers) / n,
    }


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=pad,
            use_cache=True,
        )
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


def _read(tokenizer: PreTrainedTokenizerBase, row: list[int], stop_ids: Sequence[int]) -> Answer:
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    ids = row[:end]
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), end is not None)
