"""The gates before the first step: each with what is right, and with each fault planted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from alignctl.errors import DataError, DivergedError, MachineError
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir
from alignctl.train import data, fit, machine, preflight, standin, trl_seam
from alignctl.train import model as models
from alignctl.train import reference as references
from alignctl.train.gates import Gates, Result
from alignctl.train.parts import Parts
from alignctl.train.preflight import Built
from alignctl.train.tokenizer import load_encoder, template_hash

Make = Callable[..., Built]
MakeGates = Callable[..., Gates]
LONG = (2, 5)
ROWS = [
    {
        "prompt": f"What is {i} plus one?" + " Think about it first, and then answer." * (i in LONG),
        "chosen": f"It is {i + 1}." * (i + 1),
        "rejected": f"Perhaps {i}, or so.",
    }
    for i in range(6)
]


def make_recipe(method: str, base: Path, rows: Path, **sections: Any) -> Recipe:
    """An adapter of rank 4 in float32, trained with four rows a pass; sections are merged in, None takes one away."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": [{"path": str(rows), **({"answer": "chosen"} if method == "sft" else {})}]},
        "training": {"learning_rate": 1e-4},
        method: {},
    }
    for name, section in sections.items():
        values[name] = None if section is None else {**values.get(name, {}), **section}
    return Recipe.model_validate({name: section for name, section in values.items() if section is not None})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with its tokenizer: two blocks of seven linear layers."""
    folder = tmp_path_factory.mktemp("tiny")
    standin.stand_in(make_recipe("dpo", Path("tiny-llama"), folder), folder)
    return folder / "model"


@pytest.fixture
def make(tiny: Path, tmp_path: Path, make_gates: MakeGates) -> Make:
    """What a run of `method` on the six rows starts with."""

    def build(method: str = "dpo", **sections: Any) -> Built:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        recipe = make_recipe(method, tiny, file, **sections)
        encoder = load_encoder(recipe)
        rows, _ = data.prepare(recipe, encoder)
        where = machine.Machine("cpu", "test", True)
        parts = Parts(where, where.precision(recipe.model.dtype), encoder, rows.dataset(), None, tmp_path)
        return Built(recipe, parts, fit.BUILD[method](recipe, parts), rows, make_gates())

    return build


def around(model: nn.Module, gates: Gates, **values: Any) -> Any:
    """What a gate sees that looks at the model alone."""
    return SimpleNamespace(trainer=SimpleNamespace(model=model), gates=gates, **values)


def small(kind: str, **extra: Any) -> PreTrainedModel:
    """A model of the architecture `kind` with two blocks."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    set_seed(0)
    given = shape | {"num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None, **extra}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))


def adapted(model: PreTrainedModel, targets: str | list[str]) -> PeftModel:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))


