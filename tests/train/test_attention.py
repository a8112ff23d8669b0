"""Attention over segments against a dense softmax whose mask is written out from who stands where."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignctl.train import attention
from alignctl.train.attention import Segment, Segments, Varlen

# Two pairs and a row alone: a prefix of 5 with rests of 3 and 4, one of 2 with a second rest only, and 6 tokens.
PARTS = (Segment(0, 8), Segment(8, 4, 0, 5), Segment(12, 2), Segment(14, 3, 12, 2), Segment(17, 6))
TOTAL = 23
ROWS = [  # the places of each row's tokens, in the order of the row
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 1, 2, 3, 4, 8, 9, 10, 11],
    [12, 13],
    [12, 13, 14, 15, 16],
    [17, 18, 19, 20, 21, 22],
]
WINDOWS = [None, 1, 3, 6, 100]
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
CPU = torch.device("cpu")


def segments(device: torch.device = CPU) -> Segments:
    return Segments(PARTS, TOTAL, device)


def dense_mask(window: int | None) -> Tensor:
    """`[T, T]`: a token sees the tokens before it in its row, itself and at most `window` in all."""
    mask = torch.zeros(TOTAL, TOTAL, dtype=torch.bool)
    for row in ROWS:
        for column, place in enumerate(row):
            first = 0 if window is None else max(0, column - window + 1)
            mask[place] = False
            mask[place, row[first : column + 1]] = True
    return mask


def draw(heads: tuple[int, int], width: int = 8, scale: float = 2.0) -> list[Tensor]:
    """Query, key and value, `[1, heads, T, D]`."""
    random = torch.Generator().manual_seed(1)
    counts = (heads[0], heads[1], heads[1])
    return [(torch.randn(1, n, TOTAL, width, generator=random) * scale).requires_grad_() for n in counts]


def dense(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float | None, softcap: float | None = None
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.stack([x[:, h // groups] for h in range(query.shape[1])], 1) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~dense_mask(window), float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value)


def outcome(
    function: Callable[..., Tensor], given: list[Tensor], *more: Any, **named: Any
) -> tuple[Tensor, list[Tensor]]:
    """What `function` gives, and the gradients of its three inputs."""
    out = function(*given, *more, **named)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    return out.detach(), list(torch.autograd.grad((out.float() * weights).sum(), given))


def compare(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * max(1, theirs.abs().max().item()))


# --- attend -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_attention_over_segments_is_dense_attention(
    heads: tuple[int, int], window: int | None, scaling: float | None, softcap: float | None
) -> None:
    given = draw(heads)
    named = {"scaling": scaling, "sliding_window": window, "softcap": softcap, "dropout": 0.0}
    found = outcome(attention.attend, given, segments(), **named)
    assert found[0].shape == (1, TOTAL, 4, 8) and found[0].is_contiguous()
    compare(found, outcome(dense, given, window, scaling, softcap))


def test_caps_scales_and_windows_matter() -> None:
    given = draw((4, 2))
    plain = attention.attend(*given, segments())
    for named in ({"softcap": 1.5}, {"scaling": 0.7}, {"sliding_window": 3}):
        assert (attention.attend(*given, segments(), **named) - plain).abs().max() > 0.1, named
    torch.testing.assert_close(attention.attend(*given, segments(), sliding_window=9), plain)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_dropout_drops_and_keeps_the_mean(softcap: float | None) -> None:
    torch.manual_seed(0)
    given = draw((4, 2), scale=1.0)
    with torch.no_grad():
        every = [attention.attend(*given, segments(), dropout=0.2, softcap=softcap) for _ in range(2000)]
        plain = attention.attend(*given, segments(), softcap=softcap)
    assert not torch.equal(every[0], every[1])
    assert (torch.stack(every).mean(0) - plain).abs().max() < 0.15


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "sinks", "cache"])
def test_what_no_backend_does_is_refused(name: str) -> None:
    given = draw((4, 4))
    with pytest.raises(NotImplementedError, match=name):
        attention.attend(*given, segments(), **{name: torch.zeros(4)})
    attention.attend(*given, segments(), **{name: None}, is_causal=True)


# --- masks --------------------------------------------------------------------------------------------------------

x, o = True, False


@pytest.mark.parametrize(
    ("part", "window", "expected"),
    [
        (Segment(0, 3), None, None),
        (Segment(0, 3), 3, None),
        (Segment(0, 3), 2, [[x, o, o], [x, x, o], [o, x, x]]),
        (Segment(0, 3), 1, [[x, o, o], [o, x, o], [o, o, x]]),
        (Segment(9, 2, 4, 3), None, [[x, x, x, x, o], [x, x, x, x, x]]),
        (Segment(9, 2, 4, 3), 100, [[x, x, x, x, o], [x, x, x, x, x]]),
        (Segment(9, 2, 4, 3), 4, [[x, x, x, x, o], [o, x, x, x, x]]),
        (Segment(9, 2, 4, 3), 2, [[o, o, x, x, o], [o, o, o, x, x]]),
        (Segment(9, 2, 4, 3), 1, [[o, o, o, x, o], [o, o, o, o, x]]),
    ],
)
def test_masks_by_hand(part: Segment, window: int | None, expected: list[list[bool]] | None) -> None:
    packed = Segments((part,), part.end, CPU)
    found = packed.mask(part, window)
    assert (None if found is None else found.tolist()) == expected
    assert packed.mask(part, window) is found


# --- variable-length attention ------------------------------------------------------------------------------------


def test_bounds_by_hand() -> None:
    packed = Segments((Segment(0, 4), Segment(4, 1, 0, 2), Segment(5, 2), Segment(7, 3, 5, 2)), 10, CPU)
    found = packed.bounds()
    assert found.keys.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 6, 7, 8, 9]
    assert (found.ends_q.tolist(), found.ends_k.tolist()) == ([0, 4, 5, 7, 10], [0, 4, 7, 9, 14])
    assert found.ends_q.dtype == found.ends_k.dtype == torch.int32
    assert (found.longest_q, found.longest_k) == (4, 5)
    assert packed.bounds() is found


def by_loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of `varlen_attn`, one sequence after the other; `[tokens, heads, D]`."""
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    assert (longest_q, longest_k) == (ends_q.diff().max().item(), ends_k.diff().max().item())
    out = []
    for i in range(len(ends_q) - 1):
        q = query[ends_q[i] : ends_q[i + 1]]
        k, v = (y[ends_k[i] : ends_k[i + 1]].repeat_interleave(groups, 1) for y in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
        left, right = (math.inf if side < 0 else side for side in window_size)
        scores = scores.masked_fill((ahead > right) | (-ahead > left), float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(out)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_variable_lengths_say_the_same(
    heads: tuple[int, int], window: int | None, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernel replaced by a loop: the bookkeeping around it, on any machine."""
    monkeypatch.setattr(attention, "varlen_attn", by_loop)
    given = draw(heads)
    found = outcome(attention._by_varlen, given, segments(), scaling, window)
    compare(found, outcome(attention.attend, given, segments(), scaling=scaling, sliding_window=window))


def test_bounds_cover_every_query_once() -> None:
    found = Varlen.of(PARTS, CPU)
    assert found.ends_q[-1] == TOTAL and found.ends_k[-1] == len(found.keys) == TOTAL + 5 + 2
    for part, row, start, end in zip(PARTS, ROWS, found.ends_k[:-1], found.ends_k[1:], strict=True):
        assert found.keys[start:end].tolist() == row and part.shared + part.length == len(row)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_flex_attention_is_dense_attention(heads: tuple[int, int], window: int | None, softcap: float | None) -> None:
    """Uncompiled, and without a backward pass: a CPU has neither."""
    given = [y.detach() for y in draw(heads, width=16)]
    found = attention._by_flex(attention.flex_attention, *given, segments(), 0.7, window, softcap)
    torch.testing.assert_close(found, dense(*given, window, 0.7, softcap), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_flash_attention_is_dense_attention(heads: tuple[int, int], window: int | None) -> None:
    device = torch.device("cuda")
    rounded = [y.detach().bfloat16() for y in draw(heads, width=64, scale=0.5)]
    expected = outcome(dense, [y.float().requires_grad_() for y in rounded], window, None)
    given = [y.to(device).requires_grad_() for y in rounded]
    kernel = outcome(attention._by_varlen, given, segments(device), None, window)
    chosen = outcome(attention.attend, given, segments(device), sliding_window=window)
    for found in (kernel, chosen):
        compare((found[0].float().cpu(), [y.float().cpu() for y in found[1]]), expected, 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("window", [None, 3])
def test_float32_on_a_gpu_is_dense_attention(window: int | None, softcap: float | None) -> None:
    given = draw((4, 2), width=64, scale=0.5)
    there = [y.detach().to("cuda").requires_grad_() for y in given]
    found = outcome(attention.attend, there, segments(there[0].device), sliding_window=window, softcap=softcap)
    compare((found[0].cpu(), [y.cpu() for y in found[1]]), outcome(dense, given, window, None, softcap), 5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
def test_float32_weights_under_autocast(softcap: float | None) -> None:
    """Then rotary embeddings make query and key float32, and the value is what its projection gave."""
    given = draw((4, 2), width=64, scale=0.5)
    query, key, value = (y.detach().to("cuda").requires_grad_() for y in given)
    with torch.autocast("cuda", torch.bfloat16):
        there = [query, key, value.bfloat16()]
        found = outcome(attention.attend, there, segments(query.device), softcap=softcap)
    expected = outcome(dense, given, None, None, softcap)
    compare((found[0].float().cpu(), [y.float().cpu() for y in found[1]]), expected, 3e-2)
