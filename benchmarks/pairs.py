"""TRL's own trainer and alignctl's in one run: same rows, same model, same seed, a step of the one, a step of the other.

TRL's trainer is as it comes, with its own collator, head and loss; it is only given the token ids, because it would
tokenize differently. Each trainer takes its first step, which nothing counts, by its own `train()`. Every memory figure
is of a process that holds one of the two.

python benchmarks/pairs.py --method dpo --batch-size 4
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from datasets import Dataset
from peft import get_peft_model
from transformers import PrinterCallback, Trainer, set_seed
from trl import DPOConfig, SFTConfig
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from alignctl.recipe import catalog
from alignctl.recipe.schema import Recipe
from alignctl.train import arguments, data, fit, machine, packing
from alignctl.train import model as models
from alignctl.train.parts import Parts
from alignctl.train.tokenizer import load_encoder
from alignctl.train.trl_seam import Batch, IdsDPOTrainer, IdsSFTTrainer

MIB = 2**20
# For both trainers: the rows in their order, and nothing written or counted beside the training.
PLAIN = {
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "logging_strategy": "no",
    "include_num_input_tokens_seen": False,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRAINING = {"learning_rate": 5e-5, "lr_scheduler_type": "constant", "max_steps": 1}


class TrlORPOTrainer(ORPOTrainer):
    """TRL's ORPOTrainer, given ids where it would tokenize."""

    def tokenize_row(self, feature: Batch, model: Any = None) -> Batch:
        """An encoded pair in the columns that TRL's collator takes."""
        out: Batch = {"prompt_input_ids": feature["prompt_ids"]}
        for side in ("chosen", "rejected"):
            ids = feature["prompt_ids"] + feature[f"{side}_ids"]
            out[f"{side}_input_ids"], out[f"{side}_attention_mask"] = ids, [1] * len(ids)
            out[f"{side}_labels"] = [-100] * len(feature["prompt_ids"]) + feature[f"{side}_ids"]
        return out


def build_trl(recipe: Recipe, parts: Parts) -> Trainer:
    """TRL's trainer as it comes, with the arguments that alignctl gives it; its adapter is float32, as alignctl's is."""
    common = arguments.common(recipe, parts.machine, parts.precision, parts.run)
    shared = {"train_dataset": parts.train, "processing_class": parts.encoder.tokenizer}
    model, lora = parts.start(recipe), models.lora_config(recipe)
    trainer: Trainer
    if recipe.dpo is not None:
        args = DPOConfig(**recipe.dpo.model_dump(exclude_none=True), **common)
        trainer = IdsDPOTrainer(model, args=args, peft_config=lora, **shared)
    elif recipe.orpo is not None:
        args = ORPOConfig(beta=recipe.orpo.beta, remove_unused_columns=False, **common)
        trainer = TrlORPOTrainer(get_peft_model(model, lora), args, **shared)
    else:
        args = SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **common)
        trainer = IdsSFTTrainer(model, args=args, peft_config=lora, **shared)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_ours(recipe: Recipe, parts: Parts) -> Trainer:
    """The trainer that `alignctl` trains with."""
    return fit.BUILD[recipe.method](recipe, parts)


BUILD: dict[str, Callable[[Recipe, Parts], Trainer]] = {"trl": build_trl, "ours": build_ours}


def build(engine: str, recipe: Recipe, parts: Parts) -> Trainer:
    """The trainer of an engine, whose adapter starts alike in both."""
    set_seed(recipe.training.seed)
    return BUILD[engine](recipe, parts)


@dataclass(frozen=True)
class Step:
    """What one update cost, and its loss."""

    seconds: float
    cpu_seconds: float
    tokens: int
    loss: float


def update(trainer: Trainer, rows: list[Batch]) -> Step:
    """One update on `rows` of a trainer that `train()` has set up."""
    formed = [trainer.tokenize_row(row) for row in rows] if isinstance(trainer, ORPOTrainer) else rows
    batch = trainer.data_collator(formed)
    count = computed(trainer, batch)
    wait(trainer)
    began, cpu = time.perf_counter(), time.process_time()
    loss = trainer.training_step(trainer.model_wrapped, batch)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    wait(trainer)
    return Step(time.perf_counter() - began, time.process_time() - cpu, count, loss.item())


