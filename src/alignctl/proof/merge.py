"""An adapter merged into its base: a model folder of its own, compared with the adapter before it is called done."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alignctl import rundir
from alignctl.errors import MachineError, Problem, RecipeError, VerifyError
from alignctl.proof import agreement, gguf, shards, updates
from alignctl.proof.agreement import Agreement, Rowset
from alignctl.proof.gguf import Converter
from alignctl.proof.shards import Checkpoint
from alignctl.proof.trained import Trained
from alignctl.proof.updates import Updates
from alignctl.recipe.schema import Recipe
from alignctl.rundir import NOTE, WRITING
from alignctl.train import card
from alignctl.train import model as models
from alignctl.train.display import Display
from alignctl.train.record import flush
from alignctl.train.tokenizer import model_path

# Nats a token, by the coarser of what was computed in and what is kept: ten times what rounding alone was seen to do
# (docs/after.md). Base weights that are not those of training are another model, and may be further off.
MAX_KL = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
ANOTHER_BASE = 5e-2
MIN_TOP1 = 0.9
PACKAGES = ("alignctl", "torch", "transformers", "peft", "safetensors")
# What the model folder of a run has besides its weights.
_WEIGHTS = ("adapter_model.safetensors", "adapter_config.json", "README.md")


@dataclass(frozen=True)
class Wanted:
    """What is to be made: from which run, where, on which base weights, in which dtype, and how near it must be."""

    trained: Trained
    out: Path
    onto: str
    dtype: torch.dtype
    max_kl: float | None

    @property
    def recipe(self) -> Recipe:
        return self.trained.recipe

    @property
    def as_trained(self) -> bool:
        """Whether the base weights are those that the adapter was trained on."""
        return self.recipe.quantization is None or self.onto == "dequantized"

    @property
    def limit(self) -> float:
        """The KL divergence from the adapter that is allowed, in nats a token."""
        if self.max_kl is not None:
            return self.max_kl
        allowed = max(MAX_KL[self.dtype], MAX_KL[self.trained.precision])
        return allowed if self.as_trained else max(allowed, ANOTHER_BASE)


@dataclass(frozen=True)
class Plan:
    """Base weights, the adapter's updates and the layers kept in 4 bits, by the base weights' names."""

    source: Checkpoint
    config: PreTrainedConfig
    updates: Updates
    adapted: dict[str, str]
    rounded: dict[str, bool]


def wanted(trained: Trained, out: Path, onto: str | None, dtype: str | None, max_kl: float | None) -> Wanted:
    """A merge as asked for, with what was left open: the base as it was in training, in the run's precision.

    Raises:
        RecipeError: there is nothing to merge, or not in this way, or `out` is taken.
    """
    if not trained.recipe.trains_adapter:
        what = "trained all weights, so there is nothing to merge"
        raise RecipeError(Problem(str(trained.run.path), what, f"{trained.model_folder} is the whole model"))
    if trained.run.status != "finished":
        what = f"is not finished (status: {trained.run.status})"
        raise RecipeError(Problem(str(trained.run.path), what, "alignctl verify says whether its model is whole"))
    quantized = trained.recipe.quantization is not None
    if onto == "dequantized" and not quantized:
        what = "the run kept no weights in 4 bits, so there are none to dequantise"
        raise RecipeError(Problem("--onto", what, "--onto original"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(Problem(str(out), "exists and is not empty", "name another folder"))
    kept = trained.precision if dtype is None else getattr(torch, dtype)
    return Wanted(trained, out, onto or ("dequantized" if quantized else "original"), kept, max_kl)


def merge(asked: Wanted, display: Display, size: int | str = shards.SIZE) -> Agreement:
    """Merge, look at what was written, and only then put it at its place.

    Raises:
        RecipeError: the adapter or its base cannot be merged.
        MachineError: the disk has no room, or the base is another one than in training.
        VerifyError: the merged model is not the adapted one.
    """
    plan = _plan(asked)
    _check_room(asked, plan)
    out = asked.out.absolute()
    beside = out.with_name(out.name + WRITING)
    rundir.remove(beside)
    beside.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(dir=beside) as scratch:
            with display.waiting("what the adapter predicts"):
                rowset = agreement.rows(asked.trained)
                agreement.note(asked.trained, rowset, Path(scratch))
            with display.waiting(f"merging {len(plan.adapted)} weights"):
                _write(asked, plan, beside, size)
            with display.waiting("what the merged model predicts"):
                found = agreement.compare(_loaded(asked, beside), rowset, Path(scratch))
                agreement.release()
        _judge(asked, found)
        _document(asked, plan, beside, found, rowset)
        flush(beside)
        beside.replace(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return found


def convert(asked: Wanted, to: Converter, display: Display) -> str:
    """The merged model at its place as a GGUF file too, with a Modelfile; what is known of the file, in words.

    Raises:
        MachineError: the converter fails.
        VerifyError: the file, read back, is another model; it is not kept.
    """
    with display.waiting(f"converting to {to.file.name}"):
        beside = to.convert(asked.out, asked.dtype)
    try:
        said = _read_back(asked, beside)
        beside.replace(to.file)
    finally:
        rundir.remove(beside)
    text, lacks = gguf.modelfile(to.file, asked.trained.encoder)
    rundir.write_text(to.file.with_suffix(gguf.MODELFILE), text)
    return said + (f"; {lacks}" if lacks else "")


def _read_back(asked: Wanted, file: Path) -> str:
    """How far the model in `file` is from the merged one, on the rows that the merge was compared on."""
    device = asked.trained.machine.device
    model = gguf.loaded(file, asked.dtype, device)
    if model is None:
        return "not compared: transformers reads no GGUF of this architecture"
    rows = agreement.rows(asked.trained).rows
    found = [agreement.predictions(model, row) for row in rows]
    del model
    agreement.release()
    merged = _loaded(asked, asked.out)
    far = agreement.mean_kl([agreement.predictions(merged, row) for row in rows], found)
    if not far <= MAX_KL[asked.dtype]:
        what = f"read back, it is {far:.2g} nats a token from the merged model"
        raise VerifyError(Problem("--gguf", what, "report it to the converter; the merged model is whole"))
    return f"read back, {far:.2g} nats a token from the merged model"


def _plan(asked: Wanted) -> Plan:
    """What is to be done, with everything that cannot be merged refused before a weight is read."""
    path, revision = model_path(asked.recipe)
    trusted = asked.recipe.model.trust_remote_code
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusted)
    if getattr(config, "quantization_config", None) is not None:
        what = "its checkpoint is quantised, and nothing is merged into rounded weights"
        raise RecipeError(Problem(path, what, "train on the checkpoint in full precision"))
    source = shards.opened(path, revision)
    found = updates.updates(asked.trained.model_folder, config, trusted=trusted)
    rounded: dict[str, bool] = {}
    if asked.onto == "dequantized":
        rounded = updates.four_bit(config, _quantization(asked), trusted=trusted)
    prefix = updates.skeleton(config, trusted=trusted).base_model_prefix
    names = {layer: source.find(f"{layer}.weight", prefix) for layer in {**found.layers, **rounded}}
    missing = sorted(layer for layer, name in names.items() if name is None)
    if missing:
        what = f"has no weight {missing[0]}.weight for the adapter to be merged into"
        way_out = "transformers renames it while loading; serve or push the run as an adapter"
        raise RecipeError(Problem(path, what, way_out))
    by_weight = {name: layer for layer, name in names.items() if name is not None}
    adapted = {name: layer for name, layer in by_weight.items() if layer in found.layers}
    return Plan(source, config, found, adapted, {n: rounded[at] for n, at in by_weight.items() if at in rounded})


def _quantization(asked: Wanted) -> Any:
    return models.quantization(asked.recipe, asked.trained.precision, asked.trained.machine)


def _check_room(asked: Wanted, plan: Plan) -> None:
    there = next(folder for folder in asked.out.absolute().parents if folder.is_dir())
    needed, free = plan.source.bytes(asked.dtype), shutil.disk_usage(there).free
    if needed > free:
        what = f"the merged weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise MachineError(Problem(str(there), what, "free space, or name a folder on another disk"))


def _write(asked: Wanted, plan: Plan, folder: Path, size: int | str) -> None:
    """Weights, config, tokenizer with its template, and generation config."""
    shards.write(plan.source, folder, asked.dtype, _change(asked, plan), size)
    plan.config.dtype = asked.dtype
    plan.config.pad_token_id = asked.trained.encoder.tokenizer.pad_token_id
    plan.config.save_pretrained(folder)
    for file in asked.trained.model_folder.iterdir():
        if file.is_file() and file.name not in _WEIGHTS:
            shutil.copyfile(file, folder / file.name)


def _change(asked: Wanted, plan: Plan) -> Callable[[str, Tensor], Tensor]:
    """What becomes of a weight: rounded as in training where it was, then with the adapter's update."""
    precision, device = asked.trained.precision, asked.trained.machine.device
    quantization = _quantization(asked) if plan.rounded else None

    def change(name: str, weight: Tensor) -> Tensor:
        if quantization is not None and name in plan.rounded:
            weight = updates.rounded(weight, quantization, precision, device, transposed=plan.rounded[name])
        if name in plan.adapted:
            weight = plan.updates.merged(plan.adapted[name], weight)
        return weight

    return change


