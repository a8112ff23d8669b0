"""The weights of a model on disk: read one by one, changed, and written in files of bounded size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from alignctl import rundir
from alignctl.errors import Problem, RecipeError

SIZE = "2GB"


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors files: where each weight is, and its shape and dtype as a tensor without values."""

    files: dict[str, Path]
    shapes: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        """The weight `name`."""
        with safe_open(self.files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def find(self, name: str, prefix: str) -> str | None:
        """The weight that a model calls `name`; a checkpoint may have its `prefix` more, or less."""
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((each for each in candidates if each in self.files), None)

    def plan(self, dtype: torch.dtype, size: int | str) -> StateDictSplit:
        """Which weights go into which file when they are kept in `dtype` and no file is larger than `size`."""
        shapes = {name: _cast(shape, dtype) for name, shape in self.shapes.items()}
        return split_torch_state_dict_into_shards(shapes, max_shard_size=size)

    def bytes(self, dtype: torch.dtype) -> int:
        """How large the weights are in `dtype`."""
        return sum(_cast(shape, dtype).nbytes for shape in self.shapes.values())


def opened(path: str, revision: str | None) -> Checkpoint:
    """The safetensors files of the model `path`, a folder or a name on the hub.

    Raises:
        RecipeError: it has none.
    """
    files, shapes = {}, {}
    for file in _files(path, revision):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                files[name], shapes[name] = file, _shape(opened.get_slice(name))
    return Checkpoint(files, shapes)


def _files(path: str, revision: str | None) -> list[Path]:
    whole = _cached(path, SAFE_WEIGHTS_NAME, revision)
    if whole is not None:
        return [Path(whole)]
    index = _cached(path, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        what = "has no .safetensors weights, and pickle files are not merged"
        raise RecipeError(Problem(path, what, "load it, save it with save_pretrained, and train on that"))
    found, _ = get_checkpoint_shard_files(path, index, revision=revision)
    return [Path(file) for file in found]


def _cached(path: str, name: str, revision: str | None) -> str | None:
    try:
        found: str | None = cached_file(path, name, revision=revision)
    except OSError:  # it has no such file
        return None
    return found


def _shape(part: object) -> Tensor:
    """What `safe_open` knows of a weight before it is read: here its first row is, for the dtype."""
    shape = part.get_shape()  # type: ignore[attr-defined]
    dtype = part[:1].dtype if shape else part[...].dtype  # type: ignore[index]
    return torch.empty(shape, dtype=dtype, device="meta")


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def write(
    source: Checkpoint, folder: Path, dtype: torch.dtype, change: Callable[[str, Tensor], Tensor], size: int | str
) -> None:
    """Write every weight of `source`, as `change` makes it, to `folder` in `dtype`; in memory is one file at a time."""
    plan = source.plan(dtype, size)
    for file, names in plan.filename_to_tensors.items():
        part = {name: _cast(change(name, source.read(name)), dtype).contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        del part
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        rundir.write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