def computed(trainer: Trainer, batch: Batch) -> int:
    """How many tokens one pass over `batch` computes, padding included where there is any."""
    if "chosen_input_ids" in batch:
        sides = [batch["chosen_input_ids"], batch["rejected_input_ids"]]
        return sum(len(side) for side in sides) * max(side.shape[1] for side in sides)
    ids: torch.Tensor = batch["input_ids"]
    if getattr(packing.backbone(trainer.model), "packs", False):
        return packing.lay_out(ids, batch["attention_mask"]).segments.total
    return ids.numel()


def wait(trainer: Trainer) -> None:
    """Let a GPU finish."""
    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize()


def facts(where: machine.Machine) -> dict[str, Any]:
    """Where and when a measurement was made, and of what."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{where.name}; {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in fit.PACKAGES},
    }


def heading(found: dict[str, Any]) -> str:
    """The facts as a line of Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"`{found['command']}`, {found['date']}, {found['machine']}, {versions}.\n"


def pick(device: str | None) -> machine.Machine:
    """The machine that is asked for; ends the script where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here", file=sys.stderr)
        sys.exit(4)
    if device == "cpu" and torch.cuda.is_available():
        return machine.Machine("cpu", f"{platform.machine()} CPU", True)
    return machine.detect()


def recipe_of(args: argparse.Namespace, where: machine.Machine) -> Recipe:
    """What both trainers are built from."""
    default = yaml.safe_load((catalog.folder() / "_base" / "smollm2.yaml").read_text(encoding="utf-8"))["model"]
    name = args.model or default["name_or_path"]
    model = {"name_or_path": str(Path(name).resolve()) if Path(name).is_dir() else name}
    if name == default["name_or_path"]:
        model["revision"] = default["revision"]
    source: dict[str, Any] = {"path": str(args.data or catalog.folder() / "data" / "brief" / "train.jsonl")}
    if args.method == "sft" and (args.answer or not args.data):
        source["answer"] = "chosen"
    values = {
        "model": {**model, "dtype": args.dtype or ("bfloat16" if where.kind == "cuda" else "float32")},
        "lora": LORA,
        "data": {"train": [source], "max_length": args.max_length},
        "training": {**TRAINING, "per_device_train_batch_size": args.batch_size},
        "trl": PLAIN,
        args.method: {},
    }
    return Recipe.model_validate(values)


def load(recipe: Recipe, where: machine.Machine, steps: int, scratch: str) -> Parts:
    """The rows of one step that is not counted and of `steps` that are, in their order."""
    encoder = load_encoder(recipe)
    rows, _ = data.read(recipe, encoder)
    count = recipe.training.per_device_train_batch_size * (steps + 1)
    taken = Dataset.from_list([rows.encoded(i % len(rows)) for i in range(count)])
    return Parts(where, where.precision(recipe.model.dtype), encoder, taken, None, Path(scratch))


def batches(recipe: Recipe, parts: Parts) -> list[list[Batch]]:
    """The rows of each step that is counted."""
    size, rows = recipe.training.per_device_train_batch_size, parts.train.to_list()
    return [rows[start : start + size] for start in range(size, len(rows), size)]


def alternate(recipe: Recipe, parts: Parts) -> list[dict[str, Step]]:
    """Every step by both trainers, which take turns at being first."""
    trainers = {engine: build(engine, recipe, parts) for engine in BUILD}
    for trainer in trainers.values():
        trainer.train()
    steps = []
    for i, rows in enumerate(batches(recipe, parts)):
        order = list(BUILD) if i % 2 == 0 else list(BUILD)[::-1]
        steps.append({engine: update(trainers[engine], rows) for engine in order})
    return steps


def memory(engine: str, recipe: Recipe, parts: Parts) -> dict[str, float]:
    """Peak memory of training with one engine in this process, and the part above the loaded model, in MiB."""
    trainer = build(engine, recipe, parts)
    for parameter in trainer.model.parameters():
        parameter.sum()  # a mapped file counts only where it was read
    gc.collect()
    on_gpu = parts.machine.kind == "cuda"
    loaded = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    with contextlib.suppress(OSError):  # forget the peak of loading; Linux only
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    for rows in batches(recipe, parts):
        update(trainer, rows)
    peak = parts.machine.peak_memory_gib() * 1024
    return {"peak": peak, "above_model": peak - loaded / MIB}


def memory_apart(engine: str) -> dict[str, float]:
    """`memory` in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "memory.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--only", engine, "--json", str(file)]
        subprocess.run(command, check=True)
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return found