def _loaded(asked: Wanted, folder: Path) -> PreTrainedModel:
    """The merged model as anybody loads it.

    Raises:
        VerifyError: it cannot be, or lacks weights.
    """
    trusted = asked.recipe.model.trust_remote_code
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map={"": asked.trained.machine.device},
            trust_remote_code=trusted,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        what = f"the merged model cannot be loaded: {' '.join(str(error).split())}"
        raise VerifyError(Problem(str(asked.out), what, "report it; the run can be served as an adapter")) from error
    if info["missing_keys"]:
        what = f"the merged model lacks weights such as {min(info['missing_keys'])}"
        raise VerifyError(Problem(str(asked.out), what, "report it; the run can be served as an adapter"))
    out: PreTrainedModel = model.eval()
    return out


def _judge(asked: Wanted, found: Agreement) -> None:
    """Refuse a merged model that predicts something else than the adapted one.

    Raises:
        VerifyError: it does.
    """
    far = not found.kl <= asked.limit
    unlike = asked.max_kl is None and not found.top1 >= MIN_TOP1
    if not far and not unlike:
        return
    allowed = f"{asked.limit:g} nats" + (f" and {MIN_TOP1:.0%}" if asked.max_kl is None else "")
    what = f"the merged model is not the adapted one: {said(found)}; allowed are {allowed}"
    raise VerifyError(Problem(str(asked.out), what, _way_out(asked)))


