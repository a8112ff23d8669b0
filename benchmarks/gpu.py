"""Phi-2 and Mistral-7B in 4 bits on a GPU: speed and peak memory of TRL's own trainer and of alignctl's.

The weights are random, so that nothing is downloaded; shapes and dtypes are the models' own. Both trainers get the same
NF4 base with the same float32 adapter, and recompute activations. A row is a random prompt and two random answers: the
longest pair of a batch has the length that is asked for, and the other answers are shorter. The trainers run one after
the other, each over the whole grid; what does not fit is "OOM".

With `--grid` only alignctl's trainers run, over models, methods and with and without recomputed activations, and the
peak of every cell stands beside the planned one. Cells that the JSON file holds are not measured again, so that the
grid can be filled in several calls.

python benchmarks/gpu.py --model phi-2 --method dpo --json phi2-dpo.json
python benchmarks/gpu.py --grid --json grid.json --minutes 9
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pairs
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, PhiConfig, PreTrainedModel, Trainer, set_seed
from transformers import PretrainedConfig as Config

from alignctl.recipe.schema import Recipe
from alignctl.train import machine, standin
from alignctl.train.parts import Parts
from alignctl.train.tokenizer import load_encoder
from alignctl.train.trl_seam import Batch

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 128, "vocab_size": 512}
MODELS: dict[str, tuple[type[Config], dict[str, Any]]] = {
    "phi-2": (
        PhiConfig,
        {
            "hidden_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 10240,
            "vocab_size": 51200,
            "partial_rotary_factor": 0.4,
            "max_position_embeddings": 2048,
        },
    ),
    "mistral-7b": (
        MistralConfig,
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 32000,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
        },
    ),
}
METHODS = ["sft", "dpo", "orpo"]
TIMED = 3


@dataclass(frozen=True)
class RandomParts(Parts):
    """Parts whose base model is made on the spot."""

    make: Callable[[], PreTrainedModel]

    def base(self, recipe: Recipe) -> PreTrainedModel:
        """A new base model, the same each time."""
        set_seed(recipe.training.seed)
        return self.make()


def make_model(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A model of random weights on `device`: in 4 bits, or tiny and in float32."""
    kind, shape = MODELS[args.model]
    config = kind(**(shape | TINY if args.tiny else shape), use_cache=False)
    dtype = torch.float32 if args.tiny else torch.bfloat16
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not args.tiny:
        quantise(model)
    return model


def quantise(model: PreTrainedModel) -> None:
    """Replace every linear layer but the head by a 4-bit one, one after the other, where they are."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                setattr(parent, name, in_4_bits(layer))
    model.is_loaded_in_4bit = True  # what PEFT and TRL look at
    model.requires_grad_(False)


def in_4_bits(layer: nn.Linear) -> Linear4bit:
    """NF4 with double quantisation, as QLoRA has it."""
    device, dtype = layer.weight.device, layer.weight.dtype
    with torch.device("meta"):
        out = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype)
    out.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=out)
    out.bias = layer.bias
    return out.to(device)


def recipe_of(args: argparse.Namespace, folder: Path) -> Recipe:
    """What both trainers are built from; its data are never read."""
    values = {
        "model": {"name_or_path": str(folder), "dtype": "float32" if args.tiny else "bfloat16"},
        "lora": pairs.LORA,
        "data": {"train": [{"path": "none"}], "max_length": 2**15},
        "training": {**pairs.TRAINING, "per_device_train_batch_size": 1, "gradient_checkpointing": True},
        "trl": pairs.PLAIN,
        args.method: {},
    }
    return Recipe.model_validate(values)


def random_rows(count: int, length: int, args: argparse.Namespace) -> list[Batch]:
    """Pairs of at most `length` tokens a side, of which the first has as many."""
    draw = torch.Generator().manual_seed(count * 100_003 + length)
    vocabulary = TINY["vocab_size"] if args.tiny else MODELS[args.model][1]["vocab_size"]
    prompt = int(length * args.prompt_share)
    longest = length - prompt
    shortest = max(1, int(longest * args.shortest))

    def ids(size: int) -> list[int]:
        out: list[int] = torch.randint(vocabulary, (size,), generator=draw).tolist()
        return out

    sizes = torch.randint(shortest, longest + 1, (count, 2), generator=draw).tolist()
    sizes[0][0] = longest
    return [{"prompt_ids": ids(prompt), "chosen_ids": ids(c), "rejected_ids": ids(r)} for c, r in sizes]


def start(engine: str, recipe: Recipe, parts: Parts) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """A trainer that `train()` has set up, and its adapter as it was before."""
    trainer = pairs.build(engine, recipe, parts)
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    adapter = {name: p.detach().to("cpu", copy=True) for name, p in trained}
    trainer.train()
    return trainer, adapter


def cell(trainer: Trainer, adapter: dict[str, torch.Tensor], rows: list[Batch]) -> dict[str, Any]:
    """Speed and memory of updates on `rows`, from the same adapter in every cell; `OOM` where they do not fit."""
    fresh(trainer, adapter)
    on_gpu = trainer.args.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    try:
        steps = [pairs.update(trainer, rows) for _ in range(1 + TIMED)]
    except torch.OutOfMemoryError:
        steps = []
    if not steps:
        return {"result": "OOM"}
    seconds = statistics.median(step.seconds for step in steps[1:])
    peak = {
        "before": held,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }
    return {
        "result": "ok",
        "pairs_per_second": len(rows) / seconds,
        "peak_mib": {name: value / pairs.MIB for name, value in peak.items()} if on_gpu else None,
        "tokens": steps[0].tokens,
        "losses": [step.loss for step in steps],
        "steps": [asdict(step) for step in steps],
    }


def fresh(trainer: Trainer, adapter: dict[str, torch.Tensor]) -> None:
    """The adapter as it was, an optimizer that has seen nothing, and no memory held from before."""
    trainer.model.zero_grad()
    trainer.optimizer.optimizer.state.clear()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(adapter[name])
    gc.collect()
    torch.cuda.empty_cache()


def compared(at: dict[str, Any]) -> dict[str, float]:
    """What the two trainers' figures say of each other, once both ran; ratios are in our favour above 1."""
    trl, ours = at["trl"], at.get("ours")
    if ours is None or "OOM" in (trl["result"], ours["result"]):
        return {}
    out: dict[str, float] = {
        "ratio": ours["pairs_per_second"] / trl["pairs_per_second"],
        "predicted_ratio": trl["tokens"] / ours["tokens"],
        "loss_difference": max(abs(a - b) for a, b in zip(trl["losses"], ours["losses"], strict=True)),
    }
    if trl["peak_mib"]:
        out["memory_ratio"] = trl["peak_mib"]["allocated"] / ours["peak_mib"]["allocated"]
    return out


