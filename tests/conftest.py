"""Fixtures that every room shares: the command line in a subprocess or in this process, and small data files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.cli.main import main

ROOT = Path(__file__).parents[1]


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
def here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in this process, where the libraries are imported already."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["alignctl", *arguments])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run
