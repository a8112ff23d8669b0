"""A training step without numbers: every tensor has shape, dtype and lifetime, as it would have them on a GPU.

torch's fake tensors run the real modules, PEFT's adapters, autograd, checkpointing and alignctl's own engine and head
without computing anything, so that a model of any size takes a second; what is alive is counted as torch's allocator
would. They stand on the CPU, so what is otherwise on CUDA is put right: flash attention is taken, LayerNorm and powers
are computed in float32 under autocast, and a 4-bit layer unpacks its weights as bitsandbytes does there.
"""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alignctl.train import attention, packing
from alignctl.train.attention import Segment, Segments
from alignctl.train.head import token_statistics

_BLOCK = 512  # torch's allocator rounds up to this


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}
        self.made: dict[int, str] = {}
        self.at_peak: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and hasattr(tensor, "fake_mode"):
                self._note(tensor, str(func))
        return out

    def _note(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = math.ceil(storage.nbytes() / _BLOCK) * _BLOCK
        self._seen[key], self.made[key] = size, f"{size:>14,} {name} {tensor.dtype} {tuple(tensor.shape)}"
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, list(self.made.values())
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key)
        del self.made[key]

    def most(self) -> int:
        """The peak since this was asked last."""
        found, self.peak = self.peak, self.now
        return found


class _Product(torch.autograd.Function):
    """`x @ W.T` with a W that is unpacked for it, in both directions, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return F.linear(x, torch.empty(shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None, None


class Packed(Linear4bit):
    """A 4-bit layer by its sizes."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.shape = (layer.out_features, layer.in_features)
        blocks = math.ceil(layer.weight.numel() / 64)
        self.weight = nn.Parameter(torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
        self.state = [torch.empty(n, dtype=torch.uint8) for n in (blocks, 4 * math.ceil(blocks / 256), 1024, 64, 4)]
        self.bias, self.compute_dtype = layer.bias, torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return _Product.apply(x.to(torch.bfloat16), self.shape, bias).to(x.dtype)


@dataclass(frozen=True)
class Step:
    """Bytes: of the model; then, above it, held after the forward pass, and the most in each phase."""

    model: int
    held: int
    forward: int
    reference: int
    backward: int
    gradients: int
    at_peak: list[str]


def step(
    config: PreTrainedConfig, how: str, *, pairs: int, prompt: int, answer: int, checkpointing: bool, reference: bool
) -> Step:
    """One forward and backward pass of `pairs` pairs, `how` being qlora, lora or full."""
    alive = Alive()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), alive:
        _like_cuda(patch)
        model = _model(config, how, checkpointing)
        other = _model(config, how, False) if reference and how == "full" else None
        if other is not None:
            other.requires_grad_(False)
        batch = _Batch(pairs, prompt, answer)
        gc.collect()
        before = alive.now
        alive.most()
        with torch.autocast("cpu", torch.bfloat16):
            logps = batch.score(model)
            held, forward = alive.now - before, alive.most() - before
            if reference:
                _without(model, other, batch)
            most_reference = alive.most() - before
        alive.at_peak = []
        logps.sum().backward()
        most_backward = alive.most() - before
        del logps
        gc.collect()
        return Step(before, held, forward, most_reference, most_backward, alive.now - before, alive.at_peak)


def _without(model: Any, other: Any, batch: _Batch) -> None:
    """The reference's pass: another model, or the adapter switched off."""
    switched_off = model.disable_adapter() if other is None else contextlib.nullcontext()
    with torch.no_grad(), switched_off:
        batch.score(other or model)


def _model(config: PreTrainedConfig, how: str, checkpointing: bool) -> Any:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if how == "full" else torch.bfloat16)
    model.config.use_cache = False
    if how == "qlora":
        _pack(model)
    if how != "full":
        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if how != "full":
            model.enable_input_require_grads()
    model.train()
    attention.install(packing.backbone(model).config)
    gc.collect()
    return model


def _pack(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                setattr(parent, name, Packed(layer))
    model.is_loaded_in_4bit = True


class _Batch:
    """Pairs of equal lengths, laid out as the packed engine does."""

    def __init__(self, pairs: int, prompt: int, answer: int) -> None:
        parts: list[Segment] = []
        for _ in range(pairs):
            start = parts[-1].end if parts else 0
            parts += [Segment(start, prompt + answer), Segment(start + prompt + answer, answer, start, prompt)]
        self.total = parts[-1].end
        self.segments = Segments(tuple(parts), self.total, torch.device("cpu"))
        self.segments.bounds()
        self.ids = torch.zeros(1, self.total, dtype=torch.long)
        self.gather = torch.zeros(2 * pairs, prompt + answer, dtype=torch.long)
        self.supervised = torch.zeros(2, 2 * pairs * answer, dtype=torch.long)

    def score(self, model: Any) -> Tensor:
        """Log-probabilities of the answers, as `trl_seam.install_head` computes them."""
        given = {"attention_mask": torch.zeros(1, 1, 1, 1), "position_ids": self.ids, "packed": self.segments}
        out = packing.backbone(model)(input_ids=self.ids, use_cache=False, **given)
        out.last_hidden_state = hidden = out.last_hidden_state[0][self.gather]
        head = model.get_output_embeddings()
        return token_statistics(hidden[*self.supervised], head.weight, head.bias, self.supervised[0]).logps


def _like_cuda(patch: pytest.MonkeyPatch) -> None:
    """What differs between the two devices' dispatch."""
    plain, is_autocast, norm, power = attention.attend, torch.is_autocast_enabled, F.layer_norm, torch.pow

    def attend(query: Tensor, key: Tensor, value: Tensor, packed: Segments, **options: Any) -> Tensor:
        if not is_autocast("cpu"):
            return plain(query, key, value, packed, **options)
        q, k, v = (x.bfloat16() for x in (query, key, value))
        return attention._by_varlen(q, k, v, packed, options.get("scaling"), options.get("sliding_window"))

    def layer_norm(
        x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        wide = [None if t is None else t.float() if is_autocast("cpu") else t for t in (x, weight, bias)]
        return norm(wide[0], shape, wide[1], wide[2], eps)

    patch.setattr(attention, "attend", attend)
    patch.setattr(F, "layer_norm", layer_norm)
    patch.setattr(torch, "pow", lambda x, exponent: power(x.float() if is_autocast("cpu") else x, exponent))
    patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": is_autocast("cpu"))
    for name in ("uniform_", "normal_"):  # in numbers that are not there
        patch.setattr(Tensor, name, lambda self, *args, **options: self)
    patch.setattr(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *args, **options: None)
    patch.setattr(nn.Module, "to", lambda self, *args, **options: self)
