"""The gates before the first step, in their order: each with what is right, and with each fault planted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from starts import LONG, around, make_recipe, passed, shift, stopped
from torch import Tensor, nn

from alignctl.errors import DataError, MachineError
from alignctl.rundir import RunDir
from alignctl.train import model as models
from alignctl.train import preflight, trl_seam
from alignctl.train import reference as references
from alignctl.train.gates import Gates, Result
from alignctl.train.preflight import Built
from alignctl.train.tokenizer import template_hash

Make = Callable[..., Built]
MakeGates = Callable[..., Gates]
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
    one = passed(preflight.memory, make(training={"per_device_train_batch_size": 1})).said
    assert one.startswith("the longest row (") and " tokens) fits: peak " in one


def test_memory_runs_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(trl_seam, "loss_and_logps", full)
    built = make()
    with pytest.raises(MachineError, match=r"gate\.memory: the 4 longest rows") as error:
        preflight.memory(built)
    said = str(error.value)
    assert error.value.exit_code == 4 and built.gates.results["memory"].verdict == "stopped"
    assert "do not fit, peak " in said and said.index("were planned: CUDA out of memory. Tried to allocate 2.00") > 0
    keys = [
        "in order of least harm",
        "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=2 (",
        "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=4 (",
        "quantization={load_in_4bit: true}",
    ]
    where = [said.index(key) for key in keys]
    assert where == sorted(where) and "More" not in said


def test_memory_of_the_machine_runs_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_seam, "loss_and_logps", lambda *given: torch.empty(10**15))
    with pytest.raises(MachineError, match=r"do not fit, peak .*: can't allocate memory") as error:
        preflight.memory(make())
    assert error.value.exit_code == 4


def test_another_error_of_the_trial_is_no_matter_of_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trl_seam, "loss_and_logps", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        preflight.memory(make())


def test_room_for_the_optimizers_own_state(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not AdamW's two moments in float32 where the optimizer keeps less, or none on the GPU."""
    taken: list[int] = []
    empty = torch.empty

    def note(*size: Any, **options: Any) -> Tensor:
        if options.get("dtype") is torch.uint8:
            taken.append(size[0])
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", note)
    for optim in ("adamw_torch", "sgd"):
        built = make(training={"optim": optim})
        preflight.memory(built)
    trained = sum(p.numel() for p in built.trainer.model.parameters() if p.requires_grad)
    assert taken == [8 * trained, 0]


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