def shift(model: nn.Module, part: str, *, by: float = 0.1) -> None:
    """Add random numbers to the weights whose name holds `part`."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in [p for name, p in model.named_parameters() if part in name]:
            parameter.add_(torch.randn_like(parameter) * by)


def stopped(gate: Callable[[Built], None], built: Any, said: str) -> Result:
    """What `gate` left when it stopped the run saying `said`."""
    with pytest.raises(DivergedError, match=said) as error:
        gate(built)
    found: Result = built.gates.results[gate.__name__]
    assert found.verdict == "stopped" and str(error.value).startswith(f"gate.{gate.__name__}: {found.said} — ")
    return found


def passed(gate: Callable[[Built], None], built: Any) -> Result:
    """What `gate` left when it found nothing."""
    gate(built)
    found: Result = built.gates.results[gate.__name__]
    assert found.verdict == "passed"
    return found


# --- all of them --------------------------------------------------------------------------------------------------


ORDER = ["targets", "quantized", "trainable", "learning_rate", "parent", "memory", "reference"]


def asked(monkeypatch: pytest.MonkeyPatch, gates: Gates, *, resumed: bool) -> list[str]:
    """The gates that `examine` asks, in order."""
    names: list[str] = []
    for name in ORDER:
        monkeypatch.setattr(preflight, name, lambda built, name=name: names.append(name))
    preflight.examine(around(nn.Linear(1, 1), gates), resumed=resumed)
    return names


def test_gates_are_asked_in_order(monkeypatch: pytest.MonkeyPatch, make_gates: MakeGates) -> None:
    assert asked(monkeypatch, make_gates(), resumed=False) == ORDER
    assert asked(monkeypatch, make_gates(), resumed=True) == ORDER[:-1]
    assert asked(monkeypatch, make_gates(targets=False, memory=False), resumed=False) == [
        name for name in ORDER if name not in ("targets", "memory")
    ]


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_a_good_start_passes_them_all(make: Make, said: list[str], method: str) -> None:
    built = make(method)
    preflight.examine(built, resumed=False)
    assert {name: found.verdict for name, found in built.gates.results.items()} == dict.fromkeys(ORDER, "passed")
    assert said == []


# --- targets ------------------------------------------------------------------------------------------------------


def test_every_linear_layer_has_an_adapter(make: Make) -> None:
    found = passed(preflight.targets, make())
    kinds = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert found == Result("passed", f"14 adapters, on {kinds} of all 2 blocks", 14, 14)


def test_all_weights_need_no_adapter(make: Make) -> None:
    assert "without adapters" in passed(preflight.targets, make(lora=None)).said


def test_a_name_that_hits_nothing(make: Make) -> None:
    built = make(lora={"target_modules": ["q_proj", "qproj", "Wqkv"]})
    found = stopped(preflight.targets, built, "no layer of the model is called Wqkv, qproj — .*all-linear")
    assert found.value == "Wqkv"


def test_a_name_is_no_ending_of_another(make_gates: MakeGates) -> None:
    """PEFT matches whole names between dots, so `proj` is not `q_proj`."""
    model = adapted(small("llama"), ["q_proj"])
    model.peft_config["default"].target_modules = {"q_proj", "proj"}
    stopped(preflight.targets, around(model, make_gates()), "no layer of the model is called proj ")


def test_an_adapter_in_some_layers_only(make: Make) -> None:
    built = make(lora={"target_modules": ["q_proj", "v_proj"]})
    block = built.trainer.model.get_base_model().model.layers[1].self_attn
    block.v_proj = block.v_proj.base_layer
    found = stopped(preflight.targets, built, "v_proj has an adapter in 1 of 2 layers")
    assert (found.value, found.limit) == (1, 2)


def test_one_of_all_layers_has_no_adapter(make: Make) -> None:
    """PEFT makes the layers' whole names of `all-linear`."""
    built = make()
    block = built.trainer.model.get_base_model().model.layers[1].self_attn
    block.v_proj = block.v_proj.base_layer
    stopped(preflight.targets, built, r"layers\.1\.self_attn\.v_proj")


def test_a_pattern_that_hits_some_layers_only(make: Make) -> None:
    built = make(lora={"target_modules": r".*layers\.0\.self_attn\.q_proj"})
    stopped(preflight.targets, built, "q_proj has an adapter in 1 of 2 layers")


def test_a_block_without_adapters(make_gates: MakeGates) -> None:
    """Its layers go by another name, as in models whose blocks alternate."""
    base = small("llama")
    other = base.model.layers[1].self_attn
    other.query = other.q_proj
    del other.q_proj
    found = stopped(preflight.targets, around(adapted(base, ["q_proj"]), make_gates()), "1 of 2 blocks have no adapter")
    assert (found.value, found.limit) == (1, 2)


def test_transposed_layers_count(make_gates: MakeGates) -> None:
    """GPT-2's are Conv1D; a block has a c_proj in its attention and another one behind it."""
    gates = make_gates()
    model = adapted(small("gpt2", n_layer=2, n_head=4, n_embd=32), "all-linear")
    found = passed(preflight.targets, around(model, gates))
    assert (found.value, found.limit) == (8, 8) and found.said.startswith("8 adapters, on c_attn, c_fc, c_proj")
    model = adapted(small("gpt2", n_layer=2, n_head=4, n_embd=32), ["c_attn", "c_proj"])
    inner = model.get_base_model().transformer.h[0].mlp
    inner.c_proj = inner.c_proj.base_layer
    stopped(preflight.targets, around(model, gates), "c_proj has an adapter in 1 of 2 layers")


