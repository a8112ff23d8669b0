"""What this machine has for training, what each gap costs, and the way out.

A check is one small function. Heavy libraries are imported inside of them: one that is missing or broken is an answer.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alignctl.errors import MachineError, Problem
from alignctl.train import needs

if TYPE_CHECKING:
    import torch

GIB = 2**30
HUB_SECONDS = 3
LEAST_DISK, ROOM_FOR_7B = 1.0, 20.0
LEAST_MEMORY = 4.0
MOST_OFF = 0.25  # nf4 is about 0.1 away from what it stands for
ROUNDED = 0.05  # far more than bfloat16 rounds
ON_CPU = "training runs on the CPU: a model of 135M parameters in minutes, one of 7B not at all"
NO_QLORA = "a recipe with a `quantization:` section cannot be trained"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_DRIVER = Path("/proc/driver/nvidia/version")

State = Literal["ok", "gap", "broken"]


@dataclass(frozen=True)
class Check:
    """One question to the machine: `gap` costs something, `broken` means that training cannot work."""

    name: str
    state: State
    found: str
    cost: str = ""
    way_out: str = ""

    def problem(self) -> Problem:
        """The same as an error."""
        return Problem(self.name, f"{self.found}: {self.cost}" if self.cost else self.found, self.way_out)


def examine() -> list[Check]:
    """Every check of the machine, in order; one that fails itself is a gap with its error."""
    computing = (gpu, memory, precision, attention, bitsandbytes, threads) if _has_torch() else ()
    every = (python, packages, imports, *computing, disk, hub)
    return [check for ask in every for check in asked(ask)]


def _has_torch() -> bool:
    """Whether torch can be imported at all; `imports` says why not."""
    with contextlib.suppress(Exception):
        importlib.import_module("torch")
        return True
    return False


def asked(ask: Callable[[], Check | Iterable[Check]]) -> list[Check]:
    """What `ask` finds."""
    try:
        found = ask()
        return [found] if isinstance(found, Check) else list(found)
    except Exception as error:  # noqa: BLE001 (whatever a driver or a half-installed library raises)
        what = f"could not be looked at: {_said(error)}"
        return [Check(ask.__name__, "gap", what, "nobody knows whether it works", "mend what the error is about")]


def python() -> Check:
    """The Python that runs."""
    problem = needs.python()
    if problem:
        return Check("python", "broken", problem.what, "nothing is tested with it", problem.way_out)
    return Check("python", "ok", platform.python_version())


def packages() -> list[Check]:
    """Every package that alignctl needs, by its own metadata."""
    found = []
    for wanted in needs.requirements():
        name, problem, version = f"package.{wanted.name}", needs.package(wanted), needs.version(wanted.name)
        if problem is None:
            found.append(Check(name, "ok", str(version)))
        elif version is None:
            cost = NO_QLORA if wanted.name == "bitsandbytes" else "training does not start"
            state: State = "gap" if wanted.name == "bitsandbytes" else "broken"
            found.append(Check(name, state, problem.what, cost, problem.way_out))
        else:
            cost = "nothing is tested with it, and what it changed may be silent"
            found.append(Check(name, "gap", problem.what, cost, problem.way_out))
    return found


def imports() -> Check:
    """The trainers and all that they are built on, imported."""
    began = time.monotonic()
    try:
        importlib.import_module("alignctl.train.fit")
    except Exception as error:  # noqa: BLE001 (compiled libraries raise what they like)
        missing = needs.behind(error) if isinstance(error, ImportError) else None
        way_out = missing.way_out if missing else "install alignctl anew in an empty environment"
        return Check("imports", "broken", f"the trainers: {_said(error)}", "training does not start", way_out)
    return Check("imports", "ok", f"the trainers, in {time.monotonic() - began:.1f} s")


def gpu() -> Check:
    """The GPU that a run would use."""
    import torch

    if not torch.cuda.is_available():
        why, way_out = _without_gpu(torch.version.cuda, torch.__version__)
        return Check("gpu", "gap", why, ON_CPU, way_out)
    card = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    found = f"{card.name}, {card.total_memory / GIB:.1f} GiB, compute capability {card.major}.{card.minor}, "
    found += f"driver {driver() or 'unknown'}, CUDA {torch.version.cuda}"
    return Check("gpu", "ok", found + (f"; {count} are there, and a run uses the first" if count > 1 else ""))


def driver() -> str | None:
    """The version of NVIDIA's driver, None where there is none."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return "of unknown version" if _DRIVER.is_file() else None


