"""Peak memory of a run, line by line: docs/memory.md has every formula."""

from __future__ import annotations

from dataclasses import dataclass

from alignctl.plan import weights
from alignctl.plan.activations import Batch, Block, block
from alignctl.plan.setup import Setup
from alignctl.plan.shape import Shape

GIB = 2**30
# Positions that the head projects at once, as train/head.py has it.
CHUNK = 512
# Not measured on a GPU yet: what a CUDA context with its kernels takes, and what the allocator loses between blocks.
CONTEXT = GIB // 2
FRAGMENTATION = 0.05
COPIES = "16-bit copies of trained weights"


@dataclass(frozen=True)
class Line:
    """One entry of the plan, in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """What is held in every phase of a training step, and what is around it.

    Attributes:
        phases: their lines, by name.
        host: the optimizer's state in paged memory, which moves to the host when the GPU is full.
    """

    phases: dict[str, list[Line]]
    host: int
    cuda: bool = True

    @property
    def phase(self) -> str:
        """Where the peak is."""
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def lines(self) -> list[Line]:
        """What the peak is made of."""
        return self.phases[self.phase]

    @property
    def allocated(self) -> int:
        """Peak bytes of all tensors: what `torch.cuda.max_memory_allocated` is compared with."""
        return total(self.lines)

    @property
    def around(self) -> list[Line]:
        """What a process takes on a GPU besides its tensors."""
        if not self.cuda:
            return []
        lost = round(FRAGMENTATION * self.allocated)
        return [Line("CUDA context and kernels (assumed)", CONTEXT), Line("lost between blocks (assumed, 5 %)", lost)]

    @property
    def needed(self) -> int:
        """Bytes that must be free."""
        return self.allocated + total(self.around)


def total(lines: list[Line]) -> int:
    """Bytes of all lines."""
    return sum(line.bytes for line in lines)


def of(shape: Shape, setup: Setup, batch: Batch) -> Memory:
    """The memory of a training step on `batch`, the largest one."""
    still = standing(shape, setup)
    host = weights.states(weights.trained(shape, setup), setup.optimizer)[1]
    phases = {"loading": _loading(shape, setup), **_passes(shape, setup, batch)}
    step = [gradients(shape, setup), Line("optimizer's step", _scratch(shape, setup))]
    phases["optimizer step"] = step
    there = {name: [line for line in still + lines if line.bytes] for name, lines in phases.items()}
    return Memory(there, host, setup.cuda)


def standing(shape: Shape, setup: Setup) -> list[Line]:
    """What is there all the time."""
    base = weights.base(shape, setup)
    adapters = 4 * sum(weights.adapters(setup, shape.layers))
    state, _ = weights.states(weights.trained(shape, setup), setup.optimizer)
    other = {"second model": 4 * shape.parameters(), "second adapter": adapters}.get(setup.reference, 0)
    return [
        *(Line(name, size) for name, size in base.items()),
        Line("adapters", adapters),
        Line(f"reference: {setup.reference}", other),
        Line("optimizer state", state),
    ]


def gradients(shape: Shape, setup: Setup) -> Line:
    """Of all trained weights, in float32 as they are."""
    return Line("gradients", 4 * sum(weights.trained(shape, setup)))


def _scratch(shape: Shape, setup: Setup) -> int:
    return weights.scratch(weights.trained(shape, setup), setup.optimizer)


def _loading(shape: Shape, setup: Setup) -> list[Line]:
    """A matrix arrives in 16 bits before it is packed."""
    largest = max(each.weights for each in shape.linears())
    return [Line("a matrix before it is packed", 2 * largest if setup.trains == "adapter on 4 bits" else 0)]


def _passes(shape: Shape, setup: Setup, batch: Batch) -> dict[str, list[Line]]:
    one = block(shape, setup, batch.keys / batch.tokens)
    held = _held(shape, setup, batch, one)
    grown = gradients(shape, setup)
    before = [grown] if setup.accumulates else []
    head = _head(shape, setup, batch)
    passing = Line("a block's pass", round(one.output * batch.tokens) + _unpacked(shape, setup))
    phases = {"forward": [*before, *held, *_wider(head, [passing])]}
    if setup.reference != "none":
        head_again = [*head, Line("reference's hidden states", setup.compute * batch.supervised * shape.width)]
        phases["reference's pass"] = [*before, *held, *_results(shape, setup, batch), *_wider(head_again, [passing])]
    if not setup.adapts:
        after = [line for line in held if not setup.checkpointing or line.name != COPIES]
        phases["head's backward"] = [*before, *after, *_head_backward(shape, setup, batch)]
    inside = _in_block(shape, setup, batch, one)
    inputs = _inputs(shape, setup, batch, one)
    phases["backward, last block"] = [*before, *inputs, *inside]
    entering = Line("inputs of blocks", round(one.first * batch.tokens))
    last = 0 if setup.adapts else shape.block() + (0 if shape.tied else shape.embeddings())
    grown_so_far = Line("gradients", grown.bytes - (0 if setup.accumulates else 4 * last))
    phases["backward, first block"] = [grown_so_far, entering, *inside]
    if not setup.adapts:
        # Of embeddings that are the head, too, the gradient is there twice until both are added.
        gradient = 4 * shape.width * batch.tokens + (4 * shape.embeddings() if shape.tied or setup.accumulates else 0)
        phases["backward, embeddings"] = [grown, Line("gradient of the embeddings", gradient)]
    return phases


def _wider(one: list[Line], other: list[Line]) -> list[Line]:
    return max(one, other, key=total)


def _copies(shape: Shape, setup: Setup) -> int:
    """Autocast's copies of one block's trained matrices."""
    if not setup.autocast:
        return 0
    count = sum(weights.adapters(setup, 1)) if setup.adapts else sum(each.weights for each in shape.linears())
    return setup.compute * count


def _inputs(shape: Shape, setup: Setup, batch: Batch, one: Block) -> list[Line]:
    """What is held for all blocks: their inputs, or without checkpointing everything."""
    between = one.first + one.input * (shape.layers - 1)
    rotary = 2 * setup.stored * shape.rotary * batch.tokens
    if setup.checkpointing:
        return [Line("inputs of blocks", round(between * batch.tokens) + rotary)]
    wide = between if setup.stored == 4 else one.input * (shape.layers - 1) if one.input == 4 * shape.width else 0
    kept = round((one.kept * shape.layers - one.first_norm + wide) * batch.tokens) + rotary
    return [
        Line("activations of all blocks", kept),
        Line(COPIES, _copies(shape, setup) * shape.layers),
    ]


def _held(shape: Shape, setup: Setup, batch: Batch, one: Block) -> list[Line]:
    """What the forward pass leaves behind when it reaches the head."""
    held = _inputs(shape, setup, batch, one)
    if setup.checkpointing:
        held.append(Line(COPIES, _copies(shape, setup) * shape.layers))
    norm = 4 * shape.width + (8 if shape.family.norm == "layer" else 4)
    norm += 4 * shape.width if not setup.adapts and shape.family.norm == "rms" else 0
    places = 8 * batch.rows * batch.longest  # of the rows' tokens in the packed sequence
    return [*held, Line("last norm", norm * batch.tokens), Line("places of tokens", places if setup.packed else 0)]


def _results(shape: Shape, setup: Setup, batch: Batch) -> list[Line]:
    """What the head keeps: hidden states, and with frozen weights the gradient of each."""
    one = setup.compute * batch.supervised * shape.width
    head = 0 if setup.adapts or not setup.autocast else setup.compute * shape.embeddings()
    return [
        Line("head: what it keeps", one * (2 if setup.adapts else 1)),
        Line("head: copy that is kept", head),
    ]


def _head(shape: Shape, setup: Setup, batch: Batch) -> list[Line]:
    """The padded hidden states, and a chunk's logits: four times in float32, three when there is one chunk."""
    chunk = min(CHUNK, batch.supervised)
    times = 4 if batch.supervised > CHUNK else 3
    normed = 4 if (shape.family.norm == "layer" and setup.autocast) else setup.stored
    gathered = batch.rows * batch.longest * shape.width * normed
    wide = batch.supervised * shape.width * normed if normed != setup.compute else 0
    copy = 0 if setup.adapts or not setup.autocast else setup.compute * shape.embeddings()
    hidden = setup.compute * batch.supervised * shape.width * (2 if setup.adapts else 1)
    return [
        Line("head: hidden states", gathered + wide + hidden),
        Line("head: copy", copy),
        Line("head: logits of a chunk", times * 4 * chunk * shape.vocabulary),
    ]


