"""The gates `saved` and `reload`, and `alignctl verify`, on whole runs."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from saved import WEIGHTS, change

from alignctl.errors import AlignctlError, MachineError, Problem
from alignctl.rundir import RunDir, read_json
from alignctl.train import fit, standin, verify
from alignctl.train import model as models
from alignctl.train.gates import Gates

MakeGates = Callable[..., Gates]
Here = Callable[..., subprocess.CompletedProcess[str]]
CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    corpus = folder / "corpus.txt"
    corpus.write_text("Say tea and rain, bread and stone.\n", encoding="utf-8")
    standin._tokenizer(standin.family("smollm")[0], corpus, folder / "model")
    standin._model(standin.family("smollm")[0], folder / "model")
    return folder / "model"


@contextlib.contextmanager
def in_this_process(run: RunDir) -> Iterator[Any]:
    """Instead of a new process; one that fails says so in its log."""
    process = SimpleNamespace(returncode=0)

    def communicate(text: str) -> None:
        try:
            verify.main(run.path)
        except (SystemExit, AlignctlError) as ended:
            process.returncode = ended.code if isinstance(ended, SystemExit) else 1
            (run / "logs" / "reload.log").write_text(f"{ended}\n", encoding="utf-8")

    process.communicate = communicate
    yield process


@pytest.fixture
def train(tiny: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The folder of a finished run on six pairs, of which the first is long; what is a new process runs in this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "begin", in_this_process)
    rows = [
        {"prompt": f"Say {i}." * (1 + 60 * (i == 0)), "chosen": f"tea {i}", "rejected": f"rain {i}"} for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def build(method: str = "dpo", folder: str = "run", *options: str, **sections: Any) -> Path:
        values: dict[str, Any] = {
            "model": {"name_or_path": str(tiny), "dtype": "float32"},
            "lora": {"r": 4},
            "data": {"train": [{"path": "rows.jsonl", **({"answer": "chosen"} if method == "sft" else {})}]},
            "training": {"learning_rate": 5e-4, "max_steps": 2, "lr_scheduler_type": "constant"},
            method: {},
            "evaluation": {"samples": 0},
        }
        for name, section in sections.items():
            values[name] = None if section is None else {**values.get(name, {}), **section}
        text = yaml.safe_dump({name: section for name, section in values.items() if section is not None})
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        done = here(method, "r.yaml", "--output", folder, *options)
        assert done.returncode == 0, done.stderr
        return tmp_path / folder

    return build


def results(folder: Path) -> dict[str, Any]:
    """What run.json says of the gates; the base that was loaded again is the one of training."""
    record = read_json(folder / "run.json")
    if (folder / "logs" / "reloaded.json").exists():
        again = read_json(folder / "logs" / "reloaded.json")["base_fingerprint"]
        assert again == record["model"]["base_fingerprint"]
    return dict(record["gates"])


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_notes_and_loads_four_rows(train: Callable[..., Path], method: str) -> None:
    folder = train(method)
    live, found = (read_json(folder / "logs" / f"{name}.json") for name in ("live", "reloaded"))
    assert len(live["ids"]) == 4 and len(live["ids"][0]) == 256 > len(live["ids"][1]) and live["dtype"] == "float32"
    assert [len(row) for row in live["logps"]] == [len(ids) - 1 for ids in live["ids"]]
    assert verify._worst(found["logps"], live["logps"]) <= 1e-4 < verify._worst(found["base"], live["logps"])
    assert results(folder)["saved"]["value"] == 28 and results(folder)["reload"]["verdict"] == "passed"


def test_all_weights(train: Callable[..., Path]) -> None:
    folder = train(lora=None, training={"learning_rate": 1e-5})
    assert results(folder)["reload"]["value"] <= 1e-4 and (folder / "model" / "model.safetensors").is_file()


def test_of_all_weights_the_base_is_gone_when_the_saved_ones_are_loaded(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(lora=None, training={"learning_rate": 1e-5})
    real, loaded, alive = models.load_base, [], []

    def load(*given: Any) -> Any:
        alive.append([each() is not None for each in loaded])
        model = real(*given)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_base", load)
    verify.main(folder)
    assert alive == [[], [False]]


def test_a_run_that_goes_on_from_another(train: Callable[..., Path]) -> None:
    parent = train("sft", "parent")
    folder = train("dpo", "child", lora=None, model={"adapter": str(parent)})
    assert results(folder)["reload"]["value"] <= 1e-4


def test_4_bits(train: Callable[..., Path]) -> None:
    folder = train(model={"dtype": "bfloat16"}, quantization={})
    assert results(folder)["reload"]["verdict"] == "passed" and results(folder)["reload"]["limit"] == 5e-2


def test_verify_asks_again(train: Callable[..., Path], here: Here) -> None:
    folder = train()
    done = here("verify", "run")
    assert done.returncode == 0 and "gate.saved" in done.stdout and "gate.reload" in done.stdout, done.stderr
    assert read_json(folder / "run.json")["status"] == "finished"


def test_verify_finds_what_was_changed_since(train: Callable[..., Path], here: Here) -> None:
    """And is content when it is put right."""
    folder = train()
    weights = load_file(folder / "model" / WEIGHTS)
    changed = {name: tensor * 3 if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(changed, folder / "model" / WEIGHTS)
    done = here("verify", "run")
    assert done.returncode == 6 and "gate.reload: loaded in a new process, log-probabilities differ" in done.stderr
    record = read_json(folder / "run.json")
    assert record["status"] == "failed" and record["gates"]["reload"]["verdict"] == "stopped"
    save_file(weights, folder / "model" / WEIGHTS)
    gc.collect()  # a process of its own would have let go of the folder
    done = here("verify", "run")
    assert (done.returncode, read_json(folder / "run.json")["status"]) == (0, "finished"), done.stderr


@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_way_out_of_what_was_changed_since(train: Callable[..., Path], here: Here, checkpoints: bool) -> None:
    folder = train()
    change(RunDir(folder), sorted(load_file(folder / "model" / WEIGHTS))[0], torch.full((4, 64), math.nan))
    if not checkpoints:
        shutil.rmtree(folder / "checkpoints")
    for _ in range(2):
        done = here("verify", "run")
        how = "--resume, from step-2" if checkpoints else "--overwrite"
        assert done.returncode == 6 and f"put it back as it was when the run finished, or train again with {how}" in (
            done.stderr.strip()
        )
        gc.collect()  # a process of its own would have let go of the folder
    assert "finished" not in verify._mended(RunDir(folder.parent / "another"), "report it")


def test_verify_finishes_a_run_that_had_no_memory_for_it(
    train: Callable[..., Path], here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run: RunDir, gates: Gates, process: Any) -> None:
        raise MachineError(Problem("memory", "there is not enough"))

    with monkeypatch.context() as small, pytest.raises(AssertionError, match="there is not enough"):
        small.setattr(verify, "reload", full)
        train()
    folder = Path("run")
    assert read_json(folder / "run.json")["status"] == "failed"
    done = here("verify", "run")
    assert (done.returncode, read_json(folder / "run.json")["status"]) == (0, "finished"), done.stderr
    gc.collect()  # a process of its own would have let go of the folder
    RunDir(folder).update(status="failed")  # by something that has nothing to do with the saved model
    assert (here("verify", "run").returncode, read_json(folder / "run.json")["status"]) == (0, "failed")


def test_verify_finds_another_base(train: Callable[..., Path], here: Here, tiny: Path, tmp_path: Path) -> None:
    """The adapter fits, and what it is put on is another model."""
    mine = tmp_path / "base"
    shutil.copytree(tiny, mine)
    train(model={"name_or_path": str(mine)})
    weights = load_file(mine / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, mine / "model.safetensors", {"format": "pt"})
    done = here("verify", "run")
    assert done.returncode == 4 and "the base has other weights than it had in training" in done.stderr
    assert read_json(tmp_path / "run" / "run.json")["status"] == "finished"


def test_verify_leaves_what_the_run_found(train: Callable[..., Path], here: Here) -> None:
    folder = train()
    before = results(folder)
    assert len(before) > 10 and here("verify", "run").returncode == 0
    assert results(folder).keys() == before.keys()


def test_verify_answers_what_the_run_left_out(train: Callable[..., Path], here: Here) -> None:
    folder = train(gates={"reload": False})
    assert results(folder)["reload"]["verdict"] == "off" and here("verify", "run").returncode == 0
    assert results(folder)["reload"]["verdict"] == "passed"


@pytest.mark.parametrize("whole", [False, True])
def test_a_smoke_run_cannot_be_verified(train: Callable[..., Path], here: Here, whole: bool) -> None:
    folder = train("dpo", "smoke", "--smoke")
    done = here("verify", str(folder) if whole else "./smoke")
    assert (done.returncode, read_json(folder / "run.json")["status"]) == (2, "finished")
    assert "was a smoke run" in done.stderr


@pytest.mark.parametrize("left", ["a folder without weights", "nothing"])
def test_a_base_that_is_gone(train: Callable[..., Path], tiny: Path, tmp_path: Path, left: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    folder = train(model={"name_or_path": str(base)})
    (base / "model.safetensors").unlink()
    if left == "nothing":
        shutil.rmtree(base)
    with pytest.raises(SystemExit) as ended:
        verify.main(folder)
    assert ended.value.code == verify.NO_BASE


def test_the_optimizer_is_gone_when_the_model_is_loaded_again(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, kept = fit.check_saved, []

    def check(job: Any, process: Any) -> None:
        optimizer = weakref.ref(job.trainer.optimizer.optimizer)

        def look(*given: Any) -> None:
            gc.collect()
            kept.append(optimizer())

        monkeypatch.setattr(verify, "reload", look)
        real(job, process)

    monkeypatch.setattr(fit, "check_saved", check)
    train()
    assert kept == [None]
