"""Fixtures that every room shares: the command line in a subprocess or in this process, and small data files."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from commandline import invoke

ROOT = Path(__file__).parents[1]


def pytest_collection_finish() -> None:
    """The libraries are imported and stay: leave their objects out of every collection that training asks for."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def alignctl(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command line in `tmp_path`, on one thread and without any hub."""

    def run(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        command = [sys.executable, "-m", "alignctl", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A file of twelve preference pairs over eight prompts."""
    rows = [
        {
            "prompt": f"What is {i % 8} plus one?",
            "chosen": f"It is {i % 8 + 1}.",
            "rejected": f"Perhaps {i + 3}, or so.",
        }
        for i in range(12)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in this process, and read what it printed."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()  # of what ran before
        return subprocess.CompletedProcess(arguments, invoke(*arguments), *capfd.readouterr())

    return run
