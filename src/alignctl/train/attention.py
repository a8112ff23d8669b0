"""Attention over the segments of one packed sequence, behind transformers' own attention interface."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PACKED = "packed|"


@dataclass(frozen=True)
class Segment:
    """Tokens `start … end` attend causally to themselves, and to all `shared` tokens from `origin` on before them."""

    start: int
    length: int
    origin: int = 0
    shared: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Segments:
    """The segments of a packed sequence of `total` tokens, in its order, and what is worked out from them once."""

    parts: tuple[Segment, ...]
    total: int
    device: torch.device
    masks: dict[tuple[Segment, int | None], Tensor | None] = field(default_factory=dict)
    varlen: list[Varlen] = field(default_factory=list)
    flex: dict[int | None, BlockMask] = field(default_factory=dict)

    def mask(self, part: Segment, window: int | None) -> Tensor | None:
        """`[length, shared + length]`, True where a token of `part` attends; None where it is plainly causal.

        `window` is the most tokens that a token sees, itself included.
        """
        if (part, window) not in self.masks:
            self.masks[part, window] = self._mask(part, window)
        return self.masks[part, window]

    def _mask(self, part: Segment, window: int | None) -> Tensor | None:
        keys = part.shared + part.length
        if not part.shared and (window is None or keys <= window):
            return None
        behind = torch.arange(part.shared, keys, device=self.device)[:, None] - torch.arange(keys, device=self.device)
        return behind >= 0 if window is None else (behind >= 0) & (behind < window)

    def bounds(self) -> Varlen:
        """The segments as variable-length attention takes them."""
        if not self.varlen:
            self.varlen.append(Varlen.of(self.parts, self.device))
        return self.varlen[0]

    def blocks(self, window: int | None) -> BlockMask:
        """The segments as FlexAttention takes them."""
        if window not in self.flex:
            size = self.total
            self.flex[window] = create_block_mask(self._allows(window), None, None, size, size, device=self.device)
        return self.flex[window]

    def _allows(self, window: int | None) -> Callable[..., Tensor]:
        columns = zip(*((p.start, p.origin, p.shared) for p in self.parts), strict=True)
        lengths = torch.tensor([p.length for p in self.parts])
        start, origin, shared = (torch.tensor(c).repeat_interleave(lengths).to(self.device) for c in columns)
        position = shared + torch.arange(self.total, device=self.device) - start

        def allows(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = (k >= start[q]) & (k <= q)
            prefix = (k >= origin[q]) & (k < origin[q] + shared[q])
            seen = own | prefix
            return seen if window is None else seen & (position[q] - position[k] < window)

        return allows


@dataclass(frozen=True)
class Varlen:
    """Segments as sequences of queries, and of keys: its prefix, then the segment.

    Attributes:
        keys: `[K]`, the place of every key.
        ends_q, ends_k: `[S + 1]`, int32, where each sequence ends, from 0 on.
        longest_q, longest_k: tokens.
    """

    keys: Tensor
    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int

    @staticmethod
    def of(parts: tuple[Segment, ...], device: torch.device) -> Varlen:
        """For `parts` in the order of the sequence."""
        keys = [torch.arange(a, b) for p in parts for a, b in ((p.origin, p.origin + p.shared), (p.start, p.end))]
        q, k = [p.length for p in parts], [p.shared + p.length for p in parts]
        ends_q, ends_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32).to(device) for x in (q, k))
        return Varlen(torch.cat(keys).to(device), ends_q, ends_k, max(q), max(k))


def install(config: PretrainedConfig) -> str:
    """Let models of `config` take `packed=Segments` in their forward; without it they attend as before.

    Returns the name of the attention before, for `uninstall`.
    """
    before: str = config._attn_implementation
    name = _PACKED + before
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _function(before))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    config._attn_implementation = name
    return before


def uninstall(config: PretrainedConfig, before: str) -> None:
    """Undo `install`."""
    config._attn_implementation = before


def _function(before: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed is not None:
            return attend(query, key, value, packed, **kwargs), None
        plain = sys.modules[type(module).__module__].eager_attention_forward if before == "eager" else None
        found: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS.get_interface(before, plain)(
            module, query, key, value, attention_mask, **kwargs
        )
        return found

    return attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Segments,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> Tensor:
    """Attention of a packed sequence: `[1, heads, T, D]` with `[1, heads or fewer, T, D]` to `[1, T, heads, D]`.

    Raises:
        NotImplementedError: the model wants what no backend here does.
    """
    wanted = sorted(name for name in _REFUSED if unused.get(name) is not None)
    if wanted:
        raise NotImplementedError(f"attention with {', '.join(wanted)}")
    if torch.is_autocast_enabled(query.device.type):  # float32 weights give float32 queries beside lower values
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and not dropout and torch.cuda.get_device_capability(query.device) >= AMPERE:
        if softcap is None and _flash(query):
            return _by_varlen(query, key, value, packed, scaling, sliding_window)
        return _by_flex(_compiled_flex(), query, key, value, packed, scaling, sliding_window, softcap)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = []
    for part in packed.parts:
        k, v = key[:, :, part.start : part.end], value[:, :, part.start : part.end]
        if part.shared:
            prefix = slice(part.origin, part.origin + part.shared)
            k, v = torch.cat([key[:, :, prefix], k], 2), torch.cat([value[:, :, prefix], v], 2)
        mask = packed.mask(part, sliding_window)
        q = query[:, :, part.start : part.end]
        if softcap is not None:
            out.append(_softcapped(q, k, v, mask, scaling, softcap, dropout))
        else:
            out.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling))
    return torch.cat(out, 2).transpose(1, 2).contiguous()


# What transformers hands to an attention function that changes its result.
_REFUSED = ("s_aux", "position_bias", "cache", "sinks")

AMPERE = (8, 0)  # what flash attention's kernels and FlexAttention in bfloat16 need
# torch 2.11 has the kernel for fewer key heads, and no argument for it.
_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _flash(query: Tensor) -> bool:
    return query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _by_varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """Flash attention over sequences of different lengths; causal from the bottom right, as longer keys need it."""
    bounds = packed.bounds()
    grouped: Any = {"enable_gqa": query.shape[1] != key.shape[1]} if _HAS_GQA else {}
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q,
        k[bounds.keys],
        v[bounds.keys],
        bounds.ends_q,
        bounds.ends_k,
        bounds.longest_q,
        bounds.longest_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _by_flex(
    flex: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Segments,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """FlexAttention over the whole sequence, for heads and dtypes that flash attention has no kernel for."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    out: Tensor = flex(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=packed.blocks(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, cap: float, dropout: float
) -> Tensor:
    """Attention whose scores are `cap * tanh(score / cap)`, as Gemma 2 has it; no fused kernel on a CPU does that."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / cap) * cap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")).float()
    return F.dropout(scores.softmax(-1).to(query.dtype), dropout) @ value
