"""Answers of a run's models, written piece by piece as they are generated."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, TextStreamer

from alignctl.errors import Problem, RecipeError
from alignctl.formats import Dropped, Message
from alignctl.proof.chat import Reply
from alignctl.proof.trained import Models, Trained
from alignctl.train import tokens
from alignctl.train.tokens import Ids

TUNED, BASE = "tuned", "base"


@dataclass(frozen=True)
class Question:
    """What the models are asked with: the messages that have room, how many were left out, and the ids."""

    messages: Sequence[Message]
    left_out: int
    ids: Ids


@dataclass(frozen=True)
class Speaker:
    """The models of a run, asked as they were in training, with sampling at `temperature` (0: greedy)."""

    run: Trained
    models: Models
    temperature: float
    max_new_tokens: int

    @property
    def context(self) -> int:
        """The most tokens of question and answer that the model takes."""
        longest = getattr(self.models.tuned.config.get_text_config(), "max_position_embeddings", None)
        return int(longest or 2**31)

    def question(self, prompt: Sequence[Message]) -> Question:
        """`prompt` without its oldest turns, as many as must go for an answer of `max_new_tokens` to have room.

        Raises:
            RecipeError: the question alone leaves no room for any answer.
        """
        limit = tokens.Limit(self.context, "truncate_prompt")
        messages = list(prompt)
        ids = self.run.encoder.prompt_ids(messages)
        with contextlib.suppress(Dropped):  # one question is all that is left
            while len(ids) + self.max_new_tokens > self.context:
                messages = tokens.without_oldest(messages, limit)
                ids = self.run.encoder.prompt_ids(messages)
        if len(ids) >= self.context:
            what = f"has {len(ids):,} tokens, and the model takes {self.context:,} with its answer"
            raise RecipeError(Problem("question", what, "ask with fewer words"))
        return Question(messages, len(prompt) - len(messages), ids)

    def answer(self, by: str, asked: Question, write: Callable[[str], None], stop: threading.Event) -> Reply:
        """The answer of the model `by`, given to `write` in pieces; it ends when `stop` is set."""
        tokenizer, stop_ids = self.run.encoder.tokenizer, self.run.encoder.stop_ids
        room = min(self.max_new_tokens, self.context - len(asked.ids))
        with self._model(by) as model, torch.inference_mode(), self._autocast():
            ids = torch.tensor([asked.ids], device=model.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                eos_token_id=list(stop_ids),
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                streamer=_Pieces(tokenizer, stop_ids, write),
                stopping_criteria=[_When(stop)],
                **self._sampling(),
            )
        new = out[0, len(asked.ids) :].tolist()
        if new and new[-1] in stop_ids:
            return Reply(by, tokenizer.decode(new[:-1], skip_special_tokens=True).strip(), "stopped")
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        return Reply(by, text, "interrupted" if stop.is_set() else "cut")

    @contextlib.contextmanager
    def _model(self, by: str) -> Iterator[PreTrainedModel]:
        if by == TUNED:
            yield self.models.tuned
        else:
            with self.models.start() as base:
                yield base

    def _autocast(self) -> torch.autocast:
        precision = self.run.precision
        return torch.autocast(self.run.machine.kind, dtype=precision, enabled=precision != torch.float32)

    def _sampling(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature}


class _Pieces(TextStreamer):
    """Gives whole words to `write`; a stop token is no word, though some tokenizers take it for one."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop_ids, self.write = stop_ids, write

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or value.flatten()[-1].item() not in self.stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


class _When(StoppingCriteria):
    """Ends generation behind the token that is being made when `stop` is set."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)
