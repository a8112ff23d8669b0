"""What the machine is asked, with fakes at the seams, and the real thing where there is one."""

from __future__ import annotations

import contextlib
import http.server
import importlib
import importlib.util
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from alignctl.train import attention, checkup, machine, needs
from alignctl.train.checkup import GIB, Check

Patch = pytest.MonkeyPatch
PLAIN_CPU = machine.Machine("cpu", "an old CPU", bf16=False)


@pytest.fixture
def card(monkeypatch: Patch) -> None:
    """A GPU of another kind than any that is there."""
    properties = SimpleNamespace(name="Tesla T4", total_memory=15 * GIB, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (6 * GIB, 15 * GIB))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(checkup, "driver", lambda: "570.1")


def without(name: str) -> Callable[..., Any]:
    """`find_spec` on a machine where `name` is not installed."""
    find = importlib.util.find_spec
    return lambda asked, *rest: None if asked == name else find(asked, *rest)


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_a_check_that_fails_is_an_answer() -> None:
    def driver_trouble() -> Check:
        raise RuntimeError("the driver says no\nand more")

    (found,) = checkup.asked(driver_trouble)
    assert (found.name, found.state) == ("driver_trouble", "gap")
    assert found.found == "could not be looked at: RuntimeError: the driver says no"


def test_packages(metadata: Callable[..., None]) -> None:
    given = ["torch>=2.11", "trl<1.17,>=1.16", "bitsandbytes>=0.50", "rich>=14", "wandb; extra == 'wandb'"]
    metadata(given, torch="2.12.0.dev1+cu130", trl="1.17.0", rich="14.0")
    found = {check.name: check for check in checkup.packages()}
    assert {name: check.state for name, check in found.items()} == {
        "package.torch": "ok",
        "package.trl": "gap",
        "package.bitsandbytes": "gap",
        "package.rich": "ok",
    }
    assert found["package.trl"].found == "1.17.0 is installed, and alignctl needs <1.17,>=1.16"
    assert found["package.trl"].way_out == "pip install 'trl<1.17,>=1.16'"
    assert found["package.bitsandbytes"].cost == checkup.NO_QLORA


def test_a_missing_package_that_training_starts_with_is_broken(metadata: Callable[..., None]) -> None:
    metadata(["torch>=2.11"])
    assert states(checkup.packages()) == {"package.torch": "broken"}


def test_an_old_python(monkeypatch: Patch) -> None:
    assert checkup.python().state == "ok"
    monkeypatch.setattr(needs.platform, "python_version", lambda: "3.9.1")
    found = checkup.python()
    assert found.state == "broken" and found.found == "Python 3.9.1 runs, and alignctl needs >=3.11"


def test_trainers_that_do_not_import(monkeypatch: Patch, metadata: Callable[..., None]) -> None:
    def fail(name: str) -> None:
        raise ImportError("cannot import name 'DPOTrainer' from 'trl'", name="trl")

    metadata(["trl<1.17,>=1.16"], trl="0.9")
    monkeypatch.setattr(importlib, "import_module", fail)
    found = checkup.imports()
    assert found.state == "broken" and "DPOTrainer" in found.found
    assert found.way_out == "pip install 'trl<1.17,>=1.16'"


