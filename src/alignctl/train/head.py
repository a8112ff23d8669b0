"""Log-probabilities of the supervised tokens, without the logits of anything else.

Only positions whose next token is supervised are projected, in chunks, so the `[N, L, V]` logits never exist. With a
frozen head the gradient of each log-probability is worked out while its logits are there; a trained head projects each
chunk again in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 512


class TokenStatistics(NamedTuple):
    """One number a position, `[P]`; only `logps` carries a gradient."""

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


class Scaling(NamedTuple):
    """What a model does to its logits: `logits * scale`, then `cap * tanh(logits / cap)` where there is a cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Scaled logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of what `apply` was given, from that of the scaled `logits`."""
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale


UNSCALED = Scaling()


def token_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scaling: Scaling = UNSCALED
) -> TokenStatistics:
    """Log-probability of `labels` under `softmax(scaling(hidden @ weight.T + bias))`, and what is logged beside it.

    Args:
        hidden: `[P, H]`.
        weight: `[V, H]`, in the output head.
        bias: `[V]` or None.
        labels: `[P]` token ids.
        scaling: what the model does to its logits.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        args = (hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), labels, scaling)
        return TokenStatistics(*_TokenStatistics.apply(*args))


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scaling: Scaling
    ) -> tuple[Tensor, ...]:
        normalisers, columns, slopes = [], [], []
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        for rows, ids in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            logits = scaling.apply(_logits(rows, weight, bias))
            chosen = logits.gather(1, ids[:, None]).squeeze(1)
            top = logits.amax(1)
            mean = logits.mean(1)
            scaled = torch.exp(logits - top[:, None])
            total = scaled.sum(1)
            normaliser = top + total.log()
            entropy = normaliser - torch.linalg.vecdot(scaled, logits) / total
            normalisers.append(normaliser)
            columns.append(torch.stack([chosen - normaliser, entropy, mean, (chosen >= top).float()]))
            if frozen:
                slopes.append(_slope(scaled.div_(total[:, None]), logits, ids, scaling).to(hidden.dtype) @ weight)
        logps, entropy, mean, is_top1 = torch.cat(columns, 1) if columns else hidden.new_zeros(4, 0).float()
        kept = torch.cat(slopes) if slopes else None
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(normalisers) if normalisers else logps, kept)
        is_top1 = is_top1.bool()
        ctx.scaling = scaling
        ctx.mark_non_differentiable(entropy, mean, is_top1)
        return logps, entropy, mean, is_top1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normalisers, slopes = ctx.saved_tensors
        if slopes is not None:
            return (gradient[:, None] * slopes).to(hidden.dtype), None, None, None, None
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = ctx.scaling.apply(_logits(hidden[part], weight, bias))
            chances = (logits - normalisers[part, None]).exp_()
            d_logits = _slope(chances, logits, labels[part], ctx.scaling).mul_(gradient[part, None]).to(hidden.dtype)
            d_hidden[part] = d_logits @ weight
            if d_weight is not None:
                d_weight += (d_logits.t() @ hidden[part]).float()
            if d_bias is not None:
                d_bias += d_logits.sum(0).float()
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _slope(chances: Tensor, logits: Tensor, labels: Tensor, scaling: Scaling) -> Tensor:
    """The gradient of each label's log-probability by the unscaled logits, `[P, V]`; `chances` is written over."""
    slope = chances.neg_().scatter_add_(1, labels[:, None], torch.ones_like(labels, dtype=chances.dtype)[:, None])
    return scaling.backward(slope, logits)


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(rows, weight, bias).float()
