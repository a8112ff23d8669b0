"""The demos on the real 135M model: the preference must be visible in scores and in answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(folder: Path, method: str) -> dict[str, Any]:
    """Run a demo with all the machine's threads; its summary."""
    command = [sys.executable, "-m", "alignctl", method, f"demo-{method}"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((folder / f"runs/demo-{method}/summary.json").read_text())
    return summary


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_preference_demos(tmp_path: Path, method: str) -> None:
    summary = run(tmp_path, method)
    assert summary["verdict"] == "better"
    assert summary["before"]["reward_accuracy"] <= 0.5
    assert summary["after"]["reward_accuracy"] > 0.9
    assert summary["samples"]["length_ratio"] < 0.5
    assert summary["samples"]["stop_rate"]["after"] > summary["samples"]["stop_rate"]["before"]


def test_sft_demo(tmp_path: Path) -> None:
    summary = run(tmp_path, "sft")
    assert summary["verdict"] == "better"
    assert summary["after"]["nll"] < summary["before"]["nll"] - 0.3
    assert summary["samples"]["length_ratio"] < 0.5
