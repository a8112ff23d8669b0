"""Gates before the first step: the model that was built, the memory that it needs, and what it starts from."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from alignctl import rundir
from alignctl.errors import DataError, MachineError
from alignctl.plan import report, weights
from alignctl.recipe.schema import Recipe
from alignctl.rundir import STAND_IN, RunDir
from alignctl.train import arguments, planned, trl_seam
from alignctl.train import model as models
from alignctl.train.data import Rows
from alignctl.train.gates import Gates
from alignctl.train.machine import out_of_memory
from alignctl.train.parts import Parts
from alignctl.train.tokenizer import template_hash

# Learning rates that are reported to have worked, with room on both sides: (adapter?) by method.
BANDS = {
    ("sft", True): (1e-5, 2e-3),
    ("sft", False): (1e-6, 2e-3),
    ("dpo", True): (1e-6, 5e-4),
    ("dpo", False): (1e-7, 1e-5),
    ("orpo", True): (5e-6, 1e-3),
    ("orpo", False): (1e-7, 1e-4),
}
# How far a token's log-probability may be from the reference's where both are the same weights.
SAME = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Built:
    """What training is about to start with."""

    recipe: Recipe
    parts: Parts
    trainer: Trainer
    rows: Rows
    gates: Gates

    def batch(self, numbers: list[int]) -> dict[str, Tensor]:
        """The training rows `numbers`, collated, on the device."""
        collated = self.trainer.data_collator([self.trainer.train_dataset[i] for i in numbers])
        return {name: value.to(self.trainer.args.device) for name, value in collated.items()}


def examine(built: Built, *, resumed: bool) -> None:
    """Every gate before the first step, in order.

    Raises:
        DivergedError: a gate stops the run.
        MachineError: the longest rows do not fit.
    """
    for name, gate in (
        ("targets", targets),
        ("quantized", quantized),
        ("trainable", trainable),
        ("learning_rate", learning_rate),
        ("parent", parent),
        ("memory", memory),
        ("reference", reference),
    ):
        if built.gates.on(name) and not (resumed and name == "reference"):
            gate(built)


def same_rows(run: RunDir, fingerprints: dict[str, Any], gates: Gates) -> None:
    """A resumed run goes on with the rows that it began with.

    Raises:
        DataError: the rows are others now.
    """
    before = run.record.get("data", fingerprints)
    if gates.on("resume") and before != fingerprints:
        parts = [name for name in before | fingerprints if fingerprints.get(name) != before.get(name)]
        said = f"the rows of data.{' and data.'.join(parts)} are not those that the run began with"
        way_out = "put the old files back, or train anew with --output DIR"
        gates.stopped("resume", said, way_out, error=DataError)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by name, an adapted one as one layer; without the output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel | PeftModel) else None
    found: dict[str, nn.Module] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            inside.add(name + ".")
        if module is head or any(name.startswith(outer) for outer in inside):
            continue
        if isinstance(module, LoraLayer | nn.Linear | Conv1D):
            found[name] = module
    return found


def targets(built: Built) -> None:
    """Every layer of a kind that gets adapters has one."""
    model = built.trainer.model
    if not isinstance(model, PeftModel):
        built.gates.passed("targets", "all weights are trained, without adapters")
        return
    layers = linears(model)
    with_one = [name for name, module in layers.items() if isinstance(module, LoraLayer)]
    adapted, present = (Counter(map(_kind, names)) for names in (with_one, layers))
    way_out = "name layers that the model has in lora.target_modules, or take all-linear"
    _all_that_was_asked_for(model, way_out, built.gates)
    for kind, count in sorted(adapted.items()):
        if count < present[kind]:
            said = f"{_last(kind)} has an adapter in {count} of {present[kind]} layers"
            built.gates.stopped("targets", said, way_out, value=count, limit=present[kind])
    blocks = {found[1] for name in layers if (found := _LAYER.search(name))}
    reached = {
        found[1] for name, module in layers.items() if isinstance(module, LoraLayer) and (found := _LAYER.search(name))
    }
    if blocks - reached:
        said = f"{len(blocks - reached)} of {len(blocks)} blocks have no adapter"
        built.gates.stopped("targets", said, way_out, value=len(reached), limit=len(blocks))
    said = f"{adapted.total()} adapters, on {', '.join(sorted(set(map(_last, adapted))))} of all {len(blocks)} blocks"
    if without := [name for name in experts(model) if not any(name.startswith(outer + ".") for outer in with_one)]:
        said += f"; {len(without)} tensors of experts have none"
    built.gates.passed("targets", said, value=adapted.total(), limit=sum(present[kind] for kind in adapted))


def _all_that_was_asked_for(model: PeftModel, way_out: str, gates: Gates) -> None:
    """Every layer that PEFT was told to adapt is there, and has an adapter; of `all-linear` PEFT makes such a list."""
    wanted = model.peft_config["default"].target_modules
    asked = set() if isinstance(wanted, str) else set(wanted)
    layers: dict[str, list[tuple[str, bool]]] = {target: [] for target in asked}
    for name, module in model.get_base_model().named_modules():
        for target in asked & _endings(name):
            layers[target].append((name, isinstance(module, LoraLayer)))
    if unknown := sorted(target for target, found in layers.items() if not found):
        gates.stopped("targets", f"no layer of the model is called {', '.join(unknown)}", way_out, value=unknown[0])
    missed = [found for found in layers.values() if not any(adapted for _, adapted in found)]
    if without := sorted({name for found in missed for name, _ in found}):
        n = len({name for found in layers.values() for name, _ in found})
        said = f"{len(without)} of {n} layers that get an adapter have none, such as {without[0]}"
        gates.stopped("targets", said, "report it: PEFT was told to", value=n - len(without), limit=n)


def _endings(name: str) -> set[str]:
    """`a.b.c` and what may be written for it: `b.c`, `c`."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _kind(name: str) -> str:
    """What a layer is in its block: its name behind the last number."""
    return re.split(r"\.\d+\.", name)[-1]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def experts(model: nn.Module) -> list[str]:
    """The names of weights that hold all experts of a block at once, which are no linear layers."""
    return [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name and "lora_" not in name]