def _way_out(asked: Wanted) -> str:
    if not asked.as_trained:
        return "--onto dequantized: the adapter was trained on the rounded weights; --max-kl takes it as it is"
    if asked.dtype != torch.float32:
        return "--dtype float32 rounds less; --max-kl takes it as it is"
    return "report it; --max-kl takes it as it is"


def said(found: Agreement) -> str:
    """How near the merged model is, in words."""
    return (
        f"KL {found.kl:.2g} nats a token from the adapter (the base's is {found.base_kl:.2g}), the same best token in "
        f"{found.top1:.1%} of {found.tokens} tokens of {found.rows} rows"
    )


def _document(asked: Wanted, plan: Plan, folder: Path, found: Agreement, rowset: Rowset) -> None:
    """The model card, and alignctl.json: what was merged, how near it is, and a checksum of every file."""
    run, dtype = asked.trained.run, str(asked.dtype).removeprefix("torch.")
    how = f"the adapter of {len(plan.adapted)} layers is merged into the {asked.onto} base weights, in {dtype}"
    summary = rundir.read_json(run / "summary.json")
    text = card.text(asked.recipe, run.record, summary, merged=f"{how}; beside the adapter: {said(found)}")
    rundir.write_text(folder / "README.md", text)
    note = {
        "run": run.path.resolve().name,
        "adapter": rundir.digests(asked.trained.model_folder).get("adapter_model.safetensors"),
        "base": {key: run.record["model"][key] for key in ("name_or_path", "revision", "commit", "base_fingerprint")},
        "onto": asked.onto,
        "dtype": dtype,
        "layers": len(plan.adapted),
        "rounded": len(plan.rounded),
        "compared_on": rowset.what,
        **asdict(found),
        "max_kl": asked.limit,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "made": rundir.now(),
        "files": rundir.digests(folder),
    }
    rundir.write_json(folder / NOTE, note)
