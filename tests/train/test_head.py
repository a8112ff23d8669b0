"""The compact head against full logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignctl.train import head


def full(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scaling: head.Scaling
) -> head.TokenStatistics:
    logits = torch.nn.functional.linear(hidden, weight, bias) * scaling.scale
    if scaling.cap is not None:
        logits = scaling.cap * torch.tanh(logits / scaling.cap)
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    chosen = logps.gather(1, labels[:, None]).squeeze(1)
    return head.TokenStatistics(chosen, entropy, logits.mean(-1), logits.argmax(-1) == labels)


@pytest.mark.parametrize("positions", [1, 7, 8, 21])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scaling", [head.UNSCALED, head.Scaling(0.25), head.Scaling(1.0, 1.5), head.Scaling(2.0, 3.0)])
def test_equals_full_logits(
    monkeypatch: pytest.MonkeyPatch, positions: int, with_bias: bool, scaling: head.Scaling
) -> None:
    monkeypatch.setattr(head, "CHUNK", 7)
    torch.manual_seed(positions)
    hidden, weight = torch.randn(positions, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    bias = torch.randn(11, requires_grad=True) if with_bias else None
    labels = torch.randint(11, (positions,))
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    upstream = torch.randn(positions)
    ours = head.token_statistics(hidden, weight, bias, labels, scaling)
    theirs = full(hidden, weight, bias, labels, scaling)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad((ours.logps * upstream).sum(), leaves)
    other = torch.autograd.grad((theirs.logps * upstream).sum(), leaves)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_positions() -> None:
    hidden = torch.zeros(0, 5, requires_grad=True)
    found = head.token_statistics(hidden, torch.randn(11, 5), None, torch.zeros(0, dtype=torch.long))
    assert [len(x) for x in found] == [0, 0, 0, 0]
    found.logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 5)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 5, requires_grad=True), torch.randn(11, 5)
    head.token_statistics(hidden, weight, None, torch.tensor([1, 2, 3])).logps.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_computes_in_autocasts_dtype() -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(11, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = head.token_statistics(hidden, weight, None, torch.tensor([1, 2, 3]))
    expected = full(hidden.bfloat16(), weight.bfloat16(), None, torch.tensor([1, 2, 3]), head.UNSCALED)
    assert found.logps.dtype == torch.float32
    torch.testing.assert_close(found.logps, expected.logps.float(), rtol=0.02, atol=0.05)
