"""Answers to held-out prompts: batched, left-padded, greedy or sampled, until a stop token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Tokens until the rows of a batch that have stopped are left out of it.
LEG = 16
# Words of more characters than this on average are none: the text has no spaces.
LONGEST = 16
# What answers begin with that refuse, in English.
_REFUSES = re.compile(
    r"\b(I('m| am) (very |so )?sorry|I (can(no|')t|can not|won't|will not|must decline to)"
    r" (help|assist|answer|provide|fulfil|fulfill|comply|do|discuss|give|create|write|support|engage|continue)"
    r"|as an? (AI|language model)|I('m| am) (not able|unable) to)\b",
    re.IGNORECASE,
)
_BEGINNING = 160


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
    rows = generate(model, tokenizer, prompts, stop_ids, max_new_tokens, batch_size)
    return [read(tokenizer, row, stop_ids) for row in rows]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    seed: int | None = None,
) -> list[list[int]]:
    """The ids of an answer to each prompt, its stop token included, in the order given.

    Without a `seed` the likeliest token is taken each time; with one, tokens are drawn from the model's own
    distribution (temperature 1, nothing left out), the same for the same seed and prompts.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            sampled = seed is not None
            rows = _generate(model, tokenizer, [prompts[i] for i in part], stop_ids, max_new_tokens, sampled=sampled)
            answers |= {i: _whole(row, stop_ids) for i, row in zip(part, rows, strict=True)}
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


def repeats(text: str, n: int = 4) -> float:
    """Share of the runs of `n` words in `text` that stood in it before; 0 where there are none."""
    return 1 - distinct(text, n)


def refuses(text: str) -> bool:
    """Whether an English answer begins by refusing."""
    return _REFUSES.search(text.replace("\u2019", "'")[:_BEGINNING]) is not None


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
    *,
    sampled: bool,
) -> list[list[int]]:
    """The new ids of each prompt, in legs of `LEG` tokens: a row that has stopped is not in the next one."""
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stops = torch.tensor(list(stop_ids), device=model.device)
    how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    rows: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=model.device)
    cache: Cache | None = None
    with torch.inference_mode():
        for done in range(0, max_new_tokens, LEG):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=min(LEG, max_new_tokens - done),
                eos_token_id=list(stop_ids),
                pad_token_id=pad,
                use_cache=True,
                cache_implementation=None,
                return_dict_in_generate=True,
                **{"do_sample": False, **how},
            )
            new = out.sequences[:, ids.shape[1] :]
            for row, tokens in zip(alive.tolist(), new.tolist(), strict=True):
                rows[row] += tokens
            going = (~torch.isin(new, stops).any(1)).nonzero()[:, 0]
            if not len(going):
                break
            ids, alive = out.sequences[going], alive[going]
            mask = torch.cat([mask[going], torch.ones_like(new[going])], 1)
            cache = _only(out.past_key_values, going)
    return rows


def _only(cache: Cache | None, rows: Tensor) -> Cache | None:
    """The cache of `rows` alone; None, which is a cache to be filled anew, where a layer's state is more than keys."""
    if cache is None or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.batch_select_indices(rows)
    return cache


def _whole(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    """A generated row up to its first stop token, without the padding behind it."""
    end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
    return row[: end + 1]


def read(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: Sequence[int]) -> Answer:
    """The answer that the ids of `generate` are."""
    stopped = ids[-1:] != [] and ids[-1] in stop_ids
    said = ids[:-1] if stopped else ids
    return Answer(tokenizer.decode(said, skip_special_tokens=True).strip(), len(said), stopped)
