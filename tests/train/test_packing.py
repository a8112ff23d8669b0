"""The packed layout against hand-made and random rows, and packed against padded forwards of every architecture."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from alignctl.train import packing
from alignctl.train.attention import Segment
from alignctl.train.packing import Layout

VOCABULARY = 128
KV = {"num_key_value_heads": 2}
WIDE = {**KV, "head_dim": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
WINDOW = {"sliding_window": 8}
QWEN_WINDOW = {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral/window": {**KV, **WINDOW},
    "phi3/window": {**KV, "pad_token_id": 0, **WINDOW},
    "qwen2/window": {**KV, **QWEN_WINDOW},
    "qwen3/window": {**WIDE, **QWEN_WINDOW},
    "smollm3/window": {**KV, "use_sliding_window": True, "no_rope_layer_interval": 2, **WINDOW},
    "gemma2/window": {**WIDE, **WINDOW},
    "gemma3_text/window": {**WIDE, **WINDOW},
    "starcoder2/window": {**KV, **WINDOW},
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
QWEN_EXPERTS |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
ROUTED: dict[str, dict[str, Any]] = {
    "granitemoe": {**KV, **EXPERTS},
    "mixtral": {**KV, **EXPERTS},
    "olmoe": {**KV, **QWEN_EXPERTS},
    "phimoe": {**KV, **EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2_moe": {**KV, **QWEN_EXPERTS},
    "qwen3_moe": {**WIDE, **QWEN_EXPERTS},
}
CASES: dict[str, dict[str, Any]] = {
    "cohere": KV,
    "gemma": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "glm": WIDE,
    "gpt2": {},
    "gpt2/scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {},
    "granite": {**KV, "attention_multiplier": 0.3},
    "llama": KV,
    "llama/dynamic rope": {**KV, "max_position_embeddings": 32, "rope_scaling": DYNAMIC},
    "mistral": KV,
    "olmo": {},
    "olmo2": {},
    "phi": {"qk_layernorm": True},
    "phi3": {**KV, "pad_token_id": 0},
    "qwen2": KV,
    "qwen3": WIDE,
    "smollm3": KV,
    "starcoder2": {**KV, "sliding_window": None},
    **ROUTED,
    **WINDOWED,
}


def make(name: str, attention: str | None = None, **more: Any) -> PreTrainedModel:
    """A random model of the case `name`, with weights large enough for attention to matter, and without dropout."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    shape |= {"initializer_range": 0.2, "pad_token_id": 0}
    set_seed(0)
    config = AutoConfig.for_model(name.split("/")[0], **{**shape, **CASES.get(name, KV), **more})
    chosen = {} if attention is None else {"attn_implementation": attention}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **chosen).float()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    return model.eval()


def right_padded(rows: list[list[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def pairs() -> tuple[Tensor, Tensor]:
    """Three pairs, which share 10, 15 and 20 tokens before answers of 4 to 19."""
    draw = torch.Generator().manual_seed(0)
    rows: list[list[int]] = [[] for _ in range(6)]
    for i in range(3):
        prefix = torch.randint(3, VOCABULARY, (10 + i * 5,), generator=draw).tolist()
        for j in (i, 3 + i):
            rows[j] = prefix + torch.randint(3, VOCABULARY, (4 + 3 * j,), generator=draw).tolist()
    return right_padded(rows)


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, **given: Any) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, **{"use_cache": False, **given}).logits[mask.bool()]


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= relative * expected.abs().max()


# --- layout -------------------------------------------------------------------------------------------------------


def test_layout_by_hand() -> None:
    ids, mask = right_padded([[5, 6, 7, 8], [9, 4], [5, 6, 3], [9, 4, 4, 1, 2]])
    found = packing.lay_out(ids, mask)
    assert found.ids.tolist() == [[5, 6, 7, 8, 3, 9, 4, 4, 1, 2]]
    assert found.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 3, 4]]
    assert found.gather.tolist() == [[0, 1, 2, 3, 0], [5, 6, 0, 0, 0], [0, 1, 4, 0, 0], [5, 6, 7, 8, 9]]
    assert found.segments.parts == (Segment(0, 4), Segment(4, 1, 0, 2), Segment(5, 2), Segment(7, 3, 5, 2))
    assert found.segments.total == 10