def _head_backward(shape: Shape, setup: Setup, batch: Batch) -> list[Line]:
    """A trained head: its chunk again, and its gradient in float32, once as a sum, once as a summand."""
    chunk = min(CHUNK, batch.supervised) * shape.vocabulary
    size = shape.embeddings()
    both = 2 * setup.compute * batch.supervised * shape.width
    gradient = (4 + 4 + setup.compute) * size if setup.autocast else 12 * size
    copy = setup.compute * size if setup.autocast else 0
    return [
        Line("head: hidden states", both),
        Line("head: copy", copy),
        Line("head: gradient", gradient),
        Line("head: logits of a chunk", (8 + setup.compute) * chunk),
    ]


def _in_block(shape: Shape, setup: Setup, batch: Batch, one: Block) -> list[Line]:
    """A block's backward pass: recomputed where it was not kept, and the gradients inside it."""
    matrix = _unpacked(shape, setup)
    ways = [one.backward * batch.tokens, one.unpacking * batch.tokens + matrix]
    lines = []
    if setup.checkpointing:
        ways.append(one.recompute * batch.tokens + matrix)
        lines = [Line("a block recomputed", round(one.kept * batch.tokens)), Line("its copies", _copies(shape, setup))]
    if not setup.adapts:
        largest = max(each.weights for each in shape.linears())
        ways = [way + (4 + setup.compute) * largest for way in ways]
    return [*lines, Line("gradients inside a block", round(max(ways)))]


def _unpacked(shape: Shape, setup: Setup) -> int:
    """The largest matrix in 16 bits, for its product."""
    if setup.trains != "adapter on 4 bits":
        return 0
    return setup.compute * max(each.weights for each in shape.linears())
