"""What one model makes of the rows of an evaluation: log-probabilities and answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from transformers import PreTrainedModel

from alignctl.evaluate import generation
from alignctl.evaluate.generation import Answer
from alignctl.proof import likelihood
from alignctl.proof.likelihood import Ids, Line, Scored
from alignctl.proof.rows import Asked
from alignctl.train import heldout
from alignctl.train.tokens import Encoder

# Rows in one batch of generation.
TOGETHER = 32
# A batch of texts that are scored for what was forgotten.
TEXTS = 8


@dataclass(frozen=True)
class Settings:
    """How a model is asked: how many prompts, how long answers may be, and the seed of those that are drawn."""

    samples: int
    max_new_tokens: int
    seed: int
    batch_size: int
    precision: torch.dtype


@dataclass(frozen=True)
class Drawn:
    """One answer to each prompt, drawn from the tuned model: its ids, stop token included."""

    prompts: list[Ids]
    answers: list[Ids]

    def lines(self) -> list[tuple[Line, ...]]:
        """The answers as they are scored."""
        return [(likelihood.answered(*both),) for both in zip(self.prompts, self.answers, strict=True)]


@dataclass(frozen=True)
class Measured:
    """One model on the rows: their answers' log-probabilities, general text's, its own answers, and those drawn."""

    rows: Scored
    general: Scored
    answers: list[Answer]
    drawn: Scored | None


def prompts(asked: Asked, encoder: Encoder, samples: int) -> list[Ids]:
    """The ids that the first `samples` different prompts are asked with."""
    return [encoder.prompt_ids(heldout.prompt(row)) for _, row in asked.questions(samples)]


def draw(model: PreTrainedModel, encoder: Encoder, given: list[Ids], settings: Settings) -> Drawn:
    """One answer to each prompt, drawn from `model`."""
    with _autocast(model, settings):
        answers = generation.generate(
            model, encoder.tokenizer, given, encoder.stop_ids, settings.max_new_tokens, TOGETHER, settings.seed
        )
    return Drawn(given, answers)


def measure(
    model: PreTrainedModel,
    encoder: Encoder,
    lines: Sequence[tuple[Line, ...]],
    given: list[Ids],
    drawn: Drawn | None,
    settings: Settings,
    known: Scored | None = None,
) -> Measured:
    """Everything that is asked of `model`; `drawn` are the tuned model's answers, None where there are no prompts.

    `known` are the scores of `lines`, where they need not be computed.
    """
    pad, precision = encoder.tokenizer.pad_token_id, settings.precision
    with _autocast(model, settings):
        answers = generation.answer(
            model, encoder.tokenizer, given, encoder.stop_ids, settings.max_new_tokens, TOGETHER
        )
    return Measured(
        known or likelihood.score(model, lines, pad, precision, settings.batch_size),
        likelihood.score(model, general(encoder), pad, precision, TEXTS),
        answers,
        likelihood.score(model, drawn.lines(), pad, precision, settings.batch_size) if drawn else None,
    )


def _autocast(model: PreTrainedModel, settings: Settings) -> torch.autocast:
    precision = settings.precision
    return torch.autocast(model.device.type, dtype=precision, enabled=precision != torch.float32)


def general(encoder: Encoder) -> list[tuple[Line, ...]]:
    """Plain texts that no preference set is about; of each, all but the first token is scored."""
    ids = encoder.encode([encoder.begun(text) for text in general_texts()])
    return [(Line(each, [-100, *each[1:]]),) for each in ids]


def general_texts() -> list[str]:
    """24 short texts that were written for this: prose of many kinds, letters, verse, code, figures, four languages."""
    file = resources.files("alignctl.evaluate") / "general.jsonl"
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