@pytest.mark.parametrize(
    ("rows", "segments"),
    [
        ([[5, 6, 7], [5, 6, 7]], (Segment(0, 3),)),
        ([[5, 6, 7], [5, 6]], (Segment(0, 3),)),
        ([[5, 6], [5, 6, 7]], (Segment(0, 2), Segment(2, 1, 0, 2))),
        ([[5, 6], [7, 6]], (Segment(0, 2), Segment(2, 2))),
        ([[5, 6, 7]], (Segment(0, 3),)),
        ([[5, 6], [5], [5, 6, 7]], (Segment(0, 2), Segment(2, 1), Segment(3, 3))),
        ([[0, 0], [0, 0, 0]], (Segment(0, 2), Segment(2, 1, 0, 2))),
        ([[5], [6], [5], [7, 8]], (Segment(0, 1), Segment(1, 1), Segment(2, 2, 1))),
    ],
    ids=["equal", "second shorter", "first shorter", "nothing shared", "one row", "odd", "padding's id", "many"],
)
def test_segments_by_hand(rows: list[list[int]], segments: tuple[Segment, ...]) -> None:
    assert packing.lay_out(*right_padded(rows)).segments.parts == segments


def test_prefixes_end_with_the_shorter_row() -> None:
    ids, mask = right_padded([[5, 6, 0], [5], [4], [5, 6, 0, 0], [5, 0], [4, 4]])
    assert packing.shared_prefixes(ids, mask.sum(1)).tolist() == [3, 1, 1]


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def visible(part: Segment, place: int) -> list[int]:
    """What the token at `place` attends to."""
    return [*range(part.origin, part.origin + part.shared), *range(part.start, place + 1)]


ROW = st.lists(st.integers(0, 2), min_size=0, max_size=7)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6).filter(any), st.integers(0, 2), st.booleans())
def test_layout_of_any_rows(rows: list[list[int]], pad: int, boolean: bool) -> None:
    ids, mask = right_padded(rows, pad)
    mask = mask.bool() if boolean else mask
    found, real = packing.lay_out(ids, mask), mask.bool()
    paired = list(zip(rows, rows[len(rows) // 2 :], strict=False)) if len(rows) % 2 == 0 else []
    assert found.segments.total == sum(map(len, rows)) - sum(common(a, b) for a, b in paired)
    assert found.ids.shape == found.positions.shape == (1, found.segments.total)
    assert torch.equal(found.ids[0][found.gather][real], ids[real])
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(found.positions[0][found.gather][real], columns[real])
    assert not found.gather[~real].any()
    ends = [0, *(part.end for part in found.segments.parts)]
    assert [part.start for part in found.segments.parts] == ends[:-1] and ends[-1] == found.segments.total
    owner = {place: part for part in found.segments.parts for place in range(part.start, part.end)}
    for places, row in zip(found.gather.tolist(), rows, strict=True):
        for column in range(len(row)):
            assert visible(owner[places[column]], places[column]) == places[: column + 1]


# --- every architecture -------------------------------------------------------------------------------------------


def test_the_table_is_what_packs() -> None:
    assert {name.split("/")[0] for name in CASES} == packing.PACKS


def loss_gradients(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids, mask = pairs()
    model.zero_grad()
    found = logits(model, ids, mask)
    found.logsumexp(-1).pow(2).mean().backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "recomputed", "re-entrant"])
@pytest.mark.parametrize("name", CASES)
def test_packed_is_padded(name: str, reentrant: bool | None) -> None:
    model = make(name).train()
    expected, gradients = loss_gradients(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    packing.install(model)
    found, found_gradients = loss_gradients(model)
    assert_close(found, expected)
    assert 0 < (found_gradients - gradients).norm() <= 1e-4 * gradients.norm()


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_matter(name: str) -> None:
    """The windows in the table above are shorter than the rows: without them the result is another one."""
    wide = make(name, sliding_window=200)
    ids, mask = pairs()
    assert (logits(make(name), ids, mask) - logits(wide, ids, mask)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ROUTED)
def test_a_routers_loss_is_that_of_the_padded_batch(name: str) -> None:
    """A shared prefix counts twice and padding not at all, as in the rows."""
    model = make(name)
    ids, mask = pairs()

    def outcome() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).aux_loss
        found.backward()
        gradients = [p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None]
        return found.detach(), torch.cat(gradients)

    expected, gradients = outcome()
    packing.install(model)
    found, found_gradients = outcome()
    assert expected > 1.0 and abs(found - expected) <= 1e-5 * expected
    assert gradients.norm() > 0 and (found_gradients - gradients).norm() <= 1e-4 * gradients.norm()


def test_a_copy_computes_with_its_own_weights() -> None:
    model = make("llama")
    packing.install(model)
    copied, expected = copy.deepcopy(model), logits(model, *pairs())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(copied, *pairs()), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "eager"), ("mistral/window", "eager"), ("mistral/window", "flex_attention")]
)
def test_every_attention_packs(name: str, attention: str) -> None:
    model = make(name, attention)
    expected = logits(model, *pairs())
    packing.install(model)
    assert_close(logits(model, *pairs()), expected)


