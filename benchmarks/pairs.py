"""TRL's own trainer and alignctl's in one run, a step of the one and a step of the other: same rows, model and seed.

TRL's trainer is as it comes, with its own collator, head and loss; it is only given the token ids, because it would
tokenize differently. Each takes its first step, which does not count, by its own `train()`. Memory is measured in a
process for each.

python benchmarks/pairs.py --method dpo --batch-size 4
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
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

ENGINES = ("trl", "ours")
MIB = 2**20
# For both trainers: the rows in their order, and nothing written or counted beside the training.
PLAIN = {"train_sampling_strategy": "sequential", "include_num_input_tokens_seen": False}
PLAIN |= {"save_strategy": "no", "logging_strategy": "no"}
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
    """TRL's trainer as it comes, given alignctl's arguments; its adapter is float32, as alignctl's is."""
    common = arguments.common(recipe, parts.machine, parts.precision, parts.run)
    given: dict[str, Any] = {"train_dataset": parts.train, "processing_class": parts.encoder.tokenizer}
    model, lora = parts.start(recipe), models.lora_config(recipe)
    trainer: Trainer
    if recipe.dpo is not None:
        dpo = DPOConfig(**recipe.dpo.model_dump(exclude_none=True), **common)
        trainer = IdsDPOTrainer(model, args=dpo, peft_config=lora, **given)
    elif recipe.orpo is not None:
        orpo = ORPOConfig(beta=recipe.orpo.beta, remove_unused_columns=False, **common)
        trainer = TrlORPOTrainer(get_peft_model(model, lora), orpo, **given)
    else:
        sft = SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **common)
        trainer = IdsSFTTrainer(model, args=sft, peft_config=lora, **given)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    return trainer


def build(engine: str, recipe: Recipe, parts: Parts) -> Trainer:
    """The trainer of an engine; its adapter starts alike in both."""
    set_seed(recipe.training.seed)
    return build_trl(recipe, parts) if engine == "trl" else fit.BUILD[recipe.method](recipe, parts)


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
    began, cpu = time.perf_counter(), time.process_time()
    loss = trainer.training_step(trainer.model_wrapped, batch)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    getattr(torch, trainer.args.device.type).synchronize()  # does nothing on a CPU
    return Step(time.perf_counter() - began, time.process_time() - cpu, computed(trainer, batch), loss.item())