def _without_gpu(cuda: str | None, torch: str) -> tuple[str, str]:
    """Why torch sees no GPU, and the way out."""
    there, visible = driver(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if there is None:
        return "none: no NVIDIA driver was found", "a machine with an NVIDIA GPU for models beyond about 1B parameters"
    if cuda is None:
        return f"NVIDIA driver {there}, but torch {torch} is built without CUDA", "install a CUDA build of torch"
    if visible is not None and not visible[:1].isdigit():
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU", "unset CUDA_VISIBLE_DEVICES"
    what = f"NVIDIA driver {there}, and CUDA {cuda} of torch {torch} does not start on it"
    return what, "a newer driver, or a torch for an older CUDA"


def memory() -> list[Check]:
    """Memory that is free: the GPU's, and what this process may use of the machine's."""
    import torch

    from alignctl.train import machine

    there = machine.host_memory_gib()
    found = [Check("memory", "ok", f"{there:.1f} GiB for this process")]
    if there < LEAST_MEMORY:
        cost = "the system kills a run that needs more, and a model of 1B parameters takes 4 GiB to train adapters on"
        found = [Check("memory", "gap", found[0].found, cost, "a larger machine or container, or a smaller model")]
    if torch.cuda.is_available():
        free, total = (size / GIB for size in torch.cuda.mem_get_info(0))
        said = f"{free:.1f} of {total:.1f} GiB are free"
        taken = free < machine.NEARLY_ALL * total
        cost, way_out = "a run has only what is free", "`nvidia-smi` shows who holds the rest"
        found.append(Check("gpu.memory", "gap", said, cost, way_out) if taken else Check("gpu.memory", "ok", said))
    return found


def precision() -> Check:
    """Whether the device computes in bfloat16."""
    from alignctl.train import machine

    here = machine.detect()
    try:
        here.precision("bfloat16")
    except MachineError as error:
        (problem,) = error.problems
        cost = "`dtype: auto` takes float32, which is twice the memory of bfloat16"
        return Check("bfloat16", "gap", problem.what, cost, problem.way_out)
    return Check("bfloat16", "ok", f"{here.name} computes in it")


def attention() -> Check:
    """The attention of packed batches, computed here and compared with plain attention."""
    import torch

    from alignctl.train import attention, machine

    device = machine.detect().device
    capable = device.type == "cpu" or torch.cuda.get_device_capability(device) >= attention.AMPERE
    off = attention_off(device)
    if not off < ROUNDED:
        found, way_out = f"packed attention is {off:.2f} away from plain attention", "training.packed=false"
        return Check("attention", "gap", found, "the gate `packed` would stop a run", way_out)
    if device.type == "cpu":
        return Check("attention", "ok", "SDPA, a segment at a time, as is best on a CPU")
    if not capable:
        found = f"compute capability {torch.cuda.get_device_capability(device)} is too old for flash attention"
        return Check("attention", "gap", found, "packed batches take SDPA, a segment at a time: slower", "a newer GPU")
    return Check("attention", "ok", "torch's variable-length flash attention (flash-attn is not needed)")


def attention_off(device: torch.device) -> float:
    """How far packed attention is from plain attention, relative to it, for two segments behind one prefix."""
    import torch
    import torch.nn.functional as F

    from alignctl.train.attention import Segment, Segments, attend

    parts = (Segment(0, 4), Segment(4, 3, 0, 4), Segment(7, 2, 0, 4))
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 64, generator=numbers) for _ in range(3))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    given = [x.to(device, dtype) for x in (q, k, v)]
    packed = attend(given[0], given[1], given[2], Segments(parts, 9, device)).float().cpu().transpose(1, 2)
    last = [0, 1, 2, 3, 7, 8]
    plain = F.scaled_dot_product_attention(q[:, :, last], k[:, :, last], v[:, :, last], is_causal=True)
    return ((packed[:, :, last] - plain).norm() / plain.norm()).item()


def bitsandbytes() -> Check:
    """A 4-bit layer, forward and backward, against the weights that it was made from."""
    missing = needs.bitsandbytes()
    if missing:
        return Check("bitsandbytes", "gap", missing.what, NO_QLORA, missing.way_out)
    from alignctl.train import machine

    here = machine.detect()
    try:
        off = four_bits_off(here.kind)
    except Exception as error:  # noqa: BLE001 (a library without its kernels fails in ways of its own)
        found, way_out = f"a 4-bit product fails: {_said(error)}", "`python -m bitsandbytes` says what it lacks"
        return Check("bitsandbytes", "gap", found, NO_QLORA, way_out)
    if not off < MOST_OFF:
        found = f"a 4-bit product or its gradient is {off:.2f} away from what it stands for"
        return Check("bitsandbytes", "gap", found, NO_QLORA, f"{needs.INSTALL} --force-reinstall bitsandbytes")
    how = "with CUDA" if here.kind == "cuda" else "on the CPU, without CUDA"
    return Check("bitsandbytes", "ok", f"a 4-bit layer forward and backward, {how}")


