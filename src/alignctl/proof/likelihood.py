"""Log-probabilities of given answers under a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

Ids = list[int]


@dataclass(frozen=True)
class Line:
    """A sequence of token ids and its labels: a token is scored where its label is not -100."""

    ids: Ids
    labels: Ids


def answered(prompt: Ids, answer: Ids) -> Line:
    """`answer` behind `prompt`: the answer is scored."""
    return Line(prompt + answer, [-100] * len(prompt) + answer)


@dataclass(frozen=True)
class Scored:
    """Sum of the log-probabilities of the scored tokens, and how many they are: both `[sides, n]`."""

    sums: numpy.ndarray
    counts: numpy.ndarray

    @property
    def per_token(self) -> numpy.ndarray:
        return self.sums / self.counts

    @property
    def finite(self) -> bool:
        return bool(numpy.isfinite(self.sums).all())


@torch.no_grad()
def score(
    model: PreTrainedModel, items: Sequence[tuple[Line, ...]], pad: int, precision: torch.dtype, batch_size: int
) -> Scored:
    """Score items of as many lines each (a pair has two) under `model`, in batches of items of like length.

    The lines of a batch stand side by side, all first ones before all second ones, as the packed engine wants them.
    """
    sums = numpy.empty((len(items[0]), len(items)))
    for part in batches(items, batch_size):
        lines = [line for side in zip(*(items[i] for i in part), strict=True) for line in side]
        sums[:, part] = _batch(model, lines, pad, precision).reshape(len(sums), len(part))
    return Scored(sums, counts(items))


def batches(items: Sequence[tuple[Line, ...]], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the items of each batch, the shortest first."""
    order = sorted(range(len(items)), key=lambda i: sum(len(line.ids) for line in items[i]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def counts(items: Sequence[tuple[Line, ...]]) -> numpy.ndarray:
    """How many tokens of each line are scored, `[sides, n]`: nothing comes before the first."""
    return numpy.array([[sum(label != -100 for label in line.labels[1:]) for line in item] for item in items]).T


def _batch(model: PreTrainedModel, lines: Sequence[Line], pad: int, precision: torch.dtype) -> numpy.ndarray:
    """`[N]` sums of one batch."""
    ids = _padded([line.ids for line in lines], pad)
    mask = _padded([[1] * len(line.ids) for line in lines], 0)
    labels = _padded([line.labels for line in lines], -100)
    device = model.device
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        out = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            labels=labels.to(device),
            use_cache=False,
            fused_lm_head=True,
        )
    found: numpy.ndarray = out.log_probs.float().sum(1).double().cpu().numpy()
    return found


def _padded(rows: Sequence[Ids], value: int) -> Tensor:
    """`[N, L]`, padded on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
