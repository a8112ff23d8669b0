"""The benchmarks that compare with TRL's own trainers, in their smallest form; their figures mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import LlamaConfig, LlamaForCausalLM

from alignctl.recipe.schema import Recipe
from alignctl.train import standin

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark on one thread, without a hub and without a GPU."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables.pop("PYTHONSAFEPATH", None)  # a script finds what lies beside it
    command = [sys.executable, str(FOLDER / name), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    return gpu


@pytest.mark.slow
def test_pairs(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "data": {"train": [{"path": "none"}]},
        "training": {"learning_rate": 1e-4},
        "orpo": {},
    }
    standin.stand_in(Recipe.model_validate(values), tmp_path)
    file = tmp_path / "out.json"
    options = ["--method", "orpo", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "train.jsonl")]
    done = run("pairs.py", *options, "--batch-size", "2", "--steps", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert {"command", "date", "machine", "versions", "settings"} <= found.keys()
    assert [set(step) for step in found["steps"]] == [{"trl", "ours"}] * 2
    least, most = found["ratio_span"]
    assert 0 < least <= found["ratio"] <= most
    assert found["share_reached"] == pytest.approx(found["ratio"] / found["predicted_ratio"])
    assert found["predicted_ratio"] > 1.1 and found["cpu_ratio"] > 0
    for engine in ("trl", "ours"):
        assert found["memory_mib"]["peak"][engine] > found["memory_mib"]["above_model"][engine] > 0
    assert found["loss_difference"] < 1e-4
    assert f"{found['ratio']:.2f} (" in done.stdout and found["machine"] in done.stdout


def test_gpu_grid(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = run("gpu.py", "--tiny", "--method", "dpo", "--batch", "1,2", "--length", "24", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert [(at["batch"], at["length"]) for at in found["cells"]] == [(1, 24), (2, 24)]
    for at in found["cells"]:
        assert at["trl"]["result"] == at["ours"]["result"] == "ok"
        assert at["trl"]["tokens"] == 2 * at["batch"] * at["length"] > at["ours"]["tokens"]
        assert at["loss_difference"] < 1e-4 and at["ratio"] > 0
        assert len(set(at["ours"]["losses"])) > 1
    assert len(done.stdout.strip().splitlines()) == 6


@pytest.fixture
def grid(gpu: ModuleType) -> ModuleType:
    """benchmarks/grid.py as a module."""
    import grid

    return grid


def test_plan_and_measured_grid(
    tmp_path: Path, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut into calls; on a CPU nothing is measured."""
    file = tmp_path / "grid.json"

    def call(*more: str) -> str:
        given = ["--grid", "--tiny", "--length", "24", "--model", "phi-2", "--recompute", "on", "--json", str(file)]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *given, *more])
        gpu.main()
        return capsys.readouterr().out

    assert "out of time with 3 cells left" in call("--batch", "2", "--minutes", "0")
    call("--batch", "2", "--method", "sft")
    out = call("--batch", "1,2")
    cells = json.loads(file.read_text())["cells"]
    wanted = [("sft", 2), ("sft", 1), *((method, batch) for method in ("dpo", "orpo") for batch in (1, 2))]
    assert [(at["method"], at["batch"]) for at in cells] == wanted
    for at in cells:
        assert at["result"] == "ok" and at["planned_gib"] > 0 and at["tokens"][0] == at["tokens"][1]
        assert sum(line["bytes"] for line in at["lines"]) == pytest.approx(at["planned_gib"] * 2**30)
    assert out.count("| no GPU | no GPU | no GPU |") == 6 and "out of time" not in out


def test_a_cell_beside_its_plan(grid: ModuleType, gpu: ModuleType) -> None:
    args = Namespace(method="dpo", tiny=False, model="phi-2", prompt_share=0.5, shortest=0.25)
    kind, sizes = gpu.MODELS["phi-2"]
    rows = grid.rows_of(2, 64, args)
    plan = grid.planned(gpu.recipe_of(args, Path("none")), kind(**sizes).to_dict(), rows, args)
    assert plan.setup.trains == "adapter on 4 bits" and plan.shape.parameters() == 2_779_683_840
    assert plan.batch.tokens == sum(len(ids) for row in rows for ids in row.values())
    peak = {"before": 0, "allocated": plan.memory.allocated / 2**20 / 1.25, "reserved": 4096}
    at = {"model": "phi-2", "method": "dpo", "checkpointing": True, "length": 64, "batch": 2}
    full = at | grid.compared(plan, {"result": "ok", "peak_mib": peak})
    assert full["ratio"] == pytest.approx(1.25)
    text = grid.table([full, at | grid.compared(plan, {"result": "OOM"})])
    assert "| 4.00 | 1.25 |" in text and "| out of memory | out of memory | out of memory |" in text
    assert "1 cells measured, ratios from 1.25 to 1.25" in text


def test_gpu_needs_cuda() -> None:
    done = run("gpu.py")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (4, "no CUDA device here")


def test_what_does_not_fit_is_a_cell(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu.pairs, "update", update)
    monkeypatch.setattr(gpu, "fresh", lambda *_: None)

    class Stub:
        class args:  # noqa: N801
            device = torch.device("cpu")

    out = gpu.cell(Stub(), {}, [])
    assert out == {"result": "OOM"}
    assert gpu.compared({"trl": out, "ours": {"result": "ok"}}) == {}
    assert "| OOM | OOM |" in gpu.table([{"batch": 8, "length": 2048, "trl": out, "ours": out}])


def test_every_layer_but_the_head_is_in_4_bits(gpu: ModuleType) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).bfloat16()
    ids = torch.arange(12)[None]
    before = model(ids).logits
    gpu.quantise(model)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 7 and model.lm_head not in layers
    assert all(layer.weight.quant_state.nested and layer.weight.quant_type == "nf4" for layer in layers)
    assert torch.nn.functional.cosine_similarity(before, model(ids).logits, dim=-1).min() > 0.9
