"""The model that a run saved, and the one that its training started from."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.recipe.load import load
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir
from alignctl.train import machine, packing, trl_seam
from alignctl.train import model as models
from alignctl.train.machine import Machine
from alignctl.train.tokenizer import saved_encoder
from alignctl.train.tokens import Encoder

# The name of the adapter that training went on from, beside the trained one, which PEFT calls `default`.
START = "start"


@dataclass(frozen=True)
class Trained:
    """A run that saved a model. Nothing is loaded before it is asked for."""

    run: RunDir
    recipe: Recipe
    machine: Machine

    @property
    def model_folder(self) -> Path:
        return self.run / "model"

    @cached_property
    def encoder(self) -> Encoder:
        """The saved tokenizer with the template that was trained with."""
        return saved_encoder(self.model_folder, trusted=self.recipe.model.trust_remote_code)

    @property
    def precision(self) -> torch.dtype:
        return self.machine.precision(self.recipe.model.dtype)

    @property
    def start_name(self) -> str:
        """What training started from, in a word: a parent run or adapter, or the base."""
        return self.recipe.model.adapter or self.recipe.model.name_or_path

    def load(self, *, start: bool = True) -> Models:
        """The trained model and the one that training started from.

        Where all weights were trained these are two, and without `start` the first is loaded alone.

        Raises:
            MachineError: the base is not there any more, or is another one than in training.
        """
        if not self.recipe.trains_adapter:
            other = self._ready(_base(self)) if start else None
            return Models(self._ready(self.whole()), other)
        base = _base(self)
        parent = models.adapter_folder(self.recipe)
        tuned = PeftModel.from_pretrained(base, self.model_folder)
        if parent is not None:
            tuned.load_adapter(parent, adapter_name=START)
        return Models(self._ready(tuned))

    def whole(self) -> PreTrainedModel:
        """The saved weights of a run that trained all of them."""
        changes = {"name_or_path": str(self.model_folder), "revision": None}
        trained = self.recipe.model_copy(update={"model": self.recipe.model.model_copy(update=changes)})
        return models.load_base(trained, self.precision, self.machine)

    def _ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model` as it is scored and asked: packed where it was tested, with the compact head and every stop token."""
        models.align_generation(model, self.encoder)
        trl_seam.install_head(model)
        if self.recipe.training.packed is not False and not packing.why_not(model):
            packing.install(model)
        model.requires_grad_(False)
        return model.eval()


@dataclass
class Models:
    """The trained model, and the one that training started from: the same with other adapters, or a second one."""

    tuned: PreTrainedModel
    other: PreTrainedModel | None = None

    def drop(self) -> None:
        """Give the memory back: none of the models can be used any more."""
        del self.tuned
        self.other = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def start(self) -> Iterator[PreTrainedModel]:
        """Inside, what training started from."""
        if self.other is not None:
            yield self.other
        elif START in self.tuned.peft_config:
            self.tuned.set_adapter(START, inference_mode=True)
            try:
                yield self.tuned
            finally:
                self.tuned.set_adapter("default", inference_mode=True)
        else:
            with self.base():
                yield self.tuned

    @contextlib.contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """Inside, the base without any adapter."""
        if self.other is not None:
            yield self.other
            return
        with self.tuned.disable_adapter():
            yield self.tuned


def opened(folder: Path) -> Trained:
    """The run in `folder`.

    Raises:
        RecipeError: it is no run, has saved no model, or was a smoke run, whose base is gone.
    """
    run = RunDir(folder)
    if not run.record:
        raise RecipeError(Problem(str(folder), "is no run", "give the folder that --output named"))
    if not (run / "model").is_dir():
        raise RecipeError(Problem(str(folder), f"has saved no model (status: {run.status})", "train it to its end"))
    recipe = load(run / "recipe.yaml").recipe
    if Path(recipe.model.name_or_path).absolute().is_relative_to((run / "stand-in").absolute()):
        way_out = "train the recipe without --smoke"
        raise RecipeError(Problem(str(folder), "was a smoke run, whose stand-in model is gone", way_out))
    return Trained(run, recipe, machine.detect())


def _base(trained: Trained) -> PreTrainedModel:
    """The base, which must be the one that the run was trained on.

    Raises:
        MachineError: it has other weights now.
    """
    base = models.load_base(trained.recipe, trained.precision, trained.machine)
    expected = trained.run.record.get("model", {}).get("base_fingerprint")
    if expected is not None and trained.machine.kind == trained.run.record["machine"]["device"]:
        found = models.base_fingerprint(base)
        if found != expected:
            what = "has other weights than it had in training"
            raise MachineError(Problem(trained.recipe.model.name_or_path, what, "put the old ones back"))
    return base
