"""The grid of `gpu.py --grid`: planned and measured peak memory of alignctl's trainers, cell by cell."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu
import pairs
import torch
from datasets import Dataset

from alignctl.plan import data, estimate, shape
from alignctl.plan.estimate import Plan, Target
from alignctl.plan.fixes import changed_by
from alignctl.plan.memory import GIB
from alignctl.recipe.schema import Recipe
from alignctl.train import machine, standin
from alignctl.train.tokenizer import load_encoder
from alignctl.train.trl_seam import Batch

Cell = dict[str, Any]


def run(args: argparse.Namespace) -> None:
    """Measure every cell that `args.json` does not hold yet, written down after each; print the table of all."""
    where = pairs.pick(None if args.tiny else "cuda")
    found = _read(args.json) | pairs.facts(where)
    cells: list[Cell] = found.setdefault("cells", [])
    end = time.monotonic() + 60 * args.minutes
    left = 0
    for model, method, checkpointing in itertools.product(args.models, args.methods, args.checkpointing):
        given = argparse.Namespace(**vars(args) | {"model": model, "method": method})
        wanted = [
            {"model": model, "method": method, "checkpointing": checkpointing, "length": length, "batch": batch}
            for length, batch in itertools.product(args.length, args.batch)
        ]
        missing = [at for at in wanted if not any(at.items() <= cell.items() for cell in cells)]
        for cell in _cells(given, where, list(missing), end) if missing and time.monotonic() < end else ():
            cells.append(cell)
            missing.pop(0)
            _write(args.json, found)
        left += len(missing)
    print(pairs.heading(found))
    print(table(cells))
    if left:
        print(f"\nout of time with {left} cells left: the same command goes on with them")


def _cells(args: argparse.Namespace, where: machine.Machine, wanted: list[Cell], end: float) -> Iterator[Cell]:
    """The cells of one trainer, which is built once."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        standin.stand_in(gpu.recipe_of(args, Path(args.model)), folder)  # for its tokenizer
        recipe = gpu.recipe_of(args, folder / "model")
        recipe = changed_by(recipe, {"training.gradient_checkpointing": wanted[0]["checkpointing"]})
        first = Dataset.from_list(rows_of(1, 16, args))
        given = (where, where.precision(recipe.model.dtype), load_encoder(recipe), first, None, folder)
        trainer, adapter = gpu.start(
            "ours", recipe, gpu.RandomParts(*given, lambda: gpu.make_model(args, where.device))
        )
        for at in wanted:
            if time.monotonic() > end:
                break
            rows = rows_of(at["batch"], at["length"], args)
            plan = planned(recipe, trainer.model.config.to_dict(), rows, args)
            yield at | compared(plan, gpu.cell(trainer, adapter, rows))
        del trainer, adapter
    gc.collect()
    torch.cuda.empty_cache()


def rows_of(count: int, length: int, args: argparse.Namespace) -> list[Batch]:
    """Random pairs; for SFT their chosen rows, with the loss on the answer."""
    found = gpu.random_rows(count, length, args)
    if args.method != "sft":
        return found
    return [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
        }
        for row in found
    ]


def planned(recipe: Recipe, config: dict[str, Any], rows: list[Batch], args: argparse.Namespace) -> Plan:
    """The plan of a pass over `rows`."""
    changes: dict[str, Any] = {"training.per_device_train_batch_size": len(rows)}
    recipe = changed_by(recipe, changes | ({} if args.tiny else {"quantization": {"load_in_4bit": True}}))
    sides = ("input_ids",) if args.method == "sft" else ("prompt_ids", "chosen_ids", "rejected_ids")
    lengths = [tuple(len(row[name]) for name in sides) for row in rows]
    found = tuple(data.Row(0, *each) if len(each) == 1 else data.Row(*each) for each in lengths)
    return estimate.of(
        recipe, shape.of(config), data.Lengths(found, found[0], None, "the rows"), Target(cuda=not args.tiny)
    )


def compared(plan: Plan, cell: Cell) -> Cell:
    """Plan and measurement of a cell, and their ratio."""
    out: Cell = {
        "result": cell["result"],
        "planned_gib": plan.memory.allocated / GIB,
        "needed_gib": plan.memory.needed / GIB,
        "phase": plan.memory.phase,
        "lines": [vars(line) for line in plan.memory.lines],
        "tokens": [plan.batch.tokens, cell.get("tokens")],
        "pairs_per_second": cell.get("pairs_per_second"),
    }
    peak = cell.get("peak_mib")
    if peak:
        out |= {"measured_gib": peak["allocated"] / 1024, "reserved_gib": peak["reserved"] / 1024}
        out["ratio"] = out["planned_gib"] / out["measured_gib"]
    return out


def table(cells: list[Cell]) -> str:
    """The grid as Markdown, and how far plan and measurement are apart at most."""
    columns = ["model", "method", "recomputed", "length", "batch", "planned GiB", "measured", "reserved", "ratio"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for at in cells:
        measured = [
            f"{at[name]:.2f}" if name in at else _word(at) for name in ("measured_gib", "reserved_gib", "ratio")
        ]
        where = [at["model"], at["method"], "yes" if at["checkpointing"] else "no", str(at["length"]), str(at["batch"])]
        lines.append(f"| {' | '.join([*where, format(at['planned_gib'], '.2f'), *measured])} |")
    ratios = [at["ratio"] for at in cells if "ratio" in at]
    if ratios:
        lines.append(f"\n{len(ratios)} cells measured, ratios from {min(ratios):.2f} to {max(ratios):.2f}")
    return "\n".join(lines)


def _word(at: Cell) -> str:
    return "out of memory" if at["result"] == "OOM" else "no GPU"


def _read(file: Path | None) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file is not None and file.is_file() else {}


def _write(file: Path | None, found: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
