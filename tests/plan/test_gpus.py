"""GPUs: amounts of memory, what nvidia-smi says, and the table."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from alignctl.errors import RecipeError
from alignctl.plan import gpus
from alignctl.plan.gpus import GIB, Here


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24", 24 * GIB), (" 8 gb ", 8 * GIB), ("8192MiB", 8 * GIB), ("1.5g", GIB * 3 // 2)],
)
def test_amounts(text: str, size: int) -> None:
    assert gpus.amount(text) == size


@pytest.mark.parametrize("text", ["", "banana", "-4GiB", "0", "24 TiB", "nan", "1e3", "99999999999999"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--gpu-memory: .* is no amount of memory — write it as 24GiB"):
        gpus.amount(text)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let nvidia-smi say something."""

    def answer(text: str) -> None:
        monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=text))

    return answer


def test_the_gpu_that_is_here(says: Callable[[str], None]) -> None:
    says("NVIDIA GeForce RTX 4090, 24564\nNVIDIA A100-SXM4-80GB, 81920\n")
    here = gpus.found()
    assert here == Here("NVIDIA GeForce RTX 4090", 24564 * 2**20)
    assert here is not None and here.known is not None and here.known.name == "RTX 4090"
    assert gpus.like(here) == [here.known]


@pytest.mark.parametrize("text", ["", "no devices were found", "NVIDIA GB10, [N/A]"])
def test_no_gpu_is_here(says: Callable[[str], None], text: str) -> None:
    says(text)
    assert gpus.found() is None


def test_no_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpus.found() is None


def test_names_do_not_mix() -> None:
    assert Here("NVIDIA H100 PCIe", 1).known is next(gpu for gpu in gpus.GPUS if gpu.name == "H100 PCIe")
    assert Here("NVIDIA H100 80GB HBM3", 1).known is next(gpu for gpu in gpus.GPUS if gpu.name == "H100")
    assert Here("NVIDIA A100-SXM4-80GB", 1).known is next(gpu for gpu in gpus.GPUS if gpu.name == "A100")
    assert Here("Radeon", 1).known is None


def test_gpus_of_an_amount() -> None:
    assert {gpu.memory for gpu in gpus.like(Here("", 10 * GIB))} == {16}
    assert {gpu.name for gpu in gpus.like(Here("", 80 * GIB))} == {"A100", "H100 PCIe", "H100"}
    assert gpus.like(Here("", 999 * GIB)) == [] and len(gpus.like(None)) == 4


def test_every_rate_has_a_source_and_a_year() -> None:
    assert all(gpu.rate > 0 and gpu.source[-4:].isdigit() for gpu in gpus.GPUS)
