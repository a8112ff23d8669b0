"""What `alignctl init` writes passes `alignctl plan`, or says why not."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from alignctl.plan import gpus
from alignctl.recipe.load import load

Run = Callable[..., subprocess.CompletedProcess[str]]
# Of a model of 7B parameters; nothing here loads its weights.
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TRL = "model_name_or_path: mistralai/Mistral-7B-v0.1\ndataset_name: c/d\nloss_type: sigmoid\nlearning_rate: 1e-6\n"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, data_set: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    """No GPU, no hub; `large` is a folder with a tokenizer and a config, and `rows.jsonl` has forty pairs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(gpus, "found", lambda: None)
    data_set({"prompt": f"What is {i}?", "chosen": "It is so. " * 80, "rejected": f"No {i}. " * 80} for i in range(40))
    shutil.copytree(model_folder, tmp_path / "large", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tmp_path / "large" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | SIZES), encoding="utf-8")


@pytest.fixture
def init(here: Run) -> Run:
    given = ("--method", "dpo", "--model", "large", "--data", "rows.jsonl", "--output", "new.yaml")
    return lambda *options: here("init", *given, *options)


def test_the_batch_shrinks_until_the_plan_fits(init: Run, here: Run) -> None:
    done = init("--gpu-memory", "16GiB")
    assert done.returncode == 0, done.stderr
    (changed,) = [line for line in done.stdout.splitlines() if line.startswith("changed to fit 16 GiB, where ")]
    recipe = load(Path("new.yaml")).recipe
    batch, steps = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    assert batch < 4 and batch * steps == 4 and recipe.quantization is None
    keys = f"training.per_device_train_batch_size={batch} training.gradient_accumulation_steps={steps}"
    assert changed.endswith(f" GiB were needed: {keys}")
    assert "  # 16 GiB: " in Path("new.yaml").read_text(encoding="utf-8")
    assert "GiB at the peak, which fits 16 GiB; the run takes about " in done.stdout and "RTX 4080" in done.stdout
    planned = here("plan", "new.yaml", "--gpu-memory", "16GiB")
    assert planned.returncode == 0 and "fits 16.0 GiB" in planned.stdout


def test_4_bits_in_less_memory(init: Run, here: Run) -> None:
    done = init("--gpu-memory", "8192MiB")
    assert done.returncode == 0 and "changed to fit" not in done.stdout, done.stderr
    assert "load_in_4bit: true  # 8 GiB: " in Path("new.yaml").read_text(encoding="utf-8")
    assert here("plan", "new.yaml", "--gpu-memory", "8GiB").returncode == 0


def test_nothing_makes_it_fit(init: Run) -> None:
    done = init("--gpu-memory", "3GiB")
    assert done.returncode == 4 and done.stdout.endswith("\nwritten: new.yaml\n")
    assert "GiB at the peak, which does not fit 3 GiB\n" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("alignctl: memory: ") and " GiB are needed, and the GPU has 3 GiB; no change is" in line
    assert load(Path("new.yaml")).recipe.training.per_device_train_batch_size == 4


def test_only_what_was_not_asked_for_makes_it_fit(init: Run) -> None:
    done = init("--gpu-memory", "8GiB", "--adapter", "lora")
    assert done.returncode == 4 and load(Path("new.yaml")).recipe.quantization is None
    assert "it fits only with " in done.stderr and "quantization={load_in_4bit: true} — another --a" in done.stderr


def test_without_a_gpu_the_peak_is_said(init: Run, here: Run) -> None:
    done = init()
    assert done.returncode == 0, done.stderr
    assert "GiB at the peak on a GPU; `alignctl plan new.yaml --gpu-memory 24GiB` says more\n" in done.stdout


def test_a_config_that_is_no_language_models(init: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("large/config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    done = init("--gpu-memory", "24GiB")
    assert done.returncode == 0, done.stderr
    assert "note: not planned: large/config.json: cannot be read as a language model's: 'hidden_size' — " in done.stdout
    assert Path("new.yaml").is_file() and "plan: " not in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu-memory", "8GiB"), "which does not fit 8 GiB; `alignctl plan r-dpo.yaml --gpu-memory 8GiB` says what"),
        (("--gpu-memory", "80GiB"), "GiB at the peak, which fits 80 GiB\n"),
        ((), "GiB at the peak on a GPU; `alignctl plan r-dpo.yaml --gpu-memory 24GiB` says more\n"),
    ],
)
def test_the_plan_of_a_converted_recipe(here: Run, options: tuple[str, ...], said: str) -> None:
    Path("trl.yaml").write_text(TRL + "use_peft: true\n", encoding="utf-8")
    done = here("init", "--from", "trl.yaml", "--output", "r-dpo.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    recipe = load(Path("r-dpo.yaml")).recipe
    assert recipe.quantization is None and recipe.training.gradient_checkpointing in (True, "auto")


def test_a_converted_recipe_of_a_model_that_nobody_knows(here: Run) -> None:
    Path("trl.yaml").write_text(TRL.replace("mistralai/Mistral-7B-v0.1", "a/b"), encoding="utf-8")
    done = here("init", "--from", "trl.yaml", "--output", "r-dpo.yaml")
    assert done.returncode == 0 and "note: not planned: model.name_or_path: a/b is neither a folder nor" in done.stdout
    bad = here("init", "--from", "trl.yaml", "--output", "other.yaml", "--gpu-memory", "much")
    assert bad.returncode == 2 and not Path("other.yaml").exists()
