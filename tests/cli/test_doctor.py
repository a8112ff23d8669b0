"""`alignctl doctor` in a subprocess, on this machine and on one that lacks something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]
RECIPE = """model: {name_or_path: ./nowhere}
data: {train: [{path: rows.jsonl}]}
training: {learning_rate: 1e-5}
dpo: {}
"""


def test_this_machine(alignctl: Run) -> None:
    done = alignctl("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["works"] is True
    assert checks["hub"]["state"] == "gap" and "HF_HUB_OFFLINE" in checks["hub"]["found"]
    assert checks["imports"]["state"] == checks["bitsandbytes"]["state"] == checks["package.trl"]["state"] == "ok"
    assert {"python", "gpu", "memory", "bfloat16", "attention", "threads", "disk.runs"} <= checks.keys()


def test_a_recipe_that_cannot_be_trained_here(tmp_path: Path, here: Run) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    done = here("doctor", str(tmp_path / "r.yaml"))
    assert done.returncode == 4
    assert done.stderr.startswith("alignctl: recipe.model: no such folder ./nowhere: there is nothing to train — ")
    assert "✗ recipe.model" in done.stdout and "this recipe's DPO cannot work on this machine" in done.stdout


def test_a_recipe_with_a_mistake(tmp_path: Path, here: Run) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE + "lora_r: 8\n", encoding="utf-8")
    assert here("doctor", str(tmp_path / "r.yaml")).returncode == 2


WITHOUT_TRL = """import importlib.metadata as m, sys
version = m.version
def gone(name):
    if name == "trl":
        raise m.PackageNotFoundError(name)
    return version(name)
m.version = gone
sys.modules["trl"] = None
sys.argv = ["alignctl", *sys.argv[1:]]
from alignctl.cli.main import main
main()
"""


def test_doctor_and_trainer_say_the_same_of_a_missing_package(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_TRL, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)

    trained, looked = run("dpo", "r.yaml"), run("doctor")
    assert trained.returncode == looked.returncode == 4
    assert trained.stderr == "alignctl: trl: is not installed — pip install 'trl<1.17,>=1.16'\n"
    assert "package.trl: is not installed: training does not start — pip install 'trl<1.17,>=1.16'" in looked.stderr
    assert "training cannot work on this machine" in looked.stdout
