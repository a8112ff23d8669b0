"""Errors of the libraries in our words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignctl.errors import MachineError
from alignctl.rundir import RunDir
from alignctl.train import fit

CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"


@pytest.mark.parametrize(
    ("foreign", "said"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file"),
            "the disk is full",
        ),
        (
            RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {CPU}"),
            rf"memory: peak .* GiB: {CPU[21:]} — in order of",
        ),
        (
            RuntimeError("unable to mmap 8192 bytes: Cannot allocate memory (12)"),
            "memory: peak .* GiB: unable to mmap 8192 bytes",
        ),
        (RuntimeError("CUDA error: out of memory\nmore"), "memory: peak .* GiB: CUDA error: out of memory — "),
        (OSError(12, "Cannot allocate memory"), r"memory: peak .* GiB: \[Errno 12\] Cannot allocate memory"),
        (MemoryError(), "memory: peak .* GiB: the machine has no more — "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "CUDA out of memory"),
        (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), "cannot be reached"),
    ],
)
def test_foreign_errors_become_ours(tmp_path: Path, foreign: Exception, said: str) -> None:
    with pytest.raises(MachineError, match=said), fit.translated(RunDir(tmp_path)):
        raise foreign


def test_memory_that_torch_does_not_get() -> None:
    with pytest.raises(MachineError, match="you tried to allocate 4000000000000000 bytes"), fit.translated():
        torch.empty(10**15)


def test_a_bug_stays_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), fit.translated(RunDir(tmp_path)):
        raise RuntimeError("boom")