def table(cells: list[dict[str, Any]]) -> str:
    """The grid as Markdown."""
    columns = ["batch", "length", "pairs/s, TRL", "alignctl", "ratio", "tokens predict"]
    columns += ["peak GiB (reserved), TRL", "alignctl", "ratio", "loss differs by"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for at in cells:
        both = [at[engine] for engine in pairs.ENGINES]
        words = [str(at["batch"]), str(at["length"]), *map(speed, both)]
        words += [words_of(at, "ratio", ".2f"), words_of(at, "predicted_ratio", ".2f"), *map(peak, both)]
        words += [words_of(at, "memory_ratio", ".2f"), words_of(at, "loss_difference", ".1e")]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def words_of(at: dict[str, Any], name: str, form: str) -> str:
    """A number of a cell, or nothing where it has none."""
    return f"{at[name]:{form}}" if name in at else ""


def speed(found: dict[str, Any]) -> str:
    """Pairs a second, in words."""
    return f"{found['pairs_per_second']:.2f}" if found["result"] == "ok" else found["result"]


def peak(found: dict[str, Any]) -> str:
    """Peak memory, in words."""
    if not found.get("peak_mib"):
        return ""
    allocated, reserved = (found["peak_mib"][name] / 1024 for name in ("allocated", "reserved"))
    return f"{allocated:.1f} ({reserved:.1f})"


def parsed() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), help="default: phi-2; with --grid all")
    parser.add_argument("--method", choices=["sft", "dpo", "orpo"], help="default: dpo; with --grid all")
    parser.add_argument("--batch", type=numbers, default=[1, 2, 4, 8], help="pairs in a batch, e.g. 1,2,4,8")
    parser.add_argument("--length", type=numbers, default=[512, 1024, 2048], help="tokens of prompt and answer")
    parser.add_argument("--prompt-share", type=float, default=0.5, help="of the length is the prompt")
    parser.add_argument("--shortest", type=float, default=0.25, help="answer, as a share of the longest")
    parser.add_argument("--json", type=Path, help="written after every cell")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64 in float32, also on a CPU")
    parser.add_argument("--grid", action="store_true", help="plan and measured peak of every cell, ours alone")
    parser.add_argument("--recompute", choices=["on", "off"], help="with --grid: only with, or only without")
    parser.add_argument("--minutes", type=float, default=600.0, help="with --grid: start no cell after so many")
    args = parser.parse_args()
    if not args.grid and (args.method == "sft" or args.recompute):
        parser.error("--method sft and --recompute go with --grid")
    args.models, args.methods = [args.model] if args.model else list(MODELS), [args.method] if args.method else METHODS
    args.checkpointing = [args.recompute == "on"] if args.recompute else [True, False]
    args.model, args.method = args.models[0], args.method or "dpo"
    return args


def measure(args: argparse.Namespace, where: machine.Machine, scratch: Path, found: dict[str, Any]) -> None:
    """Fill every cell of `found` by TRL's trainer, then by ours; written down after each."""
    standin.stand_in(recipe_of(args, Path(args.model)), scratch)  # for its tokenizer, whose end and padding are used
    recipe = recipe_of(args, scratch / "model")
    first = Dataset.from_list(random_rows(1, 16, args))
    given = (where, where.precision(recipe.model.dtype), load_encoder(recipe), first, None, scratch)
    for engine in pairs.ENGINES:
        trainer, adapter = start(engine, recipe, RandomParts(*given, lambda: make_model(args, where.device)))
        for at in found["cells"]:
            at[engine] = cell(trainer, adapter, random_rows(at["batch"], at["length"], args))
            at |= compared(at)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
        del trainer, adapter
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    args = parsed()
    if args.grid:
        import grid

        grid.run(args)
        return
    where = pairs.pick(None if args.tiny else "cuda")
    cells = [{"batch": batch, "length": length} for length in args.length for batch in args.batch]
    found = pairs.facts(where) | {"settings": vars(args) | {"json": str(args.json)}, "cells": cells}
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, where, Path(scratch), found)
    print(pairs.heading(found))
    print(table(found["cells"]))


if __name__ == "__main__":
    main()