def test_without_torch_what_computes_is_not_asked(monkeypatch: Patch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = states(checkup.examine())
    assert found["imports"] == "broken" and {"python", "disk.runs", "hub"} <= found.keys()
    assert not {"gpu", "memory", "bfloat16", "attention", "bitsandbytes", "threads"} & found.keys()


def test_the_trainers_import() -> None:
    assert checkup.imports().state == "ok"


@pytest.mark.usefixtures("card")
def test_a_gpu() -> None:
    found = checkup.gpu()
    assert found.state == "ok"
    assert found.found.startswith("Tesla T4, 15.0 GiB, compute capability 7.5, driver 570.1, CUDA 12.6")
    assert found.found.endswith("2 are there, and a run uses the first")
    taken = {check.name: check for check in checkup.memory()}["gpu.memory"]
    assert taken.state == "gap" and taken.found == "6.0 of 15.0 GiB are free"


@pytest.mark.parametrize(
    ("driver", "cuda", "visible", "expected"),
    [
        (None, None, None, "no NVIDIA driver was found"),
        ("570.1", None, None, "is built without CUDA"),
        ("570.1", "12.6", "", "CUDA_VISIBLE_DEVICES='' hides every GPU"),
        ("570.1", "12.6", "-1", "CUDA_VISIBLE_DEVICES='-1' hides every GPU"),
        ("470.2", "12.6", "0", "CUDA 12.6 of torch"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: Patch, driver: str | None, cuda: str | None, visible: str | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(checkup, "driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = checkup.gpu()
    assert found.state == "gap" and expected in found.found and found.cost == checkup.ON_CPU and found.way_out


def test_little_memory(monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "host_memory_gib", lambda: 2.0)
    assert states(checkup.memory())["memory"] == "gap"


def test_bfloat16_in_the_words_of_the_trainer(monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "detect", lambda: PLAIN_CPU)
    found = checkup.precision()
    assert (found.state, found.found) == ("gap", "an old CPU does not compute in bfloat16")
    with pytest.raises(machine.MachineError) as raised:
        PLAIN_CPU.precision("bfloat16")
    assert raised.value.problems[0].way_out == found.way_out


def test_packed_attention_is_computed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "detect", lambda: PLAIN_CPU)
    assert checkup.attention_off(torch.device("cpu")) < 1e-5
    assert checkup.attention().state == "ok"


def test_packed_attention_that_forgets_the_prefix_is_seen(monkeypatch: Patch) -> None:
    real = attention.attend

    def forgetful(query: Any, key: Any, value: Any, packed: attention.Segments) -> Any:
        alone = tuple(attention.Segment(part.start, part.length) for part in packed.parts)
        return real(query, key, value, attention.Segments(alone, packed.total, packed.device))

    monkeypatch.setattr(machine, "detect", lambda: PLAIN_CPU)
    monkeypatch.setattr(attention, "attend", forgetful)
    assert checkup.attention().state == "gap"


def test_a_4_bit_layer_is_computed() -> None:
    assert 0.01 < checkup.four_bits_off("cpu") < 0.2
    assert checkup.bitsandbytes().state == "ok"


def test_a_4_bit_layer_without_a_gradient_is_seen(monkeypatch: Patch) -> None:
    real = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: real(self, x.detach()) + 0 * x)
    found = checkup.bitsandbytes()
    assert found.state == "gap" and "1.00 away" in found.found and found.cost == checkup.NO_QLORA


def test_a_bitsandbytes_without_its_kernels(monkeypatch: Patch) -> None:
    def fail(self: Linear4bit, x: torch.Tensor) -> None:
        raise RuntimeError("libbitsandbytes_cuda126.so: cannot open shared object file")

    monkeypatch.setattr(Linear4bit, "forward", fail)
    found = checkup.bitsandbytes()
    assert found.state == "gap" and "libbitsandbytes_cuda126.so" in found.found


def test_no_bitsandbytes_in_the_words_of_the_trainer(monkeypatch: Patch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without("bitsandbytes"))
    problem = needs.bitsandbytes()
    found = checkup.bitsandbytes()
    assert problem is not None and (found.found, found.way_out) == (problem.what, problem.way_out)
    assert found.state == "gap"


@pytest.mark.parametrize(
    ("used", "cores", "state", "way_out"),
    [
        (4, 4.0, "ok", ""),
        (16, 1.5, "gap", "OMP_NUM_THREADS=1"),
        (1, 8.0, "gap", "OMP_NUM_THREADS=8, where nobody else needs them"),
    ],
)
def test_threads(monkeypatch: Patch, used: int, cores: float, state: str, way_out: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used)
    monkeypatch.setattr(checkup, "usable_cores", lambda: cores)
    found = checkup.threads()
    assert (found.state, found.way_out) == (state, way_out)


def test_a_container_has_fewer_cores(monkeypatch: Patch, tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(checkup, "_CPU_MAX", quota)
    whole = checkup.usable_cores()
    quota.write_text("50000 100000\n")
    assert checkup.usable_cores() == 0.5 < whole
    quota.write_text("max 100000\n")
    assert checkup.usable_cores() == whole


@pytest.mark.parametrize(("free", "state"), [(0.4, "broken"), (10.0, "gap"), (200.0, "ok")])
def test_a_full_disk(monkeypatch: Patch, tmp_path: Path, free: float, state: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free * GIB))
    found = {check.name: check for check in checkup.disk()}
    assert found["disk.runs"].state == state and f"{free:.1f} GiB free for {tmp_path}" == found["disk.runs"].found
    assert set(found) == {"disk.runs", "disk.hub", "disk.cache"}


def test_a_place_that_cannot_be_written(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkup.os, "access", lambda place, how: False)
    assert set(states(checkup.disk()).values()) == {"broken"}


class _Hub(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: Patch) -> Iterator[str]:
    """A hub on this machine."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), _Hub) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{serving.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        yield address
        serving.shutdown()


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (404, "ok"), (503, "gap")])
def test_the_hub(monkeypatch: Patch, server: str, tmp_path: Path, status: int, state: str) -> None:
    (tmp_path / "models--a--b").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(_Hub, "status", status)
    found = checkup.hub()
    assert found.state == state and server in found.found
    assert f"1 models and 0 data sets in {tmp_path}" in found.found


def test_a_hub_that_is_silent_is_waited_for_no_longer_than_the_limit(monkeypatch: Patch) -> None:
    monkeypatch.setattr(checkup, "HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = checkup.unanswered(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "timed out" in found or "nothing within 0.2 s" in found


def test_a_name_server_that_is_silent_is_waited_for_no_longer_either(monkeypatch: Patch) -> None:
    def slow(request: object, timeout: float) -> contextlib.AbstractContextManager[None]:
        time.sleep(3)
        return contextlib.nullcontext()

    monkeypatch.setattr(checkup, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(checkup.urllib.request, "urlopen", slow)
    began = time.monotonic()
    assert checkup.unanswered("http://nowhere") == "nothing within 0.1 s"
    assert time.monotonic() - began < 2


def test_a_hub_that_nobody_serves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert "refused" in checkup.unanswered(f"http://127.0.0.1:{port}")
    assert checkup.unanswered("no address at all")


def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch: Patch) -> None:
    def ask(endpoint: str) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(checkup, "unanswered", ask)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = checkup.hub()
    assert found.state == "gap" and found.found.startswith("switched off by HF_HUB_OFFLINE")
