"""What stops a run: numbers that are not finite, and signals."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.errors import DivergedError, Interrupted, Problem

LOSS_SCALE_SEARCH = 20


class Finite(TrainerCallback):
    """Stops before an update whose gradient is not finite, so that the weights stay those of the last good step.

    In float16 the loss scaler finds its scale by trying: it leaves such updates out by itself, and only a run of
    `LOSS_SCALE_SEARCH` of them is a fault.
    """

    def __init__(self) -> None:
        self._in_a_row = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._in_a_row = 0 if torch.isfinite(norm) else self._in_a_row + 1
        if self._in_a_row > (LOSS_SCALE_SEARCH if args.fp16 else 0):
            raise DivergedError(
                Problem(
                    f"step {state.global_step + 1}",
                    f"the gradient's norm is {norm.item()}, so the update would ruin every weight",
                    "lower training.learning_rate, or set model.dtype=float32 to see whether precision is the cause",
                )
            )


class Signals(TrainerCallback):
    """SIGINT and SIGTERM: between steps the run stops with a checkpoint, elsewhere it stops at once.

    A signal that a library swallowed before the first step stops the run after that step.

    A second signal always stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._stepping = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch both signals inside the block."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, number
        if self._stepping and first:
            return
        raise Interrupted(number, Problem("run", f"stopped by {signal.Signals(number).name}"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stepping = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stepping = False