def test_soft_caps_count() -> None:
    capped, free = (make("gemma2/window", attn_logit_softcapping=cap) for cap in (1.0, None))
    free.load_state_dict(capped.state_dict())
    expected = logits(capped, *pairs())
    assert (logits(free, *pairs()) - expected).abs().max() > 0.05 * expected.abs().max()
    for model in (capped, free):
        before = logits(model, *pairs())
        packing.install(model)
        assert_close(logits(model, *pairs()), before)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_other_numbers_of_rows(rows: int) -> None:
    model, (ids, mask) = make("llama"), (x[:rows] for x in pairs())
    expected = logits(model, ids, mask)
    packing.install(model)
    assert_close(logits(model, ids, mask.bool()), expected)


# --- installing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2/window", "gpt2"])
def test_what_was_installed_can_be_undone_or_suspended(name: str, tmp_path: Path) -> None:
    model = make(name)
    inner, before = packing.backbone(model), model.config._attn_implementation
    expected = logits(model, *pairs())
    packing.install(model)
    assert not torch.equal(logits(model, *pairs()), expected)
    with packing.padded(model):
        assert torch.equal(logits(model, *pairs()), expected)
    with pytest.raises(KeyError), packing.padded(model):
        raise KeyError
    model.save_pretrained(tmp_path)
    assert "packed" not in json.dumps(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    packing.uninstall(model)
    assert torch.equal(logits(model, *pairs()), expected)
    assert model.config._attn_implementation == before and not hasattr(inner, "packs")
    assert "forward" not in vars(inner)


def test_an_adapter_is_packed_and_so_is_the_base_below_it() -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(make("llama"), adapter).eval()
    assert packing.backbone(model) is model.get_base_model().model and packing.why_not(model) == ""
    with_it = logits(model, *pairs())
    with model.disable_adapter():
        without = logits(model, *pairs())
    packing.install(model)
    assert_close(logits(model, *pairs()), with_it)
    with model.disable_adapter():
        assert_close(logits(model, *pairs()), without)
    assert (with_it - without).abs().max() > 1e-1


def never(*_: Any) -> Layout:
    raise AssertionError("packed")


@pytest.mark.parametrize("name", ["llama", "mistral/window", "gemma2/window", "gpt2"])
def test_generation_stays_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    ids, mask = (x[:3].flip(1) for x in pairs())
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    expected = model.generate(input_ids=ids, attention_mask=mask, **settings)
    packing.install(model)
    monkeypatch.setattr(packing, "lay_out", never)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), expected)