def test_one_of_two_layers_of_a_name_can_be_asked_for(make_gates: MakeGates) -> None:
    model = adapted(small("gpt2", n_layer=2, n_head=4, n_embd=32), ["attn.c_proj"])
    found = passed(preflight.targets, around(model, make_gates()))
    assert found == Result("passed", "2 adapters, on c_proj of all 2 blocks", 2, 2)


def test_experts_and_their_router_count(make_gates: MakeGates) -> None:
    """A block of Mixtral has four projections, one router, and all experts as one layer."""
    gates, experts = make_gates(), {"num_local_experts": 4, "num_key_value_heads": 2}
    model = adapted(small("mixtral", **experts), "all-linear")
    found = passed(preflight.targets, around(model, gates))
    assert found == Result(
        "passed", "12 adapters, on experts, gate, k_proj, o_proj, q_proj, v_proj of all 2 blocks", 12, 12
    )
    block = model.get_base_model().model.layers[1].self_attn
    block.k_proj = block.k_proj.base_layer
    stopped(preflight.targets, around(model, gates), "k_proj has an adapter in 1 of 2 layers")


def test_experts_without_an_adapter_are_noticed(make_gates: MakeGates) -> None:
    """PEFT's `all-linear` reaches the experts of Mixtral, and of no other mixture."""
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model = adapted(small("qwen2_moe", **experts), "all-linear")
    assert not any("lora" in name and ".experts." in name for name, _ in model.named_parameters())
    gates = make_gates()
    preflight.targets(around(model, gates))
    assert gates.results["targets"].said.endswith("; 4 tensors of experts have none")  # two in each of two blocks


# --- quantized ----------------------------------------------------------------------------------------------------


FOUR_BIT: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "quantization": {}}


def test_no_quantization_was_asked_for(make: Make) -> None:
    assert passed(preflight.quantized, make()).said == "not asked for"


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_every_layer_is_in_4_bits(make: Make, targets: str | list[str]) -> None:
    built = make(**FOUR_BIT, lora={"target_modules": targets})
    assert passed(preflight.quantized, built) == Result(
        "passed", "14 of 14 layers in 4 bits, computed in bfloat16", 14, 14
    )


def test_a_layer_that_is_left_wide(make: Make) -> None:
    built = make(**FOUR_BIT)
    attention = built.trainer.model.get_base_model().model.layers[1].self_attn
    attention.o_proj.base_layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    found = stopped(
        preflight.quantized, built, r"1 of 14 layers are not stored in 4 bits, .*layers\.1\.self_attn\.o_proj"
    )
    assert (found.value, found.limit) == (13, 14)


def test_all_layers_are_left_wide(make: Make) -> None:
    built = make()
    wanted = built.recipe.model_copy(update={"quantization": make(**FOUR_BIT).recipe.quantization})
    found = stopped(
        preflight.quantized, around(built.trainer.model, built.gates, recipe=wanted), "14 of 14 layers are not stored"
    )
    assert (found.value, found.limit) == (0, 14)


def test_4_bits_computed_in_another_dtype(make: Make) -> None:
    built = make(**FOUR_BIT)
    layers = [module for module in built.trainer.model.modules() if isinstance(module, Linear4bit)]
    layers[3].compute_dtype = torch.float32
    found = stopped(preflight.quantized, built, "compute in bfloat16, float32 instead of bfloat16")
    assert found.limit == "bfloat16"
    for layer in layers:
        layer.compute_dtype = torch.float32
    assert stopped(preflight.quantized, built, "compute in float32 instead of bfloat16").value == "float32"


def test_4_bits_computed_as_the_recipe_says(make: Make) -> None:
    built = make(model={"dtype": "bfloat16"}, quantization={"bnb_4bit_compute_dtype": "float32"})
    assert passed(preflight.quantized, built).said.endswith("computed in float32")


