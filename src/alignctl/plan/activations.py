"""Bytes that one block keeps for its backward pass, and what comes and goes while it runs.

Every count is per token of the packed sequence. Formats follow autocast: matrix products give its format, LayerNorm
and powers give float32, and a 4-bit layer gives what it was given.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass.

    Attributes:
        rows: sequences, two to a pair.
        longest: tokens of the longest one.
        tokens: that are computed.
        keys: over all sequences, what is attended to; a shared prompt counts for each.
        supervised: positions that the head projects.
    """

    rows: int
    longest: int
    tokens: int
    keys: int
    supervised: int


@dataclass(frozen=True)
class Block:
    """One block, in bytes a token.

    Attributes:
        first: its input, in the first block.
        input: its input, in all others: the residual stream.
        kept: what the backward pass needs besides an input of float32, which is kept as it is.
        output: of the block without gradients, at its widest: what a reference's pass takes.
        recompute: what a recomputed block holds besides `kept` when it is done.
        backward: what its backward pass holds at most besides `kept`.
        unpacking: the same while a 4-bit matrix is unpacked, without the matrix.
        first_norm: of `kept`, what the first block does not keep, as frozen embeddings need no gradient.
    """

    first: int
    input: int
    kept: float
    output: float
    recompute: float
    backward: float
    unpacking: float
    first_norm: float


def block(shape: Shape, setup: Setup, keys: float) -> Block:
    """A block of the model; `keys` is how many are attended to for each token of the sequence."""
    formats = _Formats(shape, setup)
    mlp_kept, mlp_product = _mlp(shape, setup, formats)
    kept = _norms(shape, setup, formats) + _attention(shape, setup, formats, keys) + mlp_kept
    kept += setup.compute * setup.rank * len(setup.targets)
    grown = formats.stream * shape.width
    into = formats.normed * shape.width
    copied = mlp_product != setup.compute or setup.trains == "adapter"
    product = mlp_product * _inner(shape) if copied else 0
    wide = 4 * _inner(shape) if setup.trains == "adapter" and setup.autocast else 0
    return Block(
        first=formats.embedded * shape.width,
        input=grown,
        kept=kept,
        output=_passing(shape, formats) * _inner(shape) + 2 * grown + into,
        recompute=product + wide + 2 * into + 2 * grown + setup.compute * shape.width,
        backward=(3 * mlp_product - setup.compute) * _inner(shape) + 2 * grown,
        unpacking=setup.compute * _inner(shape) + grown,
        first_norm=4 * shape.width + 4 if setup.adapts and formats.stream != 4 else 0,
    )


class _Formats:
    """Bytes of one number at the places of a block."""

    def __init__(self, shape: Shape, setup: Setup) -> None:
        self.embedded = setup.stored
        layer_norm = shape.family.norm == "layer" and setup.autocast
        packed = setup.trains == "adapter on 4 bits"
        # What a linear layer gives for a normed input, and the MLP for its activation.
        self.normed = 4 if layer_norm else setup.stored
        self.projected = self.normed if packed else setup.compute
        powers = shape.gelu and setup.autocast
        self.activated = 4 if powers else self.projected
        self.stream = max(self.embedded, self.activated if packed else setup.compute)


def _inner(shape: Shape) -> int:
    return shape.inner * (shape.active_experts or 1)


def _norms(shape: Shape, setup: Setup, formats: _Formats) -> float:
    """Norms keep their input in float32; a trained one keeps what it scaled, too."""
    inputs = shape.family.norms - (formats.stream == 4)  # the first one's is the block's own
    out = 4.0 * shape.width * inputs + (8 if shape.family.norm == "layer" else 4) * shape.family.norms
    if not setup.adapts and shape.family.norm == "rms":
        out += formats.stream * shape.width * shape.family.norms
    if shape.family.head_norms:
        out += (4 if setup.compute == 2 else 0) * (shape.queries + shape.keys) + 4 * (shape.heads + shape.key_heads)
    return out


def _inputs(setup: Setup, number: int, consumers: int, *, adapted: int, width: int) -> int:
    """What `consumers` linear layers, `adapted` of them with an adapter, keep of one input of `number` bytes each."""
    if setup.trains == "adapter" and setup.autocast:  # PEFT makes it float32, autocast makes that 16 bits again
        return adapted * setup.compute * width
    needing = adapted if setup.adapts else consumers
    return (needing if number != setup.compute else min(1, needing)) * setup.compute * width


def _reading(shape: Shape, setup: Setup, what: str, names: slice) -> tuple[int, int]:
    """Linear layers among `names` that read `what`, and how many of them have an adapter."""
    found = [each for each in shape.linears()[names] if each.reads == what]
    return len(found), sum(each in setup.targets for each in found)


def _attention(shape: Shape, setup: Setup, formats: _Formats, keys: float) -> float:
    """The normed input, queries, keys and values, the output, and the softmax's normalisers in float32."""
    split = 1 if shape.family.fused else 3
    consumers, adapted = _reading(shape, setup, "hidden", slice(0, split))
    out = float(_inputs(setup, formats.normed, consumers, adapted=adapted, width=shape.width))
    out += setup.compute * (2 * shape.queries + 2 * shape.keys * keys) + 4 * shape.heads
    if shape.rotary < shape.head_width:  # a head that was put together again is laid out by heads, and so is the output
        out += setup.compute * shape.queries
    _, adapted = _reading(shape, setup, "attention", slice(None))
    return out + (setup.compute * shape.queries * adapted if setup.trains == "adapter" and setup.autocast else 0)


def _mlp(shape: Shape, setup: Setup, formats: _Formats) -> tuple[float, int]:
    """What the MLP keeps, and bytes of a number of its product, which the last layer reads."""
    inner, made = _inner(shape), formats.projected
    consumers, adapted = _reading(shape, setup, "hidden", slice(1 if shape.family.fused else 3, None))
    shared = shape.family.parallel and formats.normed == setup.compute and setup.trains != "adapter"
    out = 0.0 if shared else float(_inputs(setup, formats.normed, consumers, adapted=adapted, width=shape.width))
    if shape.family.gated:  # the gate, its activation and the other half
        out, product = out + 3 * made * inner, made
    elif shape.gelu:  # the input of the cube, half the input, tanh, and 1 + tanh
        wide = 4 if setup.autocast else made
        out, product = out + (3 * wide + made) * inner, wide
    else:
        out, product = out + made * inner, made
    _, adapted = _reading(shape, setup, "mlp", slice(None))
    return out + (setup.compute * inner if adapted or not setup.adapts else 0), product


def _passing(shape: Shape, formats: _Formats) -> int:
    """Bytes of the MLP's inner numbers that are there at once when nothing is kept."""
    if shape.gelu and not shape.family.gated:
        return 2 * formats.projected + 2 * formats.activated
    return 3 * formats.projected