def computed(trainer: Trainer, batch: Batch) -> int:
    """How many tokens one pass over `batch` computes, padding included where there is any."""
    if "chosen_input_ids" in batch:
        sides = [batch["chosen_input_ids"], batch["rejected_input_ids"]]
        return 2 * len(sides[0]) * max(side.shape[1] for side in sides)
    packs = getattr(packing.backbone(trainer.model), "packs", False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return packing.lay_out(ids, mask).segments.total if packs else ids.numel()


def facts(where: machine.Machine) -> dict[str, Any]:
    """Where and when a measurement was made, and of what."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    found = f"{where.name}; {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version()} | {name: version(name) for name in fit.PACKAGES}
    made = {"command": shlex.join(["python", *sys.argv]), "date": str(datetime.now(UTC).date())}
    return {**made, "machine": found, "versions": versions}


def heading(found: dict[str, Any]) -> str:
    """The facts in Markdown."""
    versions = ", ".join(map(" ".join, found["versions"].items()))
    return f"`{found['command']}`, {found['date']}, {found['machine']}; {versions}.\n"


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
    base = yaml.safe_load((catalog.folder() / "_base" / "smollm2.yaml").read_text(encoding="utf-8"))
    model = {"name_or_path": args.model} if args.model else base["model"]
    answer = "chosen" if args.method == "sft" and (args.answer or not args.data) else None
    source = {"path": str(args.data or catalog.folder() / "data" / "brief" / "train.jsonl"), "answer": answer}
    model |= {"dtype": args.dtype or ("bfloat16" if where.kind == "cuda" else "float32")}
    values = {
        "model": model,
        "lora": LORA,
        "data": {"train": [source], "max_length": args.max_length},
        "training": {**TRAINING, "per_device_train_batch_size": args.batch_size},
        "trl": PLAIN,
        args.method: {},
    }
    return Recipe.model_validate(values)


def load(recipe: Recipe, where: machine.Machine, steps: int, scratch: str) -> tuple[Parts, list[list[Batch]]]:
    """What the trainers are built from, and the rows of each step that counts; those of the warm-up come first."""
    encoder, size = load_encoder(recipe), recipe.training.per_device_train_batch_size
    rows = data.read(recipe, encoder)[0]
    taken = [rows.encoded(i % len(rows)) for i in range(size * (steps + 1))]
    parts = Parts(where, where.precision(recipe.model.dtype), encoder, Dataset.from_list(taken), None, Path(scratch))
    return parts, [taken[start : start + size] for start in range(size, len(taken), size)]


def alternate(recipe: Recipe, parts: Parts, batches: list[list[Batch]]) -> list[dict[str, Step]]:
    """Every step by both trainers, which take turns at being first."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # keep what is freed: touching it anew can take longer than a step, on some machines
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
    trainers = {engine: build(engine, recipe, parts) for engine in ENGINES}
    for trainer in trainers.values():
        trainer.train()
    orders = [ENGINES if i % 2 else ENGINES[::-1] for i in range(len(batches))]
    return [{each: update(trainers[each], rows) for each in order} for order, rows in zip(orders, batches, strict=True)]


def memory(engine: str, recipe: Recipe, parts: Parts, batches: list[list[Batch]]) -> dict[str, float]:
    """Peak memory of one engine in this process, and the part above the loaded model, in MiB: of the longest batch."""
    trainer = build(engine, recipe, parts)
    for parameter in trainer.model.parameters():
        parameter.sum()  # a mapped file counts only where it was read
    on_gpu, peaks = parts.machine.kind == "cuda", Path("/proc/self/clear_refs")
    loaded = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif peaks.exists():  # Linux
        peaks.write_text("5", encoding="ascii")
    trainer.train()
    update(trainer, max(batches, key=lambda rows: max(sum(map(len, row.values())) for row in rows)))
    peak = parts.machine.peak_memory_gib() * 1024
    return {"peak": peak, "above_model": peak - loaded / MIB}


def memory_apart(engine: str, scratch: str) -> dict[str, float]:
    """`memory` in a process of its own."""
    file = Path(scratch) / "memory.json"
    subprocess.run([sys.executable, *sys.argv, "--only", engine, "--json", str(file)], check=True)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def results(steps: list[dict[str, Step]], used: dict[str, dict[str, float]], size: int) -> dict[str, Any]:
    """What came out; every ratio is TRL's over ours, of steps their median."""
    ratios, mean = {}, {}
    for name in ("seconds", "cpu_seconds", "tokens"):
        ratios[name] = [getattr(step["trl"], name) / getattr(step["ours"], name) for step in steps]
        mean[name] = {engine: statistics.mean(getattr(step[engine], name) for step in steps) for engine in ENGINES}
    ratio, predicted = statistics.median(ratios["seconds"]), statistics.median(ratios["tokens"])
    return {
        "rows_per_second": {engine: size / seconds for engine, seconds in mean["seconds"].items()},
        "ratio": ratio,
        "ratio_span": [min(ratios["seconds"]), max(ratios["seconds"])],
        "cpu_seconds": mean["cpu_seconds"],
        "cpu_ratio": statistics.median(ratios["cpu_seconds"]),
        "tokens": mean["tokens"],
        "predicted_ratio": predicted,
        "share_reached": ratio / predicted,
        "memory_mib": {part: {engine: used[engine][part] for engine in ENGINES} for part in used["ours"]},
        "memory_ratio": {part: used["trl"][part] / used["ours"][part] for part in used["ours"]},
        "loss_difference": max(abs(step["trl"].loss - step["ours"].loss) for step in steps),
    }


def table(found: dict[str, Any], unit: str) -> str:
    """The results as Markdown."""
    (least, most), used, less = found["ratio_span"], found["memory_mib"], found["memory_ratio"]
    lines = ["| | TRL | alignctl | ratio, median (least to most) |", "|---|---|---|---|"]
    for what, values, form, ratio, more in (
        (f"{unit} a second", found["rows_per_second"], ".2f", found["ratio"], f" ({least:.2f} to {most:.2f})"),
        ("CPU seconds a step", found["cpu_seconds"], ".2f", found["cpu_ratio"], ""),
        ("tokens computed a step", found["tokens"], ",.0f", found["predicted_ratio"], ""),
        ("peak memory, MiB", used["peak"], ",.0f", less["peak"], ""),
        ("of it above the loaded model", used["above_model"], ",.0f", less["above_model"], ""),
    ):
        lines.append(f"| {what} | {values['trl']:{form}} | {values['ours']:{form}} | {ratio:.2f}{more} |")
    lines.append(f"| speed ratio reached of what the tokens predict | | | {found['share_reached']:.0%} |")
    return "\n".join([*lines, f"| largest difference in loss | | | {found['loss_difference']:.1e} |"])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=list(fit.BUILD), default="dpo")
    add("--batch-size", type=int, default=4, help="rows or pairs")
    add("--steps", type=int, default=10, help="steps that count; one more warms up")
    add("--model", help="a folder, or what `model.name_or_path` takes; default: SmolLM2-135M-Instruct")
    add("--data", type=Path, help="rows in any form that alignctl reads; default: the demo's")
    add("--answer", action="store_true", help="sft on --data with pairs: train on the chosen answers")
    add("--max-length", type=int, default=512)
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    add("--json", type=Path, help="write everything here too")
    add("--small", action="store_true", help="3 steps of 2 rows: about a minute on a CPU")
    add("--only", choices=ENGINES, help="only the memory of one of the two, for --json")
    args = parser.parse_args()
    return argparse.Namespace(**vars(args) | ({"batch_size": 2, "steps": 3} if args.small else {}))


def main() -> None:
    args = parsed()
    where = pick(args.device)
    recipe = recipe_of(args, where)
    with tempfile.TemporaryDirectory() as scratch:
        # The memory first: a process inherits the peak of the one that starts it.
        used = {} if args.only else {engine: memory_apart(engine, scratch) for engine in ENGINES}
        given = load(recipe, where, args.steps, scratch)
        if args.only:
            args.json.write_text(json.dumps(memory(args.only, recipe, *given)), encoding="utf-8")
            return
        steps = alternate(recipe, *given)
    found = facts(where) | results(steps, used, args.batch_size)
    found |= {"settings": recipe.model_dump(), "steps": [{k: asdict(v) for k, v in step.items()} for step in steps]}
    print(heading(found))
    print(table(found, "rows" if args.method == "sft" else "pairs"))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
