"""The plan of a recipe: its model's shape, its largest batch, the memory of it, and what to change."""

from __future__ import annotations

from dataclasses import dataclass

from alignctl.plan import data, duration, fixes, memory, setup
from alignctl.plan.activations import Batch
from alignctl.plan.data import Lengths
from alignctl.plan.duration import Work
from alignctl.plan.fixes import Fix
from alignctl.plan.memory import Memory
from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape
from alignctl.recipe.schema import Recipe


@dataclass(frozen=True)
class Target:
    """What is planned for: a GPU that computes in bfloat16, unless more is known.

    Attributes:
        dtype: that the device computes in; the recipe's without.
        packed: whether batches are packed; without, whether the recipe and the architecture allow it.
    """

    cuda: bool = True
    dtype: str | None = None
    packed: bool | None = None


@dataclass(frozen=True)
class Plan:
    """What a recipe takes. `batch` is the largest one, `work` that of a pass over rows of mean length."""

    recipe: Recipe
    shape: Shape
    target: Target
    setup: Setup
    lengths: Lengths
    batch: Batch
    memory: Memory
    work: Work

    @property
    def notes(self) -> list[str]:
        """What had to be assumed."""
        return setup.notes(self.recipe, self.shape)

    @property
    def passes(self) -> int | None:
        """Forward passes of the whole run, where the rows are counted."""
        return duration.passes(self.recipe, self.lengths.count)

    def fixes(self, free: int) -> list[Fix]:
        """Changes until the run needs no more than `free` bytes."""

        def needs(changed: Recipe) -> int:
            return of(changed, self.shape, self.lengths, self.target).memory.needed

        return fixes.until_it_fits(self.recipe, free, needs)


GPU = Target()


def of(recipe: Recipe, shape: Shape, lengths: Lengths, target: Target = GPU) -> Plan:
    """The plan of `recipe` for `target`."""
    how = setup.of(recipe, shape, cuda=target.cuda, dtype=target.dtype, packed=target.packed)
    largest = data.largest(lengths, recipe, packed=how.packed)
    usual = data.batch([lengths.mean] * recipe.training.per_device_train_batch_size, recipe, packed=how.packed)
    needs = memory.of(shape, how, largest)
    return Plan(recipe, shape, target, how, lengths, largest, needs, duration.work(shape, how, usual))