def test_experts_that_are_left_wide(make: Make, tmp_path: Path) -> None:
    standin.stand_in(make_recipe("dpo", Path("mixtral"), tmp_path), tmp_path / "mixtral")
    built = make(
        model={"name_or_path": str(tmp_path / "mixtral" / "model"), "dtype": "bfloat16"},
        quantization={},
        lora={"target_modules": ["q_proj"]},
    )
    wide = {name: p for name, p in built.trainer.model.named_parameters() if "experts" in name}
    assert {p.dtype for p in wide.values()} == {torch.bfloat16}
    found = stopped(preflight.quantized, built, "4 tensors of experts are not stored in 4 bits, such as .*gate_up_proj")
    assert (found.value, found.limit) == (0, 4)


def test_a_convolution_is_no_expert() -> None:
    """Models with state-space or linear attention layers have one in each of them."""
    assert preflight.experts(nn.Conv1d(8, 8, 4, groups=8)) == []


# --- trainable ----------------------------------------------------------------------------------------------------


def test_what_is_trained_is_counted(make: Make) -> None:
    """Rank 4 on layers of 64 x 64 (two), 64 x 32 (two), 64 x 128 (two) and 128 x 64, in two blocks."""
    weights = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert passed(preflight.trainable, make()) == Result(
        "passed", f"{weights:,} weights in 28 tensors, float32", weights
    )
    assert weights == 8192


def test_nothing_is_trained(make: Make) -> None:
    built = make()
    built.trainer.model.requires_grad_(False)
    assert stopped(preflight.trainable, built, "no weight of the model is trained").value == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_tensor_is_trained_in_16_bits(make: Make, dtype: torch.dtype) -> None:
    built, short = make(), str(dtype).removeprefix("torch.")
    parameter = next(p for p in built.trainer.model.parameters() if p.requires_grad)
    parameter.data = parameter.data.to(dtype)
    found = stopped(preflight.trainable, built, f"1 of 28 trained tensors are {short}")
    assert (found.value, found.limit) == (short, "float32")


def test_frozen_weights_may_have_16_bits(make: Make) -> None:
    built = make(model={"dtype": "bfloat16"})
    assert torch.bfloat16 in {p.dtype for p in built.trainer.model.parameters()}
    passed(preflight.trainable, built)


# --- learning_rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "adapter", "low", "high"),
    [
        ("sft", True, 1e-5, 2e-3),
        ("sft", False, 1e-6, 2e-3),
        ("dpo", True, 1e-6, 5e-4),
        ("dpo", False, 1e-7, 1e-5),
        ("orpo", True, 5e-6, 1e-3),
        ("orpo", False, 1e-7, 1e-4),
    ],
)
def test_learning_rates_that_have_worked(
    make_gates: MakeGates, said: list[str], tmp_path: Path, method: str, adapter: bool, low: float, high: float
) -> None:
    def verdict(rate: float) -> Result:
        sections = {"training": {"learning_rate": rate}, **({} if adapter else {"lora": None})}
        recipe = make_recipe(method, tmp_path, tmp_path, **sections)
        built = around(nn.Linear(1, 1), make_gates(), recipe=recipe)
        preflight.learning_rate(built)
        return built.gates.results["learning_rate"]

    assert [verdict(rate).verdict for rate in (low, high)] == ["passed", "passed"] and not said
    for rate, meaning in ((low * 0.99, "nothing will be learned"), (high * 1.01, "training may diverge")):
        (tmp_path / "run.json").unlink()
        found = verdict(rate)
        assert (found.verdict, found.value, found.limit) == ("warned", rate, f"{low:g} to {high:g}")
        what = "an adapter" if adapter else "all weights"
        assert f"{method.upper()} of {what} has worked with {low:g} to {high:g}: {meaning}" in found.said
        assert said.pop().startswith(f"warning: gate.learning_rate: training.learning_rate is {rate:g}, ")


