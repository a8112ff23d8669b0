"""Rows of an update dealt to its forward passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignctl.train.batches import Balanced, deal


def weights(order: list[int], sizes: list[int], batch: int) -> list[int]:
    return [sum(sizes[i] for i in order[k : k + batch]) for k in range(0, len(order), batch)]


def test_a_hand_dealt_update() -> None:
    sizes = [9, 1, 8, 2, 7, 3]
    assert deal([0, 1, 2, 3, 4, 5], sizes, 2) == [0, 1, 2, 3, 4, 5]  # 9 + 1, 8 + 2, 7 + 3
    assert weights(deal([5, 3, 1, 0, 2, 4], sizes, 2), sizes, 2) == [10, 10, 10]


def test_an_update_that_fills_no_whole_batches_keeps_its_order() -> None:
    assert deal([4, 2, 0], [1, 2, 3, 4, 5], 2) == [4, 2, 0]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_an_epoch_holds_every_row_once_and_an_update_the_same_rows(
    sizes: list[int], batch: int, accumulation: int, seed: int
) -> None:
    plain = list(Balanced([1] * len(sizes), 1, 1, seed))
    order = list(Balanced(sizes, batch, accumulation, seed))
    assert sorted(order) == list(range(len(sizes)))
    for start in range(0, len(sizes), batch * accumulation):
        part = slice(start, start + batch * accumulation)
        assert sorted(order[part]) == sorted(plain[part])


def test_passes_weigh_alike() -> None:
    sizes = [(i * 37) % 101 + 1 for i in range(64)]
    dealt = weights(list(Balanced(sizes, 4, 4, 0)), sizes, 4)
    plain = weights(list(Balanced([1] * 64, 1, 1, 0)), sizes, 4)
    spread = [sum(max(w[k : k + 4]) - min(w[k : k + 4]) for k in range(0, 16, 4)) for w in (dealt, plain)]
    assert spread[0] < spread[1] / 5 and max(dealt) < max(plain)


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_order_follows_from_seed_and_epoch(epoch: int) -> None:
    one, two, other = (Balanced(list(range(20)), 2, 2, seed) for seed in (1, 1, 2))
    for sampler in (one, two, other):
        sampler.set_epoch(epoch)
    assert list(one) == list(one) == list(two) != list(other)
    one.set_epoch(epoch + 1)
    assert list(one) != list(two)
