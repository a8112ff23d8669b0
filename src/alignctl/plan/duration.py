"""How long training takes: operations of a step, and how many of them a GPU does in a second."""

from __future__ import annotations

from dataclasses import dataclass

from alignctl.plan import weights
from alignctl.plan.activations import Batch
from alignctl.plan.gpus import ASSUMED, Gpu
from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape
from alignctl.recipe.schema import Recipe


@dataclass(frozen=True)
class Work:
    """Operations of one forward pass and all that follows from it, two to a multiplication and addition."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def work(shape: Shape, setup: Setup, batch: Batch) -> Work:
    """What is computed for a batch.

    A product with a matrix of n weights takes 2n operations a token, as much again for the gradient of its input, and
    again for that of its weights where they are trained. Attention takes 4 a token, key and number of a query; half of
    the keys of a sequence lie behind a token on average.
    """
    matrices = shape.layers * (sum(each.weights for each in shape.linears()) + _experts(shape))
    seen = batch.keys / batch.rows / 2
    attention = 4 * shape.layers * shape.queries * seen
    once = batch.tokens * (2 * matrices + attention)
    small = batch.tokens * 2 * sum(weights.adapters(setup, shape.layers))
    head = 2.0 * batch.supervised * shape.embeddings()
    parts = {
        "forward": once + small + head,
        "reference's pass": once + head if setup.reference != "none" else 0,
        "recomputed": once + small if setup.checkpointing else 0,
        "backward": once + 2 * small + attention * batch.tokens + head * (1 if setup.adapts else 3),
        "gradients of all weights": 0 if setup.adapts else batch.tokens * 2 * matrices,
    }
    return Work({name: value for name, value in parts.items() if value})


def _experts(shape: Shape) -> int:
    return 3 * shape.active_experts * shape.inner * shape.width


def seconds(work: Work, gpu: Gpu) -> float:
    """On `gpu`, at the share of its rate that was measured or is assumed."""
    return work.total / (gpu.rate * 1e12 * (gpu.efficiency or ASSUMED))


def passes(recipe: Recipe, rows: int | None) -> int | None:
    """Forward passes of the whole run; None where the rows are not counted."""
    training = recipe.training
    if training.max_steps is not None:
        return training.max_steps * training.gradient_accumulation_steps
    if rows is None:
        return None
    return round(-(-rows // training.per_device_train_batch_size) * training.num_train_epochs)