# --- parent -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(make: Make, tmp_path: Path) -> Path:
    """A finished run whose adapter another goes on from."""
    built, folder = make("sft"), tmp_path / "parent"
    shift(built.trainer.model, "lora_B")
    built.trainer.model.save_pretrained(folder / "model")
    record = {
        "model": {
            "name_or_path": "org/base",
            "base_fingerprint": models.base_fingerprint(built.trainer.model),
            "storage": "float32",
        },
        "template": {"name": "chatml", "sha256": template_hash(built.parts.encoder)},
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def on(run: Path, **changes: Any) -> None:
    """Change what the parent's run.json says of its model or template."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    for name, section in changes.items():
        record[name] |= section
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")


def going_on(make: Make, run: Path, **sections: Any) -> Built:
    return make(lora=None, **{"model": {"adapter": str(run)}, **sections})


def test_no_parent(make: Make) -> None:
    assert passed(preflight.parent, make()).said == "training starts from the base model"


def test_a_parent_on_these_weights_with_this_template(make: Make, run: Path) -> None:
    for adapter in (run, run / "model"):
        found = passed(preflight.parent, going_on(make, adapter))
        assert found.said == f"{run / 'model'} was trained on these weights with this template"


def test_a_parent_of_another_base(make: Make, run: Path) -> None:
    here = models.base_fingerprint(make().trainer.model)
    on(run, model={"base_fingerprint": "f" * 64})
    found = stopped(preflight.parent, going_on(make, run), "was trained on other weights .org/base.* org/base")
    assert (found.value, found.limit) == (here[:16], "f" * 16)


def test_one_changed_weight_makes_another_base(make: Make, run: Path) -> None:
    built = going_on(make, run)
    with torch.no_grad():
        built.trainer.model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[0, 0] += 1
    stopped(preflight.parent, built, "was trained on other weights")


def test_a_parent_with_another_template(make: Make, run: Path) -> None:
    on(run, template={"name": "zephyr", "sha256": "e" * 64})
    found = stopped(
        preflight.parent, going_on(make, run), r"another chat template \(zephyr\) — model\.chat_template: zephyr"
    )
    assert found.limit == "e" * 16


def test_a_parent_in_another_storage(make: Make, run: Path, said: list[str]) -> None:
    """In 4 bits the same weights have other numbers, so only the storage is compared."""
    on(run, model={"storage": "nf4", "base_fingerprint": "f" * 64})
    built = going_on(make, run)
    preflight.parent(built)
    found = built.gates.results["parent"]
    assert (found.verdict, found.value) == ("warned", "float32")
    assert found.said.endswith("was trained on weights in nf4, and is used on weights in float32")
    assert len(said) == 1 and "`quantization:` as there" in said[0]


def test_another_storage_does_not_hide_another_template(make: Make, run: Path) -> None:
    on(run, model={"storage": "nf4"}, template={"sha256": "e" * 64})
    stopped(preflight.parent, going_on(make, run), "another chat template")


@pytest.mark.parametrize("record", [None, "", "[1]", "{"])
def test_a_parent_that_says_nothing(make: Make, run: Path, said: list[str], record: str | None) -> None:
    (run / "run.json").unlink()
    if record is not None:
        (run / "run.json").write_text(record, encoding="utf-8")
    built = going_on(make, run)
    preflight.parent(built)
    assert built.gates.results["parent"].verdict == "warned"
    assert "has no run.json" in said[0] and "belongs to model.name_or_path" in said[0]


# --- memory -------------------------------------------------------------------------------------------------------


def spied(monkeypatch: pytest.MonkeyPatch, look: Callable[[Any, dict[str, Tensor]], None]) -> None:
    """Let `look` see trainer and batch of every loss."""
    real = trl_seam.loss_and_logps

    def seen(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        look(trainer, batch)
        return real(trainer, batch)

    monkeypatch.setattr(trl_seam, "loss_and_logps", seen)


def test_the_longest_rows_are_tried(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[dict[str, Tensor]] = []
    spied(monkeypatch, lambda trainer, batch: batches.append(batch))
    built = make(training={"per_device_train_batch_size": 2})
    found = passed(preflight.memory, built)
    assert {int(i) for i in built.rows.sizes().argsort()[-2:]} == set(LONG)
    expected = {tuple(built.rows.encoded(i)["prompt_ids"]) for i in LONG}
    (batch,) = batches
    assert len(batch["input_ids"]) == 4
    lengths = (batch["attention_mask"] - batch["completion_mask"]).sum(1).tolist()
    assert {tuple(ids[:n].tolist()) for ids, n in zip(batch["input_ids"], lengths, strict=True)} == expected
    tokens = int(built.rows.sizes()[list(LONG)].sum())
    assert found.said.startswith(f"the 2 longest rows ({tokens:,} tokens) fit: peak ") and found.value > 0


def test_fewer_rows_than_a_pass_takes(make: Make) -> None:
    assert passed(preflight.memory, make(training={"per_device_train_batch_size": 99})).said.startswith("the 6 longest")


def test_memory_runs_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(trl_seam, "loss_and_logps", full)
    built = make()
    with pytest.raises(MachineError, match=r"gate\.memory: the 4 longest rows") as error:
        preflight.memory(built)
    said = str(error.value)
    assert error.value.exit_code == 4 and built.gates.results["memory"].verdict == "stopped"
    assert "do not fit: CUDA out of memory. Tried to allocate 2.00 GiB. Peak so far " in said and "More" not in said
    keys = [
        "in order of least harm",
        "training.gradient_checkpointing=true",
        "training.per_device_train_batch_size",
        "gradient_accumulation_steps",
        "`quantization:`",
        "data.max_length",
    ]
    where = [said.index(key) for key in keys]
    assert where == sorted(where)


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_the_trial_leaves_nothing_behind(make: Make, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """With dropout, which takes random numbers."""
    drawn: list[bool] = []
    built = make(method, lora={"lora_dropout": 0.5}, trl={} if method == "sft" else {"disable_dropout": False})
    dropouts = [
        module for module in built.trainer.model.modules() if isinstance(module, nn.Dropout) and module.p == 0.5
    ]
    dropouts[0].register_forward_hook(lambda module, args, output: drawn.append(bool((output == 0).any())))
    metrics = built.trainer._stored_metrics if method == "orpo" else built.trainer._metrics
    metrics["train"]["loss-like"] = [1.0, 2.0]
    weights = models.fingerprint(built.trainer.model)
    before = torch.get_rng_state(), numpy.random.get_state()[2]
    passed(preflight.memory, built)
    assert drawn == [True]
    assert torch.equal(torch.get_rng_state(), before[0]) and numpy.random.get_state()[2] == before[1]
    assert (built.trainer._stored_metrics if method == "orpo" else built.trainer._metrics)["train"] == {
        "loss-like": [1.0, 2.0]
    }
    assert all(p.grad is None for p in built.trainer.model.parameters())
    assert models.fingerprint(built.trainer.model) == weights and built.trainer.model.training


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_trials_tokens_are_not_counted(make: Make, method: str) -> None:
    built = make(method)
    passed(preflight.memory, built)
    assert built.trainer._total_train_tokens == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_activations_are_recomputed_as_in_training(make: Make, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Each block runs once, and again in the backward pass."""
    built, runs, reached = make(training={"gradient_checkpointing": wanted}), [], []
    block = built.trainer.model.get_base_model().model.layers[0]
    block.mlp.register_forward_pre_hook(lambda module, args: runs.append(torch.is_grad_enabled()))
    weight = next(p for name, p in built.trainer.model.named_parameters() if "layers.0" in name and "lora_B" in name)
    weight.register_hook(lambda gradient: reached.append(bool(gradient.any())))
    passed(preflight.memory, built)
    assert runs.count(True) == (2 if wanted else 1)
    assert reached == [True]


# --- reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "orpo"])
def test_a_method_without_a_reference(make: Make, method: str) -> None:
    assert passed(preflight.reference, make(method)).said == "the method has none"


def test_a_fresh_adapter_is_its_base(make: Make) -> None:
    built = make()
    found = passed(preflight.reference, built)
    assert (found.value, found.limit) == (0.0, 1e-4)
    assert found.said.endswith("the loss is 0.6931 (ln 2 is 0.6931)") and round(math.log(2), 4) == 0.6931
    assert built.trainer.model.training and not built.trainer._metrics["train"]


def test_other_losses_do_not_begin_at_ln_2(make: Make) -> None:
    found = passed(preflight.reference, make(dpo={"loss_type": "ipo", "beta": 0.5}))
    assert found.said.endswith("the loss is 1.0000") and found.value == 0.0  # IPO: (0 - 1 / (2 * 0.5)) ** 2


def test_an_adapter_that_is_not_fresh_is_not_its_base(make: Make) -> None:
    built = make()
    shift(built.trainer.model, "lora_B")
    found = stopped(preflight.reference, built, "policy and reference differ by .* model.adapter must be")
    assert found.value > 1e-3 and found.limit == 1e-4


def test_all_weights_against_a_copy(make: Make) -> None:
    built = make(lora=None)
    assert built.trainer.ref_model is not None
    assert passed(preflight.reference, built).value == 0.0
    shift(built.trainer.ref_model, "norm", by=0.01)
    assert stopped(preflight.reference, built, "differ by").value > 1e-4


def test_an_adapter_against_its_own_start(make: Make, run: Path) -> None:
    built = going_on(make, run)
    assert set(built.trainer.model.peft_config) == {"default", "ref"}
    assert passed(preflight.reference, built).value == 0.0
    shift(built.trainer.model, "lora_B.ref")
    assert stopped(preflight.reference, built, "differ by").value > 1e-3


def test_16_bits_may_round(make: Make) -> None:
    found = passed(preflight.reference, make(model={"dtype": "bfloat16"}))
    assert found.limit == 2e-2 and found.value <= 2e-2


def test_precomputed_log_probabilities(make: Make) -> None:
    built = make(dpo={"precompute_ref_log_probs": True})
    built.trainer.train_dataset, _ = references.precompute(built.trainer, built.rows, torch.float32)
    built.trainer.precompute_ref_logps = True
    assert passed(preflight.reference, built).value <= 1e-5

    answers = [built.rows.lengths(name)[:4] for name in ("chosen_ids", "rejected_ids")]
    known = {name: numpy.array(built.trainer.train_dataset[name], dtype=numpy.float32) for name in references.COLUMNS}
    known["ref_chosen_logps"] -= 5.0
    built.trainer.train_dataset = built.rows.dataset(known)
    found = stopped(preflight.reference, built, "differ by")
    assert found.value == pytest.approx(5 / answers[0].min(), abs=1e-4)

    built.trainer.train_dataset = built.rows.dataset({name: values * numpy.nan for name, values in known.items()})
    assert math.isnan(stopped(preflight.reference, built, "differ by nan").value)


# --- resume: rows -------------------------------------------------------------------------------------------------


PARTS = {"train": {"rows": 6, "fingerprint": "a"}, "eval": {"rows": 2, "fingerprint": "b"}}


def test_the_same_rows(tmp_path: Path, make_gates: MakeGates) -> None:
    run = RunDir(tmp_path)
    preflight.same_rows(run, PARTS, make_gates())
    run.update(data=PARTS)
    preflight.same_rows(run, PARTS, make_gates())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"train": {"rows": 6, "fingerprint": "x"}}, r"data\.train are not"),
        ({"eval": {"rows": 3, "fingerprint": "b"}}, r"data\.eval are not"),
        ({name: {"rows": 1, "fingerprint": "x"} for name in PARTS}, r"data\.train and data\.eval are not"),
    ],
)
def test_other_rows(tmp_path: Path, make_gates: MakeGates, changed: dict[str, Any], named: str) -> None:
    run = RunDir(tmp_path)
    run.update(data=PARTS)
    gates = make_gates()
    with pytest.raises(DataError, match=rf"gate\.resume: the rows of {named} .* --output DIR") as error:
        preflight.same_rows(run, PARTS | changed, gates)
    assert error.value.exit_code == 3 and gates.results["resume"].verdict == "stopped"
    preflight.same_rows(run, PARTS | changed, make_gates(resume=False))


def test_held_out_rows_that_are_gone(tmp_path: Path, make_gates: MakeGates) -> None:
    run = RunDir(tmp_path)
    run.update(data=PARTS)
    with pytest.raises(DataError, match=r"the rows of data\.eval are not"):
        preflight.same_rows(run, {"train": PARTS["train"]}, make_gates())