def quantized(built: Built) -> None:
    """With a `quantization:` section every linear layer but the head is stored in 4 bits."""
    if built.recipe.quantization is None:
        built.gates.passed("quantized", "not asked for")
        return
    from bitsandbytes.nn import Linear4bit

    layers = {name: _plain(module) for name, module in linears(built.trainer.model).items()}
    wide = [name for name, module in layers.items() if not isinstance(module, Linear4bit)]
    way_out = "look at the model's quantization_config, or take the `quantization:` section away"
    if wide or not layers:
        said = f"{len(wide)} of {len(layers)} layers are not stored in 4 bits, such as {wide[0] if wide else 'any'}"
        built.gates.stopped("quantized", said, way_out, value=len(layers) - len(wide), limit=len(layers))
    if fused := experts(built.trainer.model):
        said = f"{len(fused)} tensors of experts are not stored in 4 bits, such as {fused[0]}"
        built.gates.stopped("quantized", said, way_out, value=0, limit=len(fused))
    wanted = models.quantization(built.recipe, built.parts.precision, built.parts.machine)
    assert wanted is not None
    computes = {
        str(module.compute_dtype).removeprefix("torch.") for module in layers.values() if isinstance(module, Linear4bit)
    }
    asked = str(wanted.bnb_4bit_compute_dtype).removeprefix("torch.")
    if computes != {asked}:
        said = f"4-bit layers compute in {', '.join(sorted(computes))} instead of {asked}"
        built.gates.stopped("quantized", said, way_out, value=sorted(computes - {asked})[0], limit=asked)
    said = f"{len(layers)} of {len(layers)} layers in 4 bits, computed in {asked}"
    built.gates.passed("quantized", said, value=len(layers), limit=len(layers))