def results(steps: list[dict[str, Step]], used: dict[str, dict[str, float]], size: int) -> dict[str, Any]:
    """What came out; every ratio is TRL's over ours, of steps their median."""

    def ratios(name: str) -> list[float]:
        return [getattr(step["trl"], name) / getattr(step["ours"], name) for step in steps]

    def mean(name: str) -> dict[str, float]:
        return {engine: statistics.mean(getattr(step[engine], name) for step in steps) for engine in BUILD}

    measured, predicted = ratios("seconds"), statistics.median(ratios("tokens"))
    return {
        "rows_per_second": {engine: size / seconds for engine, seconds in mean("seconds").items()},
        "ratio": statistics.median(measured),
        "ratio_min": min(measured),
        "ratio_max": max(measured),
        "cpu_seconds": mean("cpu_seconds"),
        "cpu_ratio": statistics.median(ratios("cpu_seconds")),
        "tokens": mean("tokens"),
        "predicted_ratio": predicted,
        "share_reached": statistics.median(measured) / predicted,
        "memory_mib": used,
        "memory_ratio": {part: used["trl"][part] / used["ours"][part] for part in used["ours"]},
        "loss_difference": max(abs(step["trl"].loss - step["ours"].loss) for step in steps),
    }


def table(found: dict[str, Any], unit: str) -> str:
    """The results as Markdown."""

    def line(what: str, values: dict[str, float], ratio: str, form: str) -> str:
        return f"| {what} | {values['trl']:{form}} | {values['ours']:{form}} | {ratio} |"

    spread = f"{found['ratio']:.2f} ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})"
    part = {name: {engine: found["memory_mib"][engine][name] for engine in BUILD} for name in found["memory_ratio"]}
    memory_ratio = {name: f"{ratio:.2f}" for name, ratio in found["memory_ratio"].items()}
    lines = [
        "| | TRL | alignctl | ratio, median (least to most) |",
        "|---|---|---|---|",
        line(f"{unit} a second", found["rows_per_second"], spread, ".2f"),
        line("CPU seconds a step", found["cpu_seconds"], f"{found['cpu_ratio']:.2f}", ".2f"),
        line("tokens computed a step", found["tokens"], f"{found['predicted_ratio']:.2f}", ",.0f"),
        f"| speed reached of what the tokens predict | | | {found['share_reached']:.0%} |",
        line("peak memory, MiB", part["peak"], memory_ratio["peak"], ",.0f"),
        line("of it above the loaded model", part["above_model"], memory_ratio["above_model"], ",.0f"),
        f"| largest difference in loss | | | {found['loss_difference']:.1e} |",
    ]
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(fit.BUILD), default="dpo")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="steps that count; one more warms up")
    parser.add_argument("--model", help="a folder or what `model.name_or_path` takes; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="rows in any form that alignctl reads; default: the demo's")
    parser.add_argument("--answer", action="store_true", help="sft on --data with pairs: train on the chosen answers")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    parser.add_argument("--json", type=Path, help="write everything here too")
    parser.add_argument("--small", action="store_true", help="few steps: about a minute for each method on a CPU")
    parser.add_argument("--only", choices=list(BUILD), help="only the memory of one of the two, for --json")
    args = parser.parse_args()
    args.steps = min(args.steps, 3) if args.small else args.steps
    return args


def main() -> None:
    args = parsed()
    where = pick(args.device)
    recipe = recipe_of(args, where)
    # The memory first: a process inherits the peak of the one that starts it.
    used = {} if args.only else {engine: memory_apart(engine) for engine in BUILD}
    with tempfile.TemporaryDirectory() as scratch:
        parts = load(recipe, where, args.steps, scratch)
        if args.only:
            args.json.write_text(json.dumps(memory(args.only, recipe, parts)), encoding="utf-8")
            return
        steps = alternate(recipe, parts)
    found = facts(where) | results(steps, used, args.batch_size)
    found |= {"settings": recipe.model_dump(), "steps": [{k: asdict(v) for k, v in step.items()} for step in steps]}
    print(heading(found))
    print(table(found, "rows" if args.method == "sft" else "pairs"))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