def test_what_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = make("llama"), pairs()
    positions = torch.arange(ids.shape[1])[None] + 3
    holes = mask.clone()
    holes[:, 2] = 0
    given: list[dict[str, Any]] = [
        {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)},
        {"input_ids": ids, "attention_mask": holes},
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
        {"input_ids": ids, "attention_mask": mask, "use_cache": True},
        {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True},
        {"input_ids": ids},
        {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask},
    ]
    expected = [model(**{"use_cache": False, **arguments}).logits for arguments in given]
    packing.install(model)
    with pytest.raises(AssertionError, match="packed"), monkeypatch.context() as patched:
        patched.setattr(packing, "lay_out", never)
        logits(model, ids, mask)
    monkeypatch.setattr(packing, "lay_out", never)
    for arguments, before in zip(given, expected, strict=True):
        assert torch.equal(model(**{"use_cache": False, **arguments}).logits, before)


def test_what_cannot_be_packed_is_named() -> None:
    oss = make("gpt_oss", **WIDE, **WINDOW, num_local_experts=4)
    for model in (oss, make("stablelm"), make("falcon")):
        assert packing.why_not(model).startswith(f"{model.config.model_type} is not among")
        assert packing.why_not(model, known=False) == ""
    packing.install(oss)
    with pytest.raises(NotImplementedError, match="s_aux"):
        packing.backbone(oss)(*pairs())


def test_attention_that_looks_ahead_is_named() -> None:
    assert packing.why_not(make("gemma3_text/window", use_bidirectional_attention=True))


# --- the comparison before training -------------------------------------------------------------------------------


def _one_further(found: Layout) -> Layout:
    """Positions behind a shared prefix are one too high."""
    positions = found.positions.clone()
    for part in found.segments.parts:
        positions[0, part.start : part.end] += part.shared > 0
    return replace(found, positions=positions)


def _with_rests(found: Layout, change: Callable[[Segment, Segment], Segment]) -> Layout:
    """Each rest changed, given the next one."""
    rests = [part for part in found.segments.parts if part.shared]
    changed = {part: change(part, rests[i - len(rests) + 1]) for i, part in enumerate(rests)}
    parts = tuple(changed.get(part, part) for part in found.segments.parts)
    return replace(found, segments=replace(found.segments, parts=parts, masks={}, varlen=[]))


def _swapped(found: Layout) -> Layout:
    return _with_rests(found, lambda part, other: replace(part, origin=other.origin))


PRECISIONS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2/window", "gpt2"])
def test_a_good_batch_passes(name: str, precision: torch.dtype) -> None:
    model = make(name).to(precision).train()
    packing.install(model)
    found = packing.compare(model, *pairs(), precision)
    assert 0 <= found.worst < found.limit == packing.TOLERANCE[precision]
    answers = 4 + 7 + 10 + 13 + 16 + 19
    assert (found.packed_tokens, found.padded_tokens) == (10 + 15 + 20 + answers, 6 * (20 + 19))
    assert model.training and packing.backbone(model).packs


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("fault", [_one_further, _swapped])
def test_a_wrong_layout_is_caught(
    fault: Callable[[Layout], Layout], precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, right = make("llama").to(precision), packing.lay_out
    packing.install(model)
    monkeypatch.setattr(packing, "lay_out", lambda ids, mask: fault(right(ids, mask)))
    found = packing.compare(model, *pairs(), precision)
    assert found.worst > found.limit == packing.TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_prefix_one_token_too_long_is_caught(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = make("llama").to(precision), packing.shared_prefixes
    packing.install(model)
    monkeypatch.setattr(packing, "shared_prefixes", lambda *given: right(*given) + 1)
    found = packing.compare(model, *pairs(), precision)
    assert found.worst > found.limit


def test_what_is_not_a_number_is_caught() -> None:
    model = make("llama")
    packing.install(model)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    assert math.isnan(packing.compare(model, *pairs(), torch.float32).worst)