def _plain(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def trainable(built: Built) -> None:
    """Something is trained, and in float32: in bfloat16 a weight w stops moving below a step of about |w| / 400."""
    found = {name: p for name, p in built.trainer.model.named_parameters() if p.requires_grad}
    if not found:
        built.gates.stopped(
            "trainable", "no weight of the model is trained", "a `lora:` section, or none at all", value=0
        )
    low = [name for name, p in found.items() if p.dtype != torch.float32]
    if low:
        kinds = ", ".join(sorted({str(found[name].dtype).removeprefix("torch.") for name in low}))
        said = f"{len(low)} of {len(found)} trained tensors are {kinds}, where small updates round to nothing"
        built.gates.stopped(
            "trainable", said, "report it: alignctl keeps them in float32", value=kinds, limit="float32"
        )
    count = sum(p.numel() for p in found.values())
    built.gates.passed("trainable", f"{count:,} weights in {len(found)} tensors, float32", value=count)


def learning_rate(built: Built) -> None:
    """The learning rate lies where the method has worked."""
    method, adapter, rate = built.recipe.method, built.recipe.trains_adapter, built.recipe.training.learning_rate
    low, high = BANDS[method, adapter]
    band = f"{low:g} to {high:g}"
    what = f"{method.upper()} of {'an adapter' if adapter else 'all weights'} has worked with {band}"
    if not low <= rate <= high:
        likely = "nothing will be learned" if rate < low else "training may diverge"
        said = f"training.learning_rate is {rate:g}, and {what}: {likely}"
        built.gates.warned(
            "learning_rate", said, "change it, if you do not mean it", value=rate, limit=f"{low:g} to {high:g}"
        )
    else:
        built.gates.passed("learning_rate", f"{rate:g}; {what}", value=rate, limit=band)


def parent(built: Built) -> None:
    """The adapter that training goes on from belongs to this base and this chat template."""
    folder = models.adapter_folder(built.recipe)
    if folder is None:
        built.gates.passed("parent", "training starts from the base model")
        return
    if folder.is_relative_to(built.parts.run / STAND_IN):
        built.gates.passed("parent", "a stand-in for the adapter, made for the stand-in for the model")
        return
    record = parent_record(folder)
    trained_on, was = record.get("model", {}), record.get("model", {}).get("name_or_path")
    here = models.base_fingerprint(built.trainer.model)
    stored = models.storage(built.recipe, built.parts.precision)
    if trained_on.get("storage", stored) != stored:
        said = f"{folder} was trained on weights in {trained_on['storage']}, and is used on weights in {stored}"
        built.gates.warned("parent", said, "the same model.dtype and `quantization:` as there", value=stored)
    elif trained_on.get("base_fingerprint", here) != here:
        said = f"{folder} was trained on other weights ({was}) than {built.recipe.model.name_or_path} has here"
        way_out = f"model.name_or_path: {was}, in the same revision"
        built.gates.stopped("parent", said, way_out, value=here[:16], limit=trained_on["base_fingerprint"][:16])
    template, mine = record.get("template", {}).get("sha256"), template_hash(built.parts.encoder)
    if template is not None and template != mine:
        said = f"{folder} was trained with another chat template ({record['template']['name']})"
        way_out = f"model.chat_template: {record['template']['name']}"
        built.gates.stopped("parent", said, way_out, value=mine[:16], limit=template[:16])
    if not record:
        said = f"{folder} has no run.json that says on which weights it was trained"
        built.gates.warned("parent", said, "make sure that it belongs to model.name_or_path")
        return
    built.gates.passed("parent", f"{folder} was trained on these weights with this template", value=here[:16])


def parent_record(folder: Path) -> dict[str, Any]:
    """run.json of the run that an adapter folder is of; empty where there is none."""
    try:
        return rundir.read_json(folder / "run.json") or rundir.read_json(folder.parent / "run.json")
    except ValueError:
        return {}


def memory(built: Built) -> None:
    """The longest rows go forward and backward, with room for the optimizer, so that none runs out of it later."""
    size = min(built.recipe.training.per_device_train_batch_size, len(built.rows))
    longest = [int(i) for i in built.rows.sizes().argsort(kind="stable")[::-1][:size]]
    tokens = int(built.rows.sizes()[longest].sum())
    what = f"the {size} longest rows" if size > 1 else "the longest row"
    what += f" ({tokens:,} tokens)"
    try:
        _forward_backward(built, built.batch(longest))
    except (RuntimeError, MemoryError) as error:
        if not (why := out_of_memory(error)):
            raise
        peak = built.parts.machine.peak_memory_gib()
        plan = planned.plan(built.recipe, built.parts, built.trainer, built.rows)
        beside, way_out = report.shortage(report.record(plan) if plan is not None else {}, peak)
        said = f"{what} {'do' if size > 1 else 'does'} not fit, {beside}: {why}"
        built.gates.stopped("memory", said, way_out, value=round(peak, 3), error=MachineError)
    peak = built.parts.machine.peak_memory_gib()
    built.gates.passed("memory", f"{what} fit{'' if size > 1 else 's'}: peak {peak:.2f} GiB", value=round(peak, 3))


def _forward_backward(built: Built, batch: dict[str, Tensor]) -> None:
    trainer = built.trainer
    if trainer.args.gradient_checkpointing:  # the Trainer does it when it begins
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    state, _ = weights.states(trained, arguments.optimizer(built.recipe, built.parts.machine))
    trainer.model.train()
    with torch.random.fork_rng(devices=[] if built.parts.machine.kind == "cpu" else None):
        room = torch.empty(state, dtype=torch.uint8, device=trainer.args.device)  # on a CPU never touched
        with trainer.accelerator.autocast():
            loss, _ = trl_seam.loss_and_logps(trainer, batch)
        loss.backward()
        del room, loss
    trainer.model.zero_grad(set_to_none=True)
    if built.parts.machine.kind == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def reference(built: Built) -> None:
    """DPO starts where policy and reference are the same weights: rewards 0, and a loss of ln 2."""
    trainer, recipe = built.trainer, built.recipe
    if recipe.dpo is None:
        built.gates.passed("reference", "the method has none")
        return
    batch = built.batch(list(range(min(recipe.training.per_device_train_batch_size, len(built.rows)))))
    trainer.model.eval()
    with trainer.accelerator.autocast():
        loss, logps = trl_seam.loss_and_logps(trainer, batch)
        given = batch if "ref_chosen_logps" in batch else _reference(trainer, batch)
    trainer.model.train()
    answers = batch["completion_mask"][:, 1:]
    policy = (logps.float() * answers).sum(1)
    apart = policy - torch.cat([given["ref_chosen_logps"], given["ref_rejected_logps"]])
    worst = (apart.abs() / answers.sum(1)).max().item()
    limit = SAME[built.parts.precision]
    said = (
        f"policy and reference differ by {worst:.1e} a token before the first step, and the loss is {loss.item():.4f}"
    )
    if not worst <= limit:
        way_out = "model.adapter must be what training starts from; a merged model needs its own folder"
        built.gates.stopped("reference", said, way_out, value=worst, limit=limit)
    plain = recipe.dpo.loss_type == "sigmoid" and recipe.dpo.ld_alpha is None
    built.gates.passed("reference", said + (f" (ln 2 is {math.log(2):.4f})" if plain else ""), value=worst, limit=limit)


def _reference(trainer: Trainer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with trl_seam.given_reference(trainer):
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
