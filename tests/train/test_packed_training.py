"""Real trainers with `training.packed` true and false, on the same weights and rows."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, set_seed

from alignctl.errors import DivergedError, RecipeError
from alignctl.recipe.schema import LossType, Recipe
from alignctl.train import attention, data, fit, heldout, machine, packing, parts, standin
from alignctl.train.gates import Gates, Result
from alignctl.train.parts import Parts
from alignctl.train.tokenizer import load_encoder

ROWS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 1], "rejected_ids": [11, 12, 13, 14, 15, 1]},
    {"prompt_ids": [5, 20], "chosen_ids": [21, 22, 23, 24, 1], "rejected_ids": [25, 1]},
    {"prompt_ids": [30, 31, 32, 33, 34], "chosen_ids": [35, 1], "rejected_ids": [36, 37, 38, 1]},
    {"prompt_ids": [40, 41, 42], "chosen_ids": [43, 44, 45, 1], "rejected_ids": [43, 46, 1]},
]
SFT_ROWS = [
    {"input_ids": row["prompt_ids"] + row["chosen_ids"], "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"]}
    for row in ROWS
]
MakeGates = Callable[..., Gates]
METHODS = ["sft", "dpo", "orpo"]
LORA = {"r": 4, "lora_alpha": 8}


def make_recipe(method: str, folder: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "lora": LORA,
        "data": {"train": [{"path": "unused.jsonl"}]},
        "training": {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 1, "seed": 1},
        method: {},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.model_validate({k: v for k, v in values.items() if v is not None})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama on disk, as a smoke run would make it."""
    folder = tmp_path_factory.mktemp("tiny")
    standin.stand_in(make_recipe("dpo", Path("HuggingFaceTB/SmolLM2-135M-Instruct")), folder)
    return folder / "model"


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on it."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **LORA)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), config).save_pretrained(folder)
    return folder


def build(recipe: Recipe, run: Path, rows: list[dict[str, list[int]]] | None = None) -> tuple[Trainer, Parts]:
    table = Dataset.from_list(rows or (SFT_ROWS if recipe.method == "sft" else ROWS))
    where = machine.Machine("cpu", "test", True)
    given = Parts(where, where.precision(recipe.model.dtype), load_encoder(recipe), table, table, run)
    return fit.BUILD[recipe.method](recipe, given), given


def is_packed(trainer: Trainer) -> bool:
    return getattr(packing.backbone(trainer.model), "packs", False)


