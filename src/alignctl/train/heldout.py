"""Held-out scores and answers of the model in a trainer, before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from transformers import Trainer
from trl import DPOTrainer

from alignctl.evaluate import generation
from alignctl.evaluate.generation import Answer
from alignctl.evaluate.scores import PairScores, RowScores
from alignctl.recipe.schema import Recipe
from alignctl.train import trl_seam
from alignctl.train.data import Rows
from alignctl.train.losses import masked_mean
from alignctl.train.tokens import Encoder


def score(trainer: Trainer, recipe: Recipe, rows: Rows) -> PairScores | RowScores:
    """One score a held-out row."""
    model = trainer.model
    was_training = model.training
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        scores = _rows(trainer, rows) if recipe.method == "sft" else _pairs(trainer, recipe, rows)
    model.train(was_training)
    return scores


def _batches(trainer: Trainer, rows: Rows) -> Iterator[dict[str, Any]]:
    size = trainer.args.per_device_eval_batch_size
    for start in range(0, len(rows.encoded), size):
        batch = trainer.data_collator(rows.encoded[start : start + size])
        yield {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}


def _rows(trainer: Trainer, rows: Rows) -> RowScores:
    nll = []
    for batch in _batches(trainer, rows):
        logps = trl_seam.token_logps(trainer.model, batch["input_ids"], batch["attention_mask"], batch["labels"])
        nll.append(-masked_mean(logps.float(), batch["labels"][:, 1:] != -100))
    return RowScores(torch.cat(nll).cpu().double().numpy())


def _pairs(trainer: Trainer, recipe: Recipe, rows: Rows) -> PairScores:
    columns: list[torch.Tensor] = []
    for batch in _batches(trainer, rows):
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        logps = trl_seam.token_logps(trainer.model, batch["input_ids"], batch["attention_mask"], labels).float()
        means = masked_mean(logps, batch["completion_mask"][:, 1:])
        rewards = _rewards(trainer, recipe, batch, logps.sum(-1), means)
        columns.append(torch.stack([*rewards.chunk(2), *means.chunk(2)]))
    return PairScores(*(numpy.asarray(column) for column in torch.cat(columns, dim=1).cpu().double().numpy()))


def _rewards(
    trainer: Trainer, recipe: Recipe, batch: dict[str, Any], sums: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """Rewards of `[2B]` answers, chosen first."""
    if isinstance(trainer, DPOTrainer):
        assert recipe.dpo is not None
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
        return recipe.dpo.beta * (sums - reference)
    assert recipe.orpo is not None
    return recipe.orpo.beta * means


def answers(trainer: Trainer, recipe: Recipe, encoder: Encoder, rows: Rows) -> list[Answer]:
    """Answers to the first `evaluation.samples` held-out prompts."""
    prompts = [encoder.prompt_ids(prompt(row)) for row in rows.canonical[: recipe.evaluation.samples]]
    with trainer.accelerator.autocast():
        return generation.answer(
            trainer.accelerator.unwrap_model(trainer.model),
            encoder.tokenizer,
            prompts,
            encoder.stop_ids,
            recipe.evaluation.max_new_tokens,
            batch_size=16,
        )


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