def four_bits_off(kind: str) -> float:
    """How far a 4-bit layer's product and its gradient are, at most, from those of its weights, relative to them."""
    import torch
    from bitsandbytes.nn import Linear4bit

    numbers = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 64, generator=numbers), torch.randn(8, 64, generator=numbers)
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data.copy_(weight)
    layer.to(kind)
    given = x.to(kind).requires_grad_()
    product = layer(given)
    product.sum().backward()
    assert given.grad is not None
    pairs = ((product.detach(), x @ weight.T), (given.grad, weight.sum(0).expand_as(x)))
    return max(((a.cpu() - b).norm() / b.norm()).item() for a, b in pairs)


def threads() -> Check:
    """Threads that torch computes with, against the cores that this process may use."""
    import torch

    used, cores, asked_for = torch.get_num_threads(), usable_cores(), os.environ.get("OMP_NUM_THREADS")
    found = f"{used} on {cores:g} cores" + (f" (OMP_NUM_THREADS={asked_for})" if asked_for else "")
    if used > max(1, cores):
        way_out = f"OMP_NUM_THREADS={max(1, int(cores))}"
        return Check("threads", "gap", found, "threads wait for each other, and steps on the CPU slow down", way_out)
    if used <= cores / 2 and not torch.cuda.is_available():
        cost = f"a step on the CPU takes up to {cores / used:.0f} times as long"
        return Check("threads", "gap", found, cost, f"OMP_NUM_THREADS={int(cores)}, where nobody else needs them")
    return Check("threads", "ok", found)


def usable_cores() -> float:
    """Cores that this process may use: the machine's, its own share of them, or its container's."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = _CPU_MAX.read_text(encoding="ascii").partition(" ") if _CPU_MAX.is_file() else ("max", "", "")
    return allowed if quota == "max" else min(allowed, int(quota) / int(period))


def disk() -> list[Check]:
    """Room for runs here, and for models and data sets in the caches."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from alignctl.train import pypi

    places = {"runs": Path.cwd(), "hub": Path(HF_HUB_CACHE), "cache": pypi.cache_folder()}
    return [_room(f"disk.{name}", place) for name, place in places.items()]


def _room(name: str, place: Path) -> Check:
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free / GIB
    found = f"{free:.1f} GiB free for {place}"
    if not os.access(there, os.W_OK):
        return Check(name, "broken", f"{there} cannot be written", "nothing can be kept there", _ELSEWHERE[name])
    if free < LEAST_DISK:
        return Check(name, "broken", found, "no model and no checkpoint fits", _ELSEWHERE[name])
    if free < ROOM_FOR_7B:
        cost = "a model of 7B parameters is 15 GB of files, and 28 GB a checkpoint when all its weights are trained"
        return Check(name, "gap", found, cost, _ELSEWHERE[name])
    return Check(name, "ok", found)


_ELSEWHERE = {
    "disk.runs": "free space, or --output on another disk",
    "disk.hub": "free space, or HF_HOME on another disk",
    "disk.cache": "free space, or ALIGNCTL_CACHE on another disk",
}


def hub() -> Check:
    """Whether the hub answers, and what is in its cache."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE

    have = (
        f"{_cached(HF_HUB_CACHE, 'models')} models and {_cached(HF_HUB_CACHE, 'datasets')} data sets in {HF_HUB_CACHE}"
    )
    cost = "only models and data sets that are local or in the cache can be used"
    switched = [name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if switched:
        return Check("hub", "gap", f"switched off by {switched[0]}; {have}", cost, f"unset {switched[0]}")
    failed = unanswered(ENDPOINT)
    if failed:
        way_out = "check the network or a proxy, set HF_ENDPOINT to a mirror, or use local folders"
        return Check("hub", "gap", f"{ENDPOINT} does not answer ({failed}); {have}", cost, way_out)
    token = "logged in" if get_token() else "not logged in, so gated models are refused"
    return Check("hub", "ok", f"{ENDPOINT} answers, {token}; {have}")


def unanswered(endpoint: str) -> str:
    """Why `endpoint` gives no answer within the limit; empty when it does. A name server, too, has no longer."""
    answer = [f"nothing within {HUB_SECONDS} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
                answer[0] = ""
        except urllib.error.HTTPError as error:
            answer[0] = f"HTTP {error.code}" if error.code >= 500 else ""
        except (OSError, ValueError) as error:
            answer[0] = str(getattr(error, "reason", error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    return answer[0]


def _cached(folder: str, kind: str) -> int:
    return sum(1 for _ in Path(folder).glob(f"{kind}--*"))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
