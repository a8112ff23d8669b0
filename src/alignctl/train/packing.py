"""The packed engine: a batch of rows as one sequence, in which nothing is padded and what two rows share stands once.

A preference batch reaches a model as `[chosen; rejected]`, `2B` padded rows, and rows i and B + i begin alike: with the
prompt, and with whatever the answers have in common at their start. Under causal attention the hidden states of that
prefix are the same in both, so it is computed once:

    [prefix 1 | rest of chosen 1 | rest of rejected 1 | prefix 2 | …]

Each rest attends to its prefix and to itself, at the positions that it has in its row. The hidden states are gathered
back into the `[2B, L, H]` that the trainer expects, so that losses and metrics stay the trainer's and the gradients are
the same up to rounding. The prefix is found by comparing ids; rows that share nothing are packed all the same.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignctl.train import attention
from alignctl.train.attention import Segment, Segments


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch `[N, L]` stand in the packed sequence of `T` tokens.

    Attributes:
        ids: `[1, T]`.
        positions: `[1, T]`, of each token in its row.
        gather: `[N, L]`, the place of each token; 0 for padding.
        segments: what attends to what.
    """

    ids: Tensor
    positions: Tensor
    gather: Tensor
    segments: Segments


def shared_prefixes(ids: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens rows i and B + i have in common at their start, `[B]`.

    Args:
        ids: `[2B, L]`.
        lengths: `[2B]`, the tokens of each row.
    """
    first, second = ids.chunk(2)
    within = torch.arange(ids.shape[1], device=ids.device) < torch.minimum(*lengths.chunk(2))[:, None]
    return ((first == second) & within).long().cumprod(1).sum(1)


def lay_out(ids: Tensor, mask: Tensor) -> Layout:
    """The layout of the rows `ids` `[N, L]`, which are padded on the right where `mask` `[N, L]` is 0."""
    count, width = ids.shape
    half = count // 2 if count % 2 == 0 else count
    lengths = mask.sum(1)
    shared = shared_prefixes(ids, lengths).tolist() if half < count else [0] * count
    long = lengths.tolist()
    gather = torch.zeros(count, width, dtype=torch.long)
    segments: list[Segment] = []
    total = 0
    for i, prefix in enumerate(shared):
        origin = total
        total = _place(gather[i], segments, Segment(total, long[i]))
        if half < count:
            total = _place(gather[half + i], segments, Segment(total, long[half + i] - prefix, origin, prefix))
    gather, real = gather.to(ids.device), mask.bool()
    # Where a token stands in the batch; both rows of a pair write a shared token, and either may win.
    source = torch.zeros(total, dtype=torch.long, device=ids.device)
    source[gather[real]] = real.flatten().nonzero().squeeze(1)
    packed = Segments(tuple(segments), total, ids.device)
    return Layout(ids.flatten()[source][None], (source % width)[None], gather, packed)


def _place(row: Tensor, segments: list[Segment], part: Segment) -> int:
    """Note where the tokens of one row stand; the place after them."""
    row[: part.shared] = torch.arange(part.origin, part.origin + part.shared)
    row[part.shared : part.shared + part.length] = torch.arange(part.start, part.end)
    if part.length:
        segments.append(part)
    return part.end


# Architectures whose packed and padded results were compared (tests/train/test_packing.py).
PACKS = frozenset(
    {"cohere", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_neox", "granite", "granitemoe", "llama", "mistral"}
    | {"mixtral", "olmo", "olmo2", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
    | {"smollm3", "starcoder2"}
)
# Rounding alone moves a token's hidden state by up to 2e-6 in float32 and 3e-2 in bfloat16 (SmolLM2-135M); a position
# off by one, or a prefix one token too long, moves it by 4e-1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}


def why_not(model: PreTrainedModel, *, known: bool = True) -> str:
    """What keeps `model` from being packed; empty when nothing does. `known` asks for a tested architecture."""
    config = backbone(model).config
    if known and config.model_type not in PACKS:
        return f"{config.model_type} is not among the architectures that packing was tested with"
    if config.to_dict().get("use_bidirectional_attention"):
        return "attention that looks ahead cannot share a prefix"
    return ""


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head, and without the adapter around it."""
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    found: PreTrainedModel = owner.base_model
    return found


@dataclass(frozen=True)
class Difference:
    """A batch computed packed and padded: how far apart, and how many tokens each way.

    `worst` is the largest relative difference of one token's last hidden state, ‖packed - padded‖ / ‖padded‖.
    """

    worst: float
    limit: float
    packed_tokens: int
    padded_tokens: int


@torch.no_grad()
def compare(model: PreTrainedModel, ids: Tensor, mask: Tensor, precision: torch.dtype) -> Difference:
    """Compute the batch `ids` `[N, L]` both ways, without gradients and without dropout.

    Raises:
        ValueError: the rows are not padded on the right.
    """
    if not _is_packable(mask, {}):
        raise ValueError("rows must be padded on the right to be packed")
    inner, training = backbone(model), model.training
    model.eval()
    real = mask.bool()
    try:
        packed = inner(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[real].float()
        with padded(model):
            plain = inner(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[real].float()
    finally:
        model.train(training)
    worst = ((packed - plain).norm(dim=-1) / plain.norm(dim=-1)).max().item()
    return Difference(worst, TOLERANCE[precision], lay_out(ids, mask).segments.total, ids.numel())


def install(model: PreTrainedModel) -> None:
    """Let the backbone of `model` compute right-padded batches packed; what uses a cache stays as it is."""
    inner = backbone(model)
    inner.attention_before = attention.install(inner.config)
    inner.plain = inner.forward

    @functools.wraps(type(inner).forward)
    def forward(self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if input_ids is None or attention_mask is None or not self.packs or not _is_packable(attention_mask, kwargs):
            return self.plain(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        found = lay_out(input_ids, attention_mask)
        # Four axes: transformers takes such a mask for ready and makes none; attention over segments needs none.
        ready = torch.zeros(1, 1, 1, 1, device=input_ids.device)
        given = {"position_ids": found.positions, "packed": found.segments, "use_cache": False}
        out = self.plain(input_ids=found.ids, attention_mask=ready, **{**kwargs, **given})
        out.last_hidden_state = out.last_hidden_state[0][found.gather]
        if out.get("router_logits") is not None:  # one row a token; a router's loss leaves out what the mask does
            out.router_logits = tuple(each[found.gather.flatten()] for each in out.router_logits)
        return out

    inner.packs = True
    inner.forward = types.MethodType(forward, inner)


def uninstall(model: PreTrainedModel) -> None:
    """Undo `install`."""
    inner = backbone(model)
    attention.uninstall(inner.config, inner.attention_before)
    del inner.forward, inner.plain, inner.packs, inner.attention_before


def _is_packable(mask: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a batch is one of training: no cache, no positions or outputs of its own, and padded on the right."""
    if mask.ndim != 2 or any(kwargs.get(name) for name in _FLAGS) or any(kwargs.get(n) is not None for n in _OWN):
        return False
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


_OWN = ("past_key_values", "position_ids", "inputs_embeds")
_FLAGS = ("use_cache", "output_hidden_states", "output_attentions")


@contextmanager
def padded(model: PreTrainedModel) -> Iterator[None]:
    """Inside, batches are computed as they come."""
    inner = backbone(model)
    before, inner.packs = inner.packs, False
    try:
        yield
    finally:
        inner.packs = before
