"""GPUs: their memory, how fast they multiply matrices, and which one is here."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from alignctl.errors import Problem, RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU on paper.

    Attributes:
        memory: GiB, as sold.
        rate: 10^12 operations a second in bfloat16, dense, summed up in float32.
        source: where the rate is from, with its year.
        efficiency: the share of the rate that training reached here; None where nobody measured it yet.
    """

    name: str
    memory: int
    rate: float
    source: str
    efficiency: float | None = None


# What a share of the rate is taken to be reached where none was measured.
ASSUMED = 0.3
GPUS = (
    Gpu("RTX 4080", 16, 97.5, "NVIDIA Ada GPU architecture whitepaper, 2022"),
    Gpu("RTX 3090", 24, 71.0, "NVIDIA GA102 GPU architecture whitepaper, 2020"),
    Gpu("RTX 4090", 24, 165.2, "NVIDIA Ada GPU architecture whitepaper, 2022"),
    Gpu("L4", 24, 121.0, "NVIDIA L4 product page, half of the rate with sparsity, 2023"),
    Gpu("A10", 24, 125.0, "NVIDIA A10 data sheet, 2021"),
    Gpu("L40S", 48, 362.0, "NVIDIA L40S data sheet, 2023"),
    Gpu("A100", 80, 312.0, "NVIDIA A100 data sheet, 2020"),
    Gpu("H100 PCIe", 80, 756.0, "NVIDIA H100 data sheet, half of the rate with sparsity, 2023"),
    Gpu("H100", 80, 989.0, "NVIDIA H100 data sheet, half of the rate with sparsity, 2023"),
    Gpu("H200", 141, 989.0, "NVIDIA H200 data sheet, half of the rate with sparsity, 2024"),
)


@dataclass(frozen=True)
class Here:
    """The first GPU of this machine: its name and its memory in bytes."""

    name: str
    memory: int

    @property
    def known(self) -> Gpu | None:
        """It in the table: the longest name that stands in its own."""
        fitting = [gpu for gpu in GPUS if all(word in self.name for word in gpu.name.split())]
        return max(fitting, key=lambda gpu: len(gpu.name), default=None)


def found() -> Here | None:
    """What nvidia-smi says; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        name, _, memory = done.stdout.splitlines()[0].rpartition(",")
        return Here(name.strip(), int(memory) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def like(here: Here | None) -> list[Gpu]:
    """The GPU that is here, those with no less memory than it, or a few where none is."""
    if here is None:
        return [gpu for gpu in GPUS if gpu.name in _FEW]
    if here.known is not None:
        return [here.known]
    enough = [gpu for gpu in GPUS if gpu.memory * GIB >= here.memory]
    return [gpu for gpu in enough if gpu.memory == enough[0].memory]


_FEW = ("RTX 4080", "RTX 4090", "A100", "H100")
_AMOUNT = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>GiB|GB|G|MiB|MB)?", re.IGNORECASE)
_UNITS = {"gib": GIB, "g": GIB, "": GIB, "gb": GIB, "mib": 2**20, "mb": 2**20}


def amount(text: str) -> int:
    """Bytes of `24GiB`, `24` or `8192MiB`. GPUs are sold with GB and have GiB, so GB is read as GiB.

    Raises:
        RecipeError: it is no amount of memory.
    """
    read = _AMOUNT.fullmatch(text.strip())
    size = float(read["number"]) * _UNITS[(read["unit"] or "").lower()] if read else 0
    if not 0 < size < 2**50:
        raise RecipeError(Problem("--gpu-memory", f"{text!r} is no amount of memory", "write it as 24GiB"))
    return round(size)
