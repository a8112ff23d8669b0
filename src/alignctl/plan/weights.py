"""Bytes of what stays: weights as they are stored, adapters, gradients and the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Iterator

from alignctl.plan.setup import Setup
from alignctl.plan.shape import Linear, Shape

# Of bitsandbytes: weights that share a scale, scales that share one, and numbers that share one in 8-bit states.
BLOCK, SCALES, STATE_BLOCK = 64, 256, 256
# Below these many numbers its states are float32 all the same, and stay on the GPU though they are paged.
SMALLEST_8BIT, SMALLEST_PAGED = 4096, 100_000


def nf4(weights: int, *, double: bool) -> int:
    """A matrix in 4 bits: two weights a byte, a scale for 64 of them, and its code book of 16 float32.

    Doubly quantised, a scale takes a byte, 256 of them share a float32, and there are a code book of 256 float32 and
    an offset.
    """
    blocks = math.ceil(weights / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / SCALES) + 4 * 256 + 4 if double else 4 * blocks
    return math.ceil(weights / 2) + scales + 4 * 16


def base(shape: Shape, setup: Setup) -> dict[str, int]:
    """The model without adapters: packed matrices, and all else in the format of frozen or of trained weights."""
    packed = [each for each in shape.linears()] if setup.trains == "adapter on 4 bits" else []
    others = shape.parameters() - shape.layers * sum(each.weights for each in packed)
    four_bits = shape.layers * sum(nf4(each.weights, double=setup.double) for each in packed)
    what = "embeddings, head, norms" if packed else "weights"
    return {"weights in 4 bits": four_bits, what: others * setup.stored}


def adapters(setup: Setup, layers: int) -> list[int]:
    """Numbers in every tensor of the adapters: A `[r, in]` and B `[out, r]`, and DoRA's magnitudes `[out]`."""

    def of(each: Linear) -> list[int]:
        return [setup.rank * each.columns, each.rows * setup.rank] + ([each.rows] if setup.dora else [])

    return [count for each in setup.targets for count in of(each)] * layers


def trained(shape: Shape, setup: Setup) -> list[int]:
    """Numbers in every trained tensor."""
    return adapters(setup, shape.layers) if setup.adapts else list(_tensors(shape))


def _tensors(shape: Shape) -> Iterator[int]:
    """Numbers in every tensor of the model; the weight and bias of a norm count as one."""
    yield shape.embeddings()
    for _ in range(shape.layers):
        for each in shape.linears():
            yield each.weights
            if each.bias:
                yield each.rows
        if shape.experts:
            yield from (shape.expert_weights() // 3 * 2, shape.expert_weights() - shape.expert_weights() // 3 * 2)
        yield shape.norm_weights()
    if shape.head():
        yield shape.head()
    yield shape.parameters() - shape.layers * shape.block() - shape.embeddings() - shape.head()


def states(tensors: list[int], optimizer: str) -> tuple[int, int]:
    """Bytes of the optimizer's state after a step: on the GPU, and in paged memory, which can move to the host."""
    sizes = [(count, _state(count, optimizer)) for count in tensors]
    paged = sum(size for count, size in sizes if "paged" in optimizer and count >= SMALLEST_PAGED)
    return sum(size for _, size in sizes) - paged, paged


def _state(count: int, optimizer: str) -> int:
    """One tensor's: as many moments as the optimizer has, in float32, or in 8 bits with a float32 for 256 of them."""
    moments = _MOMENTS.get(optimizer.removeprefix("paged_").split("_")[0], 2)
    if "8bit" in optimizer and count >= SMALLEST_8BIT:
        return moments * (count + 4 * math.ceil(count / STATE_BLOCK))
    return moments * 4 * count


_MOMENTS = {"sgd": 0, "lion": 1, "adagrad": 1, "rmsprop": 1, "ademamix": 3}


def scratch(tensors: list[int], optimizer: str) -> int:
    """What a step needs besides: torch's AdamW takes the roots of all second moments at once."""
    return 4 * sum(tensors) if optimizer in ("adamw_torch", "adamw_hf") else 0
