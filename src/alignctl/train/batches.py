"""The order of training rows: random, with the forward passes of one update weighing alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class Balanced(Sampler[int]):
    """Rows in random order, in which each update's rows are dealt to its forward passes by their size.

    An update holds the same `batch * accumulation` rows as a plain random order would give it, so its gradient is the
    same; only which of them share a forward pass changes, and with it the most memory that any pass takes. The order
    follows from `seed` and the epoch alone, so that a resumed run goes on where it stopped.
    """

    def __init__(self, sizes: Sequence[int], batch: int, accumulation: int, seed: int) -> None:
        super().__init__()
        self.sizes, self.batch, self.accumulation, self.seed, self.epoch = sizes, batch, accumulation, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.sizes), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for update in order.split(self.batch * self.accumulation):
            yield from deal([int(i) for i in update], self.sizes, self.batch)


def deal(rows: list[int], sizes: Sequence[int], batch: int) -> list[int]:
    """`rows` in an order whose batches of `batch` hold about as many tokens each.

    The largest row goes first, each to the batch with the fewest tokens that still has room. What does not fill all
    batches keeps its order: the last batch would be another than the last.
    """
    if len(rows) % batch:
        return rows
    hands: list[list[int]] = [[] for _ in range(len(rows) // batch)]
    for row in sorted(rows, key=lambda i: -sizes[i]):
        open_hands = [hand for hand in hands if len(hand) < batch]
        min(open_hands, key=lambda hand: sum(sizes[i] for i in hand)).append(row)
    return [row for hand in hands for row in hand]
