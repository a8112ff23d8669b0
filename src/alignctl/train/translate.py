"""Errors of the libraries that a user can mend, in our words. They are translated here and nowhere else."""

from __future__ import annotations

import contextlib
import errno
import pickle
from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from jinja2 import TemplateError
from safetensors import SafetensorError

from alignctl.errors import AlignctlError, MachineError, Problem, RecipeError
from alignctl.plan import report
from alignctl.rundir import RunDir
from alignctl.train import machine
from alignctl.train.machine import out_of_memory


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What transformers, PEFT and TRL refuse to build is a mistake in the recipe, and their words say which."""
    try:
        yield
    except pickle.UnpicklingError as error:
        what = "a pickle file of weights holds more than weights, and is not loaded"
        raise RecipeError(Problem("model.use_safetensors", what, "take .safetensors weights")) from error
    except (ValueError, OSError) as error:
        what = " ".join(str(error).split())
        if "file named model.safetensors" in what:
            what = "there are no .safetensors weights, and a pickle file can run code when it is loaded"
            way_out = "take a revision that has them, or model.use_safetensors=false, if you trust them"
            raise RecipeError(Problem("model.name_or_path", what, way_out)) from error
        if "contains custom code" in what or "references custom code" in what:
            what = "it is made of Python code that would run on this machine"
            way_out = "model.trust_remote_code=true, if you have read it and trust it"
            raise RecipeError(Problem("model.name_or_path", what, way_out)) from error
        if isinstance(error, OSError) and (error.errno is not None or "huggingface.co" in what):
            raise
        raise RecipeError(Problem("model", what, "change the recipe accordingly")) from error


@contextlib.contextmanager
def translated(run: RunDir | None = None) -> Iterator[None]:
    """Turn foreign errors that a user can mend into ours; the rest is a bug and stays what it is."""
    try:
        yield
    except TemplateError as error:
        what = f"cannot render a row: {error}"
        raise RecipeError(Problem("model.chat_template", what, "mend the template")) from error
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise _no_model(error) from error
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        if said := out_of_memory(error):
            raise MachineError(_out_of_memory(run, said)) from error
        if _disk_full(error):
            raise MachineError(_full(run)) from error
        if "huggingface.co" in str(error) or "is not a local folder" in str(error):
            raise _no_model(error) from error
        raise


def _out_of_memory(run: RunDir | None, why: str) -> Problem:
    memory = {} if run is None else run.record.get("memory") or {}
    beside, way_out = report.shortage(memory, machine.detect().peak_memory_gib())
    return Problem("memory", f"{beside}: {why}", way_out)


def _full(run: RunDir | None) -> Problem:
    if run is None:
        return Problem("disk", "is full", "free space, then run again")
    last = run.checkpoints()
    kept = f"the last whole checkpoint is {last[-1].name}" if last else "no checkpoint had been written"
    how = "--resume" if last else "--overwrite"
    return Problem(str(run.path), f"the disk is full; {kept}", f"free space, then run again with {how}")


def _no_model(error: Exception) -> AlignctlError:
    return MachineError(
        Problem(
            "model.name_or_path",
            f"the hub has no such model, or cannot be reached ({type(error).__name__})",
            "check the name and the network, log in for a gated model, or give a local folder; "
            "--smoke needs no network",
        )
    )


_FULL = ("No space left", "File too large", "Disk quota", "PytorchStreamWriter failed", "inline_container")


def _disk_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    said = str(error)
    return any(sign in said for sign in _FULL)
