"""Gates while training goes on: are the numbers finite, do the weights move, what does the log say; and signals."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.drift import LIMIT as DRIFT
from alignctl.drift import of_dpo as dpo_drift
from alignctl.errors import Interrupted, Problem
from alignctl.evaluate import generation, verdict
from alignctl.evaluate.generation import Answer
from alignctl.recipe.schema import Recipe
from alignctl.train import model as models
from alignctl.train.data import Rows
from alignctl.train.gates import Gates

LOSS_SCALE_SEARCH = 20
# Updates after which the weights are looked at.
LOOKS = (1, 10, 50)
SAMPLES = 64
MOVED = 0.5
IN_A_ROW = 3
LEAST_PAIRS = 12
LN2 = math.log(2)
NEAR_LN2 = 0.005
LEAST_LOGS = 20
_CUT_OFF = "no gradient reaches them: training.gradient_checkpointing=false shows whether that is the cause"
_ROUNDED = "updates round away: raise training.learning_rate, or keep trained weights in float32"
_PRECISION = "lower training.learning_rate, or set model.dtype=float32 to see whether precision is the cause"


def callbacks(trainer: Trainer, recipe: Recipe, rows: Rows, gates: Gates) -> list[TrainerCallback]:
    """The gates that are on, watching `trainer` train on `rows`."""
    out: list[TrainerCallback] = []
    if gates.on("finite"):
        out.append(Finite(trainer.model, rows, gates))
    if gates.on("trainable"):
        out.append(Optimizer(gates))
    if gates.on("moved"):
        out.append(Moved(gates))
    if recipe.method != "sft":
        out.append(Signs(recipe, rows, gates))
    return out


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Finite(TrainerCallback):
    """Stops at the first forward pass, gradient or weight that is not finite, before it does harm, and names the rows.

    The tensors themselves are looked at, not what is logged. In float16 the loss scaler finds its scale by trying: it
    leaves updates out by itself, and only a run of `LOSS_SCALE_SEARCH` of them is a fault.
    """

    def __init__(self, model: nn.Module, rows: Rows, gates: Gates) -> None:
        self._rows, self._gates = rows, gates
        self._in_a_row = 0
        self._update: list[tuple[Tensor, Tensor]] = []
        self._step = 1
        model.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        ids, mask = given["input_ids"].detach(), given["attention_mask"].detach()
        self._update.append((ids, mask))
        finite = torch.isfinite(output.log_probs.detach()).all(1)
        if not finite.all():
            broken = [(ids[~finite], mask[~finite])]
            said = f"log-probabilities of {self._names(broken)} are not finite"
            self._gates.stopped("finite", said, _PRECISION, step=self._step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = state.global_step + 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._in_a_row = 0 if torch.isfinite(norm) else self._in_a_row + 1
        if self._in_a_row > (LOSS_SCALE_SEARCH if args.fp16 else 0):
            said = f"the gradient's norm is {norm.item()}, so the update would ruin every weight; its rows: "
            self._gates.stopped("finite", said + self._names(self._update), _PRECISION, step=self._step)
        self._update.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step + 1
        if state.global_step in LOOKS or control.should_save or state.global_step >= state.max_steps:
            weights = trained(kwargs["model"])
            norm = torch.nn.utils.get_total_norm(weights.values())
            if not torch.isfinite(norm):
                broken = [name for name, p in weights.items() if not torch.isfinite(p).all()]
                what = "are not finite" if broken else "are so large that their norm is not finite"
                said = f"{len(broken) or len(weights)} of {len(weights)} trained tensors {what}, such as "
                said += (broken or list(weights))[0]
                self._gates.stopped("finite", said, _PRECISION, value=len(broken), limit=0, step=state.global_step)
            self._gates.passed("finite", "forward passes, gradients and weights are finite", step=state.global_step)

    def _names(self, batches: list[tuple[Tensor, Tensor]]) -> str:
        """Where the rows of `batches` stand; of a pair, either side."""
        wanted = {
            tuple(row[keep.bool()].tolist()) for ids, mask in batches for row, keep in zip(ids, mask, strict=True)
        }
        found = [self._rows.place(i) for i in range(len(self._rows)) if not wanted.isdisjoint(sequences(self._rows, i))]
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        return shown or "rows that are not in the data"


def sequences(rows: Rows, i: int) -> list[tuple[int, ...]]:
    """What row `i` gives a model to read: one sequence, or one for each side of a pair."""
    row = rows.encoded(i)
    if "input_ids" in row:
        return [tuple(row["input_ids"])]
    return [tuple(row["prompt_ids"] + row[side]) for side in ("chosen_ids", "rejected_ids")]


class Optimizer(TrainerCallback):
    """Stops when the optimizer does not hold exactly what is trained."""

    def __init__(self, gates: Gates) -> None:
        self._gates = gates

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weights = trained(kwargs["model"])
        held = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        missing = [name for name, p in weights.items() if id(p) not in held]
        if missing:
            said = f"the optimizer lacks {len(missing)} of {len(weights)} trained tensors, such as {missing[0]}"
            way_out = "trl.optim and its arguments must take all of them"
            self._gates.stopped("trainable", said, way_out, value=len(weights) - len(missing), limit=len(weights))


class Resumed(TrainerCallback):
    """Stops when a resumed run does not go on with the weights of its checkpoint."""

    def __init__(self, note: dict[str, Any], gates: Gates) -> None:
        self._note, self._gates = note, gates

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        found = models.trained_fingerprint(kwargs["model"])
        expected, step = self._note.get("trained"), state.global_step
        if found != expected or step != self._note.get("step"):
            said = f"what was loaded is not the checkpoint of step {self._note.get('step')}"
            way_out = (
                "remove its folder to go on from an earlier one where there is one, or train anew with --output DIR"
            )
            self._gates.stopped("resume", said, way_out, value=found[:16], limit=str(expected)[:16])
        self._gates.passed("resume", f"goes on from step {step} with its weights and rows", value=found[:16], step=step)


class Moved(TrainerCallback):
    """Stops when a trained layer gets no gradient, or when the weights do not move.

    The gradients are looked at before the first update whose learning rate is not 0; up to `SAMPLES` values of every
    trained tensor after it and after the 10th and 50th.
    """

    def __init__(self, gates: Gates) -> None:
        self._gates = gates
        self._start: dict[str, Tensor] = {}
        self._without: list[str] = []
        self._updates = 0
        self._counts = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = {name: sample(p) for name, p in trained(kwargs["model"]).items()}
        if not self._start:
            self._gates.stopped("moved", "no weight of the model is trained", "see `lora:` and model.adapter", value=0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._counts = max(kwargs["lr_scheduler"].get_last_lr()) > 0
        if self._counts and not self._updates:
            weights = trained(kwargs["model"])
            self._without = [name for name in looked_at(weights) if not has_gradient(weights[name])]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._counts or kwargs["optimizer"].step_was_skipped:
            return
        self._updates += 1
        if self._updates not in LOOKS:
            return
        weights, step = trained(kwargs["model"]), state.global_step
        shares = {name: (sample(p) != self._start[name]).float().mean().item() for name, p in weights.items()}
        if self._updates == 1:
            self._reached(weights, shares, step)
        else:
            self._rounded(shares, step)

    def _reached(self, weights: dict[str, nn.Parameter], shares: dict[str, float], step: int) -> None:
        """Every tensor had a gradient and has changed; of an adapter its second half, which begins at 0."""
        looked = looked_at(weights)
        still, way_out = self._without, _CUT_OFF
        if not still:
            still = [name for name in looked if "lora_B" in name and not weights[name].detach().any()]
            way_out = "the optimizer updates something else: see trl.optim"
        if not still and not any(shares.values()):
            still, way_out = looked, _ROUNDED
        total = len(looked)
        if still:
            said = f"{len(still)} of {total} trained tensors have not moved after 1 update, such as {still[0]}"
            self._gates.stopped("moved", said, way_out, value=total - len(still), limit=total, step=step)
        said = f"all {total} trained tensors have moved after 1 update"
        self._gates.passed("moved", said, value=total, limit=total, step=step)

    def _rounded(self, shares: dict[str, float], step: int) -> None:
        """Half of the tensors have moved in half of their values; what begins at 0 moves however small the step is."""
        found = sorted(share for name, share in shares.items() if "lora_B" not in name)
        share, after = found[len(found) // 2], f"after {self._updates} updates"
        if share < MOVED:
            said = f"half of the trained tensors have moved in {share:.0%} of their values or fewer {after}"
            self._gates.stopped("moved", said, _ROUNDED, value=round(share, 3), limit=MOVED, step=step)
        said = f"{share:.0%} of the values of the median tensor have moved {after}"
        self._gates.passed("moved", said, value=round(share, 3), limit=MOVED, step=step)


def looked_at(weights: dict[str, nn.Parameter]) -> list[str]:
    """The tensors whose first gradient must not be 0; `lora_A` is hidden by its `lora_B` while that is 0."""
    return [name for name in weights if "lora_B" in name] or list(weights)


def has_gradient(parameter: nn.Parameter) -> bool:
    """Whether any value of it has a gradient that is not 0."""
    return parameter.grad is not None and bool(parameter.grad.any())


def sample(parameter: Tensor) -> Tensor:
    """Up to `SAMPLES` values of a tensor, evenly spaced, on the CPU."""
    values = parameter.detach().reshape(-1)
    return values[:: max(1, values.numel() // SAMPLES)][:SAMPLES].clone().cpu()


class Signs(TrainerCallback):
    """Says what the log of a preference run means: chosen answers become unlikely, or the data teaches nothing."""

    def __init__(self, recipe: Recipe, rows: Rows, gates: Gates) -> None:
        self._recipe, self._gates = recipe, gates
        self._tokens = float(rows.lengths("chosen_ids").mean())
        self._pairs = recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps
        self._first: float | None = None
        self._drifted: float | None = None
        self._low = self._right = 0
        self._losses: list[float] = []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs or "rewards/chosen" not in logs:
            return
        self._losses.append(logs["loss"])
        if self._gates.on("drift"):
            self._drift(logs, state.global_step)
        if self._gates.on("easy"):
            self._easy(logs, args, state)

    def _drift(self, logs: dict[str, float], step: int) -> None:
        """For DPO against the reference, for ORPO against its first log line; log-probability a token."""
        if self._recipe.dpo is not None:
            drift = dpo_drift(logs["rewards/chosen"], self._recipe.dpo.beta, self._tokens)
        else:
            self._first = logs["logps/chosen"] if self._first is None else self._first
            drift = logs["logps/chosen"] - self._first
        self._low = self._low + 1 if drift < DRIFT else 0
        if self._low >= IN_A_ROW:
            said = f"chosen answers have become unlikelier: {drift:.2f} nats a token"
            hold = ", a higher beta, or dpo.loss_type: [sigmoid, sft] hold" if self._recipe.dpo else " holds"
            way_out = f"a lower learning rate{hold} them"
            self._gates.warned("drift", said, way_out, value=round(drift, 3), limit=DRIFT, step=step)
        else:
            self._drifted = drift

    def _easy(self, logs: dict[str, float], args: TrainingArguments, state: TrainerState) -> None:
        """Every pair right in three log lines of the first tenth of a run."""
        self._right = self._right + 1 if logs["rewards/accuracies"] == 1 else 0
        pairs = self._right * args.logging_steps * self._pairs
        if self._right >= IN_A_ROW and pairs >= LEAST_PAIRS and state.global_step <= state.max_steps / 10:
            said = f"all of {pairs} pairs in a row were told apart by step {state.global_step} of {state.max_steps}"
            way_out = "the rejected answers are too easy to tell: alignctl check says by what"
            self._gates.warned("easy", said, way_out, value=1.0, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._gates.on("easy"):
            self._gates.passed("easy", "the pairs took learning")
        if self._drifted is not None:
            said = f"chosen answers: {self._drifted:+.2f} nats a token"
            self._gates.passed("drift", said, value=round(self._drifted, 3), limit=DRIFT)
        if self._recipe.dpo is None or self._recipe.dpo.loss_type != "sigmoid" or not self._gates.on("noise"):
            return
        if not self._losses:
            self._gates.passed("noise", "not measured: nothing was logged")
            return
        last = self._losses[-max(1, len(self._losses) // 4) :]
        loss = sum(last) / len(last)
        if len(self._losses) >= LEAST_LOGS and abs(loss - LN2) < NEAR_LN2:
            said = f"the loss ended at {loss:.4f}, and ln 2 is what guessing gives: nothing was learned"
            way_out = "a higher learning rate, more steps, or pairs whose difference is no noise"
            self._gates.warned("noise", said, way_out, value=round(loss, 4), limit=round(LN2, 4))
        else:
            self._gates.passed("noise", f"the loss ended at {loss:.4f}", value=round(loss, 4), limit=round(LN2, 4))


class Answers(TrainerCallback):
    """At every evaluation: do the answers to a few held-out prompts still end, and say something new?"""

    def __init__(self, ask: Callable[[], list[Answer]], before: list[Answer], gates: Gates) -> None:
        self._ask, self._before, self._gates = ask, before, gates

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        collapse(self._before, self._ask(), self._gates, state.global_step)


def collapse(before: list[Answer], after: list[Answer], gates: Gates, step: int | None = None) -> None:
    """Warn where answers have begun to repeat themselves, or no longer end."""
    old, new = generation.summary(before), generation.summary(after)
    said = (
        f"{new['stop_rate']:.0%} of {len(after)} answers end, and {new['distinct_2']:.0%} of their word pairs are new"
    )
    way_out = "a lower learning rate or fewer steps; look at samples.jsonl"
    if verdict.collapsed(before, after):
        said += f"; before training {old['stop_rate']:.0%} and {old['distinct_2']:.0%}"
        gates.warned("answers", said, way_out, value=round(new["distinct_2"], 3), limit=verdict.DISTINCT, step=step)
    else:
        gates.passed("answers", said, value=round(new["distinct_2"], 3), limit=verdict.DISTINCT, step=step)


class Signals(TrainerCallback):
    """SIGINT and SIGTERM: between steps the run stops with a checkpoint, elsewhere it stops at once.

    A signal that a library swallowed before the first step stops the run after that step.

    A second signal always stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._stepping = False
        self._raised: Interrupted | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch both signals inside the block; an error that a library made of one is the signal again."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Exception as error:
            if self._raised is None:
                raise
            raise self._raised from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, number
        if self._stepping and first:
            return
        self._raised = Interrupted(number, Problem("run", f"stopped by {signal.Signals(number).name}"))
        raise self._raised

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stepping = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stepping = False
