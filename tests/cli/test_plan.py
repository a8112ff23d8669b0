"""`alignctl plan` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alignctl.plan import gpus
from alignctl.recipe import catalog, load

Run = Callable[..., subprocess.CompletedProcess[str]]
NAMES = catalog.names()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(gpus, "found", lambda: None)


@pytest.fixture
def plan(here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: here("plan", *arguments)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_a_plan(plan: Run, name: str) -> None:
    done = plan(name)
    assert (done.returncode, done.stderr) == (0, "")
    assert "at the peak, which is in: " in done.stdout and "note: no" not in done.stdout
    assert "fits: 8 GiB " in done.stdout and "assumed" in done.stdout


def test_it_fits(plan: Run) -> None:
    done = plan("phi2-ultrafeedback", "--gpu-memory", "24GiB")
    assert done.returncode == 0 and "\nfits 24.0 GiB, with " in done.stdout
    assert "2,779,683,840 parameters, an adapter of r 16 on 4-bit weights" in done.stdout
    assert "RTX 4090: a step " in done.stdout and "A100" not in done.stdout


def test_it_does_not_fit(plan: Run) -> None:
    done = plan("mistral7b-orpo", "--gpu-memory", "8GiB")
    assert done.returncode == 4
    assert "does not fit 8.0 GiB; in order of least harm, each with those before it:\n" in done.stdout
    keys = "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=8"
    assert keys in done.stdout
    assert f" GiB are needed, and there are 8.0 — {keys}; --fix writes a recipe with that" in done.stderr


def test_a_recipe_that_fits_is_written_beside(plan: Run, tmp_path: Path) -> None:
    done = plan("mistral7b-orpo", "training.learning_rate=3e-5", "--gpu-memory", "8GiB", "--fix")
    assert done.returncode == 0 and done.stdout.endswith("written: mistral7b-orpo-8gib.yaml\n")
    made = load.load(tmp_path / "mistral7b-orpo-8gib.yaml").recipe
    assert (made.training.per_device_train_batch_size, made.training.gradient_accumulation_steps) == (1, 8)
    assert made.training.learning_rate == 3e-5
    assert plan("mistral7b-orpo-8gib.yaml", "--gpu-memory", "8GiB").returncode == 0
    before = (tmp_path / "mistral7b-orpo-8gib.yaml").read_text()
    again = plan("mistral7b-orpo", "--gpu-memory", "8GiB", "--fix")
    assert again.returncode == 2 and "exists — move it away" in again.stderr
    assert (tmp_path / "mistral7b-orpo-8gib.yaml").read_text() == before


def test_a_recipe_of_ones_own_stays(plan: Run, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    mine = tmp_path / "deep" / "mine.yaml"
    mine.write_text("extends: mistral7b-orpo.yaml\ntraining: {weight_decay: '${oc.env:HOME_DECAY,0.5}'}\n")
    before = mine.read_text()
    assert plan("deep/mine.yaml", "--gpu-memory", "8", "--fix").returncode == 0
    assert mine.read_text() == before
    written = (tmp_path / "deep" / "mine-8gib.yaml").read_text()
    assert "${oc.env:HOME_DECAY,0.5}" in written  # not what it stands for


def test_no_change_is_enough(plan: Run, tmp_path: Path) -> None:
    done = plan("mistral7b-orpo", "--gpu-memory", "3GiB", "--fix")
    assert done.returncode == 4 and "no change is enough (" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_fix_needs_a_size(plan: Run) -> None:
    done = plan("phi2-ultrafeedback", "--fix")
    assert done.returncode == 2 and "--fix: no GPU is here to fit — say which with --gpu-memory 24GiB" in done.stderr


@pytest.mark.parametrize("size", ["banana", "-1", "0GiB", ""])
def test_no_amount(plan: Run, size: str) -> None:
    done = plan("phi2-ultrafeedback", "--gpu-memory", size)
    assert (done.returncode, done.stdout) == (2, "") and "is no amount of memory" in done.stderr


def test_a_model_that_nobody_knows(plan: Run) -> None:
    done = plan("phi2-ultrafeedback", "model.name_or_path=nobody/nothing")
    assert done.returncode == 4
    assert "model.name_or_path: the hub has no nobody/nothing, or cannot be reached" in done.stderr
    assert "or give a folder with its config.json" in done.stderr


def test_a_folder_with_a_config(plan: Run, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brandnew", "vocab_size": 512, **sizes}))
    done = plan("phi2-ultrafeedback", f"model.name_or_path={tmp_path}")
    assert done.returncode == 0 and "note: brandnew is not an architecture that is known here" in done.stdout
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    done = plan("phi2-ultrafeedback", f"model.name_or_path={tmp_path}")
    assert done.returncode == 2 and "cannot be read as a language model's: 'hidden_size'" in done.stderr
    (tmp_path / "config.json").write_text("{")
    assert plan("phi2-ultrafeedback", f"model.name_or_path={tmp_path}").returncode == 2


def test_json(plan: Run) -> None:
    done = plan("mistral7b-zephyr-dpo", "--gpu-memory", "8GiB", "--json")
    found = json.loads(done.stdout)
    assert found["parameters"] == 7_241_732_096 and found["fits"] is False and done.returncode == 4
    assert sum(line["bytes"] for line in found["lines"]) == found["needed_bytes"]
    assert found["phases"][found["phase"]] == max(found["phases"].values()) == found["allocated_bytes"]
    assert found["fixes"][-1]["needed_bytes"] <= 8 * 2**30
    assert any("is not there yet" in note for note in found["notes"])


def test_a_gpu_that_is_here(plan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "found", lambda: gpus.Here("NVIDIA GeForce RTX 4090", 24564 * 2**20))
    done = plan("phi2-ultrafeedback")
    assert "fits 24.0 GiB of NVIDIA GeForce RTX 4090, with " in done.stdout
    assert next(line for line in done.stdout.splitlines() if "TFLOP/s" in line).startswith("RTX 4090: ")


def test_the_length_of_rows_counts(plan: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a" * 400, "chosen": "b" * 40, "rejected": "c" * 40}))
    whole, short = (plan("phi2-ultrafeedback", "--json", *more) for more in ((), ("--rows", "rows.jsonl")))
    assert json.loads(short.stdout)["allocated_bytes"] < json.loads(whole.stdout)["allocated_bytes"]
    assert "estimated as a token for 4 characters" in short.stdout
    assert plan("phi2-ultrafeedback", "--rows", "none.jsonl").returncode == 2


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['alignctl', 'plan', 'mistral7b-zephyr-dpo', '--gpu-memory', '24GiB']\n"
        "from alignctl.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'huggingface_hub'} & sys.modules.keys()\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "HEAVY []"


def test_three_steps(data_set: Callable[..., Path], here: Run) -> None:
    data_set([{"prompt": f"Say {i}.", "chosen": f"{i} it is", "rejected": f"not {i}"} for i in range(8)])
    recipe = yaml.safe_load(Path("r.yaml").read_text())
    recipe["training"]["per_device_train_batch_size"] = 2
    recipe["gates"] = {"reload": False}
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    done = here("plan", "r.yaml", "--measure")
    assert done.returncode == 0, done.stderr
    assert "measured: a step " in done.stdout and "for a GPU, which is not here" in done.stdout
    assert not Path("runs").exists()