def both(method: str, tiny: Path, run: Path, **sections: Any) -> list[Trainer]:
    """A padded and a packed trainer, whose trained weights are equal and off their start."""
    out = []
    for packed in (False, True):
        training = {**sections.get("training", {}), "packed": packed}
        trainer, _ = build(make_recipe(method, tiny, **{**sections, "training": training}), run / str(packed))
        torch.manual_seed(3)
        for name, parameter in trained(trainer.model).items():
            moved = torch.randn_like(parameter) * 0.1
            parameter.data = moved if "lora_A" in name else parameter.data + moved
        assert is_packed(trainer) is packed
        out.append(trainer)
    return out


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logged(trainer: Trainer) -> dict[str, list[float]]:
    metrics = trainer._stored_metrics if hasattr(trainer, "_stored_metrics") else trainer._metrics
    return {name: list(values) for name, values in metrics["train"].items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= relative * tensor.norm(), name


def compare(padded: Trainer, packed: Trainer) -> None:
    """Loss, logged metrics and gradients of one batch."""
    losses, metrics, gradients = [], [], []
    for trainer in (padded, packed):
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses.append(loss.item())
        metrics.append(logged(trainer))
        gradients.append({name: p.grad for name, p in trained(trainer.model).items() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert metrics[0].keys() == metrics[1].keys() and metrics[0]
    for name, values in metrics[0].items():
        assert metrics[1][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert all(gradient.norm() > 0 for gradient in gradients[0].values())
    assert_same(gradients[1], gradients[0], 1e-4)


# --- one batch ----------------------------------------------------------------------------------------------------


SMOOTHED = {"exo_pair", "robust"}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    name: ("dpo", {"loss_type": name, "beta": 0.3, "label_smoothing": 0.1 if name in SMOOTHED else 0.0})
    for name in get_args(LossType)
} | {
    "smoothed": ("dpo", {"label_smoothing": 0.2}),
    "several": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "ld": ("dpo", {"ld_alpha": 0.5}),
    "only sft": ("sft", {}),
    "orpo": ("orpo", {"nll_on_prompt": True}),
    "orpo on answers": ("orpo", {"nll_on_prompt": False}),
}


@pytest.mark.parametrize(("method", "section"), LOSSES.values(), ids=LOSSES)
def test_every_loss(tiny: Path, tmp_path: Path, method: str, section: dict[str, Any]) -> None:
    compare(*both(method, tiny, tmp_path, **{method: section}))


WAYS: dict[str, dict[str, Any]] = {
    "DoRA": {"lora": {"use_dora": True}},
    "4 bits": {"quantization": {}},
    "all weights": {"lora": None},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_train(tiny: Path, tmp_path: Path, method: str, way: str) -> None:
    padded, packed = both(method, tiny, tmp_path, **WAYS[way])
    assert any(isinstance(module, Linear4bit) for module in packed.model.modules()) is (way == "4 bits")
    if method == "dpo" and way == "all weights":
        assert packing.backbone(packed.ref_model).packs and not hasattr(packing.backbone(padded.ref_model), "packs")
    compare(padded, packed)


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_an_adapter(tiny: Path, adapter: Path, tmp_path: Path, method: str) -> None:
    padded, packed = both(method, tiny, tmp_path, model={"adapter": str(adapter)}, lora=None)
    compare(padded, packed)
    if method == "dpo":
        batch = padded.data_collator(ROWS)
        with torch.no_grad():
            found = [t.compute_ref_log_probs(t.model, batch) for t in (packed, padded)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_families_with_caps_scales_and_windows(tmp_path: Path) -> None:
    for name in ("google/gemma-2-2b", "ibm-granite/granite-3", "mistral-7b"):
        folder = tmp_path / name.replace("/", "-")
        standin.stand_in(make_recipe("dpo", Path(name)), folder)
        compare(*both("dpo", folder / "model", folder))


# --- whole steps --------------------------------------------------------------------------------------------------


def steps(trainer: Trainer) -> dict[str, Tensor]:
    """How far training moves each weight."""
    before = {name: parameter.detach().clone() for name, parameter in trained(trainer.model).items()}
    trainer.train()
    moved = {name: parameter.detach() - before[name] for name, parameter in trained(trainer.model).items()}
    assert all(change.norm() > 0 for change in moved.values())
    return moved


class Seen(TrainerCallback):
    """Whether activations were recomputed."""

    checkpointed: bool = False

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("way", ["LoRA", "all weights", "4 bits"])
@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations(tiny: Path, tmp_path: Path, method: str, way: str) -> None:
    training = {"gradient_checkpointing": True, "per_device_train_batch_size": 4}
    padded, packed = both(method, tiny, tmp_path, training=training, **WAYS.get(way, {}))
    seen = Seen()
    packed.add_callback(seen)
    assert_same(steps(packed), steps(padded), 1e-4)
    assert seen.checkpointed


@pytest.mark.parametrize("method", METHODS)
def test_one_by_four_is_four_by_one(tiny: Path, tmp_path: Path, method: str) -> None:
    moved = []
    for size, passes in ((4, 1), (1, 4), (2, 2)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
        padded, packed = both(method, tiny, tmp_path / str(size), training=training)
        moved += [steps(padded), steps(packed)]
    for other in moved[1:]:
        assert_same(other, moved[0], 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_three_steps(tiny: Path, tmp_path: Path, method: str) -> None:
    training = {"max_steps": 3, "per_device_train_batch_size": 2}
    padded, packed = both(method, tiny, tmp_path, training=training)
    for trainer in (padded, packed):
        trainer.train()
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (padded, packed)]
    assert len(logs[0]) == len(logs[1]) == 3
    for one, other in zip(*logs, strict=True):
        assert one["num_input_tokens_seen"] == other["num_input_tokens_seen"] > 0
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for name, weight in trained(padded.model).items():
        torch.testing.assert_close(trained(packed.model)[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_held_out_rows(tiny: Path, tmp_path: Path, method: str) -> None:
    source = {"path": str(tiny.parent / "train.jsonl"), "take": 5}
    sections: dict[str, Any] = {"data": {"train": [source], "max_length": 2048}}
    sections["training"] = {"per_device_eval_batch_size": 2}
    recipe = make_recipe(method, tiny, **sections)
    if method == "sft":
        standin.stand_in(recipe.model_copy(update={"data": make_recipe(method, tiny).data}), tmp_path / "rows")
        source["path"] = str(tmp_path / "rows" / "train.jsonl")
        recipe = make_recipe(method, tiny, **sections)
    rows, _ = data.prepare(recipe, load_encoder(recipe))
    padded, packed = (heldout.score(trainer, recipe, rows) for trainer in both(method, tiny, tmp_path, **sections))
    assert packed.loss == pytest.approx(padded.loss, rel=1e-5)
    for mine, theirs in zip(packed.scores.as_lists().values(), padded.scores.as_lists().values(), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5) and len(mine) == 5
    assert (packed.reference is not None) is (method == "dpo")
    if padded.reference is not None:
        torch.testing.assert_close(torch.tensor(packed.reference), torch.tensor(padded.reference))


# --- when it packs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stablelm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An architecture that packing was not tested with, and which ignores the attention that is installed."""
    folder = tmp_path_factory.mktemp("stablelm")
    family = standin.Family("stablelm", "<s>", "</s>", None, {"num_key_value_heads": 2, "initializer_range": 0.2})
    standin.stand_in(make_recipe("dpo", Path("llama")), folder)
    standin._model(family, folder / "model")
    return folder / "model"


@pytest.mark.parametrize("method", METHODS)
def test_auto_says_why_it_pads(tiny: Path, stablelm: Path, tmp_path: Path, make_gates: MakeGates, method: str) -> None:
    for folder, sections, said in (
        (tiny, {}, "packed"),
        (tiny, {"training": {"packed": False}}, "training.packed is false"),
        (tiny, {"trl": {"torch_compile": True}}, "torch_compile needs batches of one shape"),
        (stablelm, {}, "stablelm is not among the architectures that packing was tested with"),
    ):
        recipe = make_recipe(method, folder, **sections)
        trainer, given = build(recipe, tmp_path)
        assert parts.engine(recipe, trainer) == said
        assert is_packed(trainer) is (said == "packed")
        gates = make_gates()
        found = fit._engine(recipe, given, trainer, gates)
        assert found["packed"] is True if said == "packed" else found == {"packed": False, "why": said}
        told = gates.results["packed"]
        assert told.verdict == "passed"
        assert told.said.startswith("the first batch packed" if said == "packed" else f"batches are padded: {said}")


def test_the_first_batch_is_measured(tiny: Path, tmp_path: Path, make_gates: MakeGates) -> None:
    recipe = make_recipe("dpo", tiny, training={"per_device_train_batch_size": 4})
    trainer, given = build(recipe, tmp_path)
    gates = make_gates()
    found = fit._engine(recipe, given, trainer, gates)
    assert found["packed"] and found["worst"] < found["limit"] == 1e-3
    told = gates.results["packed"]
    assert (told.verdict, told.value, told.limit) == ("passed", found["worst"], found["limit"])
    assert (found["packed_tokens"], found["padded_tokens"]) == (13 + 9 + 11 + 9, 8 * 10)


def test_what_was_asked_for_and_cannot_be_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = make_recipe("dpo", tiny, training={"packed": True}, trl={"torch_compile": True})
    with pytest.raises(RecipeError, match=r"training\.packed.*torch_compile"):
        build(recipe, tmp_path)


def no_kernel(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no kernel for this device\nand more")


@pytest.mark.parametrize("method", METHODS)
def test_attention_that_fails_pads(
    tiny: Path,
    adapter: Path,
    tmp_path: Path,
    make_gates: MakeGates,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under `auto`; the reference beside the policy pads too."""
    model = {} if method == "dpo" else {"adapter": str(adapter)}
    recipe = make_recipe(method, tiny, model=model, lora=None if method == "dpo" else LORA)
    trainer, given = build(recipe, tmp_path)
    models = parts.models_of(trainer)
    assert len(models) == (2 if method == "dpo" else 1) and all(packing.backbone(model).packs for model in models)
    monkeypatch.setattr(attention, "attend", no_kernel)
    gates = make_gates()
    found = fit._engine(recipe, given, trainer, gates)
    why = "packed attention fails here: no kernel for this device"
    assert found == {"packed": False, "why": why}
    assert gates.results["packed"] == Result("passed", f"batches are padded: {why}")
    assert not any(hasattr(packing.backbone(model), "packs") for model in models)
    trainer.train()


def test_attention_that_fails_is_refused_where_it_was_asked_for(
    tiny: Path, tmp_path: Path, make_gates: MakeGates, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("dpo", tiny, training={"packed": True})
    trainer, given = build(recipe, tmp_path)
    trainer.model.train()
    monkeypatch.setattr(attention, "attend", no_kernel)
    with pytest.raises(RecipeError, match=r"training\.packed.*cannot be: no kernel for this device"):
        fit._engine(recipe, given, trainer, make_gates())
    assert trainer.model.training


def out_of_memory(*_: Any, **__: Any) -> Tensor:
    raise torch.OutOfMemoryError("no memory")


def test_memory_that_runs_out_is_no_reason_to_pad(
    tiny: Path, tmp_path: Path, make_gates: MakeGates, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("dpo", tiny)
    trainer, given = build(recipe, tmp_path)
    monkeypatch.setattr(attention, "attend", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fit._engine(recipe, given, trainer, make_gates())


@pytest.mark.parametrize("method", METHODS)
def test_a_mixture_of_experts(tmp_path: Path, method: str) -> None:
    """Its router's loss too, which SFT and DPO log and add."""
    standin.stand_in(make_recipe("dpo", Path("mixtral")), tmp_path / "mixtral")
    padded, packed = both(method, tmp_path / "mixtral" / "model", tmp_path)
    compare(padded, packed)
    assert method == "orpo" or logged(packed)["aux_loss"][0] > 0


def test_an_architecture_that_was_asked_for_is_tried(stablelm: Path, tmp_path: Path, make_gates: MakeGates) -> None:
    recipe = make_recipe("dpo", stablelm, training={"packed": True})
    trainer, given = build(recipe, tmp_path)
    assert is_packed(trainer)
    gates = make_gates()
    with pytest.raises(
        DivergedError, match=r"gate\.packed: .* differ by .*, more than rounding .*training\.packed=off"
    ):
        fit._engine(recipe, given, trainer, gates)
    told = gates.results["packed"]
    assert told.verdict == "stopped" and told.value > told.limit == 1e-3


def test_what_is_packed_is_not_compared_when_the_gate_is_off(
    tiny: Path, tmp_path: Path, make_gates: MakeGates, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("dpo", tiny)
    trainer, given = build(recipe, tmp_path)
    monkeypatch.setattr(packing, "compare", out_of_memory)
    gates = make_gates(packed=False)
    assert fit._engine(recipe, given, trainer, gates) == {"packed": True}
    assert gates.results["packed"].verdict == "off"


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_the_seed_decides_the_adapter(tiny: Path, tmp_path: Path, method: str) -> None:
    """Without this a packed and a padded run of one recipe start from different weights."""
    adapters = []
    for before in range(2):
        torch.manual_seed(before)
        adapters.append(trained(build(make_recipe(method, tiny), tmp_path)[0].model))
    assert_same(*adapters, 0)


class Columns(TorchFunctionMode):
    """How many rows each result with `columns` columns has."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, [0]

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim >= 2 and out.shape[-1] == self.columns:
            self.rows.append(out.numel() // self.columns)
        return out


@pytest.mark.parametrize("method", METHODS)
def test_only_supervised_tokens_have_logits(tiny: Path, tmp_path: Path, method: str) -> None:
    section = {"nll_on_prompt": False} if method == "orpo" else {}
    trainer, _ = build(make_recipe(method, tiny, **{method: section}), tmp_path)
    batch = trainer.data_collator(SFT_ROWS if method == "sft" else ROWS)
    answers = [row["chosen_ids"] + ([] if method == "sft" else row["rejected_ids"]) for row in ROWS]
    with Columns(trainer.model.config.vocab_size) as seen:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    assert max(seen.rows) == sum(map(len, answers)) < batch["input_ids"].numel()


def tiny_llama() -> Any:
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=64, **shape))


def gradients_of(model: Any, inner: Any, rank: int) -> dict[str, Tensor]:
    """Of one of two halves, each of which is a pair that shares its beginning."""
    draw = torch.Generator().manual_seed(5)
    prefix = torch.randint(3, 64, (2, 6), generator=draw).repeat(2, 1)
    ids = torch.cat([prefix, torch.randint(3, 64, (4, 5), generator=draw)], 1)[rank::2]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.logsumexp(-1).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in inner.named_parameters()}


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for packed in (False, True):
        model = tiny_llama()
        if packed:
            packing.install(model)
        found = gradients_of(DistributedDataParallel(model), model, rank)
        torch.save(found, Path(folder) / f"{packed}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    found = {file.stem: torch.load(file) for file in tmp_path.iterdir()}
    alone = [gradients_of(model, model, rank) for rank in (0, 1) for model in [tiny_llama()]]
    mean = {name: (gradient + alone[1][name]) / 2 for name, gradient in alone[0].items()}
    assert found.keys() == {"False0", "False1", "True0", "True1"}
    for gradients in found.values():
        assert_same(gradients, mean, 1e-4)
