"""What a recipe asks of memory: how weights are stored and trained, in which numbers, with which optimizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignctl.plan.shape import Linear, Shape
from alignctl.recipe.schema import Recipe

Trains = Literal["adapter on 4 bits", "adapter", "all"]
Reference = Literal["none", "adapter off", "second adapter", "second model"]
_RANK = 16


@dataclass(frozen=True)
class Setup:
    """How a run holds and trains its weights; sizes are bytes of one number.

    Attributes:
        trains: an adapter, on 4-bit or on plain weights, or all weights.
        compute: of autocast's format, in which matrix products run; 4 means that there is no autocast.
        double: the scales of 4-bit weights are quantised too.
        rank: of the adapters; 0 without.
        targets: the linear layers of a block that have one.
        checkpointing: activations are recomputed block by block.
        accumulates: several passes make one update, so gradients outlive a pass.
        packed: nothing is padded and what a pair shares stands once.
    """

    trains: Trains
    compute: int
    double: bool
    rank: int
    dora: bool
    targets: tuple[Linear, ...]
    optimizer: str
    checkpointing: bool
    accumulates: bool
    reference: Reference
    packed: bool
    cuda: bool

    @property
    def autocast(self) -> bool:
        return self.compute == 2

    @property
    def adapts(self) -> bool:
        return self.trains != "all"

    @property
    def stored(self) -> int:
        """Of a frozen weight that is not in 4 bits, or of one that is trained."""
        return self.compute if self.adapts else 4


def of(
    recipe: Recipe, shape: Shape, *, cuda: bool = True, dtype: str | None = None, packed: bool | None = None
) -> Setup:
    """The setup of `recipe` on a GPU that computes in bfloat16, or on what else is said."""
    named = dtype or recipe.model.dtype
    wanted = recipe.training.gradient_checkpointing
    rank, targets, dora = _adapter(recipe, shape) if recipe.trains_adapter else (0, (), False)
    return Setup(
        trains="all" if not recipe.trains_adapter else "adapter on 4 bits" if recipe.quantization else "adapter",
        compute=4 if named == "float32" else 2,
        double=recipe.quantization is not None and recipe.quantization.bnb_4bit_use_double_quant,
        rank=rank,
        dora=dora,
        targets=targets,
        optimizer=recipe.training.optim if cuda or not _needs_cuda(recipe.training.optim) else "adamw_torch",
        checkpointing=cuda if wanted == "auto" else wanted,
        accumulates=recipe.training.gradient_accumulation_steps > 1,
        reference=_reference(recipe),
        packed=recipe.training.packed is not False and shape.known if packed is None else packed,
        cuda=cuda,
    )


def _needs_cuda(optimizer: str) -> bool:
    return any(part in optimizer for part in ("8bit", "paged", "bnb", "4bit"))


def _reference(recipe: Recipe) -> Reference:
    if recipe.dpo is None:
        return "none"
    if not recipe.trains_adapter:
        return "second model"
    return "adapter off" if recipe.model.adapter is None else "second adapter"


def _adapter(recipe: Recipe, shape: Shape) -> tuple[int, tuple[Linear, ...], bool]:
    """Rank, adapted layers and whether it is DoRA: of the adapter that training goes on from, or of the recipe's."""
    config = _saved(recipe)
    if config is not None:
        named, rank, dora = config.get("target_modules"), int(config.get("r", _RANK)), bool(config.get("use_dora"))
    elif recipe.lora is not None:
        named, rank, dora = recipe.lora.target_modules, recipe.lora.r, recipe.lora.use_dora
    else:
        named, rank, dora = "all-linear", _RANK, False
    linears = shape.linears()
    chosen = linears if isinstance(named, str) else [each for each in linears if each.name in (named or ())]
    return rank, tuple(chosen), dora


def _saved(recipe: Recipe) -> dict[str, Any] | None:
    """adapter_config.json of `model.adapter`; None where there is none yet."""
    given = Path(recipe.model.adapter).expanduser() if recipe.model.adapter else None
    for folder in (given / "model", given) if given else ():
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return config if isinstance(config, dict) else None
    return None


def notes(recipe: Recipe, shape: Shape) -> list[str]:
    """What had to be assumed."""
    out = []
    if not shape.known:
        out.append(f"{shape.model_type} is not an architecture that is known here: planned as a llama of these sizes")
    if shape.experts:
        out.append("experts are no linear layers: they stay in 16 bits, and their activations are roughly planned")
    if recipe.model.adapter is not None and recipe.lora is None and _saved(recipe) is None:
        out.append(f"{recipe.model.adapter} is not there yet: planned as an adapter of r {_RANK} on every linear layer")
    return out
