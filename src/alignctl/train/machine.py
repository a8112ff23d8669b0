"""The device that a run uses, and the number formats that it computes in."""

from __future__ import annotations

import errno
import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignctl.errors import MachineError, Problem
from alignctl.plan.report import shortage

GIB = 2**30
NEARLY_ALL = 0.8
# How libraries say that memory ran out, where they have no error of its own for it.
_NO_MEMORY = ("DefaultCPUAllocator: ", "Cannot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """A device: `kind` is `cuda` or `cpu`; `bf16` says whether it computes in bfloat16."""

    kind: str
    name: str
    bf16: bool

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device("cpu")

    def precision(self, dtype: str) -> torch.dtype:
        """The dtype that the recipe's `dtype` means here.

        Raises:
            MachineError: the machine does not compute in it.
        """
        if dtype == "auto":
            return torch.bfloat16 if self.bf16 else torch.float32
        if dtype == "bfloat16" and not self.bf16:
            raise MachineError(
                Problem(
                    "model.dtype",
                    f"{self.name} does not compute in bfloat16",
                    "model.dtype=float16 on an older GPU, float32 on a CPU, or auto",
                )
            )
        if dtype == "float16" and self.kind == "cpu":
            raise MachineError(Problem("model.dtype", "a CPU does not train in float16", "model.dtype=auto"))
        wanted: torch.dtype = getattr(torch, dtype)
        return wanted

    def peak_memory_gib(self) -> float:
        """Peak memory so far in GiB: allocated on a GPU, resident on a CPU."""
        return torch.cuda.max_memory_allocated() / GIB if self.kind == "cuda" else peak_host_gib()


def detect() -> Machine:
    """The first CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine("cuda", torch.cuda.get_device_name(0), bf16)
    bf16 = bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Machine("cpu", f"{platform.machine()} CPU, {torch.get_num_threads()} threads", bf16)


def out_of_memory(error: BaseException) -> str:
    """What `error` says of memory that ran out, of a GPU or of the machine; empty when it is another error."""
    said = (str(error).strip() or "the machine has no more").splitlines()[0].strip()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return said
    found = isinstance(error, RuntimeError) and any(sign in said for sign in _NO_MEMORY)
    return said.rpartition(_NO_MEMORY[0])[2] if found else ""


def peak_host_gib() -> float:
    """Peak resident memory of this process so far in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def host_memory_gib() -> float:
    """Memory that this process may use in GiB: the machine's, or its container's."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    limit = _CGROUP.read_text(encoding="ascii").strip() if _CGROUP.is_file() else "max"
    return whole if limit == "max" else min(whole, int(limit) / GIB)


def killed(last: dict[str, Any] | None, memory: dict[str, Any]) -> str:
    """What is known of a run that was killed, from the last line of its metrics and `memory` of its run.json."""
    if last is None:
        return "note: the run was killed before its first step"
    peak, there = last.get("peak_host_gib", 0.0), host_memory_gib()
    said = f"note: the run was killed after step {last['step']}, at a peak of {peak:.1f} of {there:.1f} GiB of memory"
    if peak <= NEARLY_ALL * there:
        return said
    return f"{said}; a system that runs out of memory does so — {shortage(memory, peak)[1]}"
