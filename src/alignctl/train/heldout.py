"""Held-out scores and answers of the model in a trainer, before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy
import torch
from transformers import Trainer

from alignctl.evaluate import generation
from alignctl.evaluate.generation import Answer
from alignctl.evaluate.scores import PairScores, RowScores
from alignctl.recipe.schema import Recipe
from alignctl.train import trl_seam
from alignctl.train.data import Rows
from alignctl.train.losses import masked_mean
from alignctl.train.tokens import Encoder


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows under the trainer's model; `reference` is kept because it does not change in training."""

    loss: float
    scores: PairScores | RowScores
    reference: list[list[float]] | None


def score(trainer: Trainer, recipe: Recipe, rows: Rows, reference: list[list[float]] | None = None) -> HeldOut:
    """One score a held-out row, and the trainer's own loss.

    For DPO `reference` holds the chosen and rejected answers' log-probabilities under the reference, where they were
    computed before.
    """
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        if recipe.method == "sft":
            found = _rows(trainer, rows)
        elif recipe.dpo is None:
            found = _pairs(trainer, recipe, rows, None)
        else:
            with trl_seam.given_reference(trainer):
                found = _pairs(trainer, recipe, rows, reference or _reference(trainer, rows))
    trainer.model.train(was_training)
    return found


def _batches(trainer: Trainer, rows: Rows) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Batches of rows of like length, with the numbers of their rows."""
    order = numpy.argsort(rows.sizes(), kind="stable").tolist()
    size = trainer.args.per_device_eval_batch_size
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = trainer.data_collator([rows.encoded(i) for i in part])
        yield part, {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}


def _in_order(parts: list[tuple[list[int], torch.Tensor]]) -> numpy.ndarray:
    """`[k, n]` columns of the batches, back in the order of the rows."""
    order = [i for part, _ in parts for i in part]
    columns = torch.cat([column for _, column in parts], dim=1).cpu().double().numpy()
    out = numpy.empty_like(columns)
    out[:, order] = columns
    return out


def _rows(trainer: Trainer, rows: Rows) -> HeldOut:
    losses, parts = [], []
    for part, batch in _batches(trainer, rows):
        loss, logps = trl_seam.loss_and_logps(trainer, batch)
        losses.append(loss.item() * len(part))
        parts.append((part, -masked_mean(logps.float(), batch["labels"][:, 1:] != -100)[None]))
    return HeldOut(sum(losses) / len(rows), RowScores(*_in_order(parts)), None)


@torch.no_grad()
def likelihoods(trainer: Trainer, rows: Rows) -> numpy.ndarray:
    """Mean log-probability a token of chosen and of rejected answers under the trainer's model: `[2, n]`."""
    was_training = trainer.model.training
    trainer.model.eval()
    parts = []
    with trainer.accelerator.autocast():
        for part, batch in _batches(trainer, rows):
            answers = batch["completion_mask"].bool()
            labels = batch["input_ids"].masked_fill(~answers, -100)
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            out = trainer.model(**given, labels=labels, use_cache=False, fused_lm_head=True)
            parts.append((part, torch.stack(masked_mean(out.log_probs.float(), answers[:, 1:]).chunk(2))))
    trainer.model.train(was_training)
    return _in_order(parts)


def reference(trainer: Trainer, rows: Rows) -> list[list[float]]:
    """What the reference makes of `rows`: log-probabilities of chosen and of rejected answers, two lists of `n`."""
    was_training = trainer.model.training
    trainer.model.eval()
    with trl_seam.given_reference(trainer):
        found = _reference(trainer, rows)
    trainer.model.train(was_training)
    return found


def _reference(trainer: Trainer, rows: Rows) -> list[list[float]]:
    """Log-probabilities of chosen and rejected answers under a DPO trainer's reference: two lists of `n`."""
    parts = []
    for part, batch in _batches(trainer, rows):
        logps = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
        parts.append((part, torch.stack(list(logps)).float()))
    out: list[list[float]] = _in_order(parts).tolist()
    return out


def _pairs(trainer: Trainer, recipe: Recipe, rows: Rows, reference: list[list[float]] | None) -> HeldOut:
    losses, parts = [], []
    for part, batch in _batches(trainer, rows):
        if reference is not None:
            given = torch.tensor(reference)[:, part].to(trainer.args.device)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = given
        loss, logps = trl_seam.loss_and_logps(trainer, batch)
        losses.append(loss.item() * len(part))
        answers = batch["completion_mask"][:, 1:]
        means = masked_mean(logps.float(), answers)
        if reference is not None and recipe.dpo is not None:
            rewards = recipe.dpo.beta * ((logps.float() * answers).sum(-1) - given.flatten())
        else:
            assert recipe.orpo is not None
            rewards = recipe.orpo.beta * means
        parts.append((part, torch.stack([*rewards.chunk(2), *means.chunk(2)])))
    return HeldOut(sum(losses) / len(rows), PairScores(*_in_order(parts)), reference)


def answers(trainer: Trainer, recipe: Recipe, encoder: Encoder, rows: Rows) -> list[Answer]:
    """Answers to the first `evaluation.samples` held-out prompts."""
    prompts = [encoder.prompt_ids(prompt(row)) for row in asked(rows, recipe.evaluation.samples)]
    with trainer.accelerator.autocast():
        return generation.answer(
            trainer.accelerator.unwrap_model(trainer.model),
            encoder.tokenizer,
            prompts,
            encoder.stop_ids,
            recipe.evaluation.max_new_tokens,
            batch_size=32,
        )


def asked(rows: Rows, samples: int) -> list[dict[str, list[dict[str, str]]]]:
    """The first held-out rows that ask something; plain text does not."""
    given = (rows.canonical(i) for i in range(len(rows)))
    return list(islice((row for row in given if "text" not in row), samples))


def prompt(row: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    """The messages that a row's answer is asked with."""
    if "prompt" in row:
        return row["prompt"]
    last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return row["messages"][:last]


def preferred(row: dict[str, list[dict[str, str]]]) -> str:
    """The answer that the row prefers."""
    if "chosen" in row:
        return row["chosen"][-1]["content"]
    return next(m["content"] for m in reversed(row["messages"]) if m["role"] == "assistant")
