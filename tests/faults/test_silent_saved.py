"""Silent faults of what is saved (35, 36), planted in a real run and behind its back; and what a run only notes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from alignctl.rundir import RunDir
from alignctl.train import fit, verify
from alignctl.train import model as models

Train = Callable[..., Any]
Here = Callable[..., Any]
Weights = dict[str, Tensor]

MODEL = Path("run") / "model"
ADAPTER = MODEL / "adapter_model.safetensors"


def record(folder: str = "run") -> dict[str, Any]:
    return dict(json.loads((Path(folder) / "run.json").read_text(encoding="utf-8")))


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- what happens to the saved files ------------------------------------------------------------------------------


def reweighted(change: Callable[[Weights], Weights]) -> Callable[[], None]:
    return lambda: save_file(change(load_file(ADAPTER)), ADAPTER, metadata={"format": "pt"})


def rewritten(name: str, **values: object) -> Callable[[], None]:
    """Other values in a JSON file of the saved model."""

    def change() -> None:
        found = json.loads((MODEL / name).read_text(encoding="utf-8"))
        (MODEL / name).write_text(json.dumps(found | values), encoding="utf-8")

    return change


def truncated() -> None:
    content = ADAPTER.read_bytes()
    ADAPTER.write_bytes(content[: len(content) // 2])


def with_nan(weights: Weights) -> Weights:
    last = sorted(weights)[-1]
    weights[last].view(-1)[-1] = float("nan")
    return weights


def zeroed(weights: Weights) -> Weights:
    return {name: 0 * tensor if "lora_B" in name else tensor for name, tensor in weights.items()}


def replaced(weights: Weights) -> Weights:
    torch.manual_seed(0)
    return {name: 0.05 * torch.randn_like(tensor) for name, tensor in weights.items()}


def renamed(weights: Weights) -> Weights:
    """No name is one that PEFT looks for: it says so in a warning, and leaves the adapter at its start."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}


def one_lacks(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if "0.mlp.up_proj.lora_B" not in name}


# What the files alone show.
SEEN: dict[str, tuple[Callable[[], object], str]] = {
    "NaN": (reweighted(with_nan), "lora_B.weight in adapter_model.safetensors holds values that are not finite"),
    "adapters of zeros": (reweighted(zeroed), "14 adapters are all zero: they change nothing"),
    "no weights": (lambda: ADAPTER.unlink(), "holds no weights (.safetensors)"),
    "half the weights": (truncated, "adapter_model.safetensors cannot be read: "),
    "an empty file": (lambda: ADAPTER.write_bytes(b""), "adapter_model.safetensors cannot be read: "),
    "no template": (lambda: (MODEL / "chat_template.jinja").unlink(), "chat template is not the one that was trained"),
    "another template": (
        lambda: (MODEL / "chat_template.jinja").write_text("{{ messages }}"),
        "chat template is not the one that was trained with",
    ),
    "another stop token": (rewritten("generation_config.json", eos_token_id=0), "lacks the stop tokens [1]"),
    "no stop tokens": (lambda: (MODEL / "generation_config.json").unlink(), "answers would not end"),
    "another base": (
        rewritten("adapter_config.json", base_model_name_or_path="org/other"),
        "adapter_config.json names org/other as the base, and ",
    ),
    "no base": (rewritten("adapter_config.json", base_model_name_or_path=None), "names None as the base, and "),
    "no tokenizer": (lambda: (MODEL / "tokenizer.json").unlink(), "the tokenizer cannot be loaded: "),
}
# What shows only when the model is loaded and computes.
HIDDEN: dict[str, tuple[Callable[[], object], str]] = {
    "other weights": (reweighted(replaced), "log-probabilities differ by"),
    "other names": (reweighted(renamed), "log-probabilities differ by"),
    "a tensor too few": (reweighted(one_lacks), "log-probabilities differ by"),
    "another scale": (rewritten("adapter_config.json", lora_alpha=64), "log-probabilities differ by"),
    "another rank": (rewritten("adapter_config.json", r=8), "the saved model cannot be loaded: size mismatch"),
    "no config": (lambda: (MODEL / "adapter_config.json").unlink(), "the saved model cannot be loaded: "),
}


def saves(monkeypatch: pytest.MonkeyPatch, fault: Callable[[], object]) -> None:
    """Let a fault befall what a run has just saved."""
    save = fit.save

    def faulty(job: Any) -> None:
        save(job)
        fault()

    monkeypatch.setattr(fit, "save", faulty)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved model is loaded in this process, where everything is imported already."""

    def begin(run: RunDir) -> contextlib.nullcontext[SimpleNamespace]:
        def communicate(word: str) -> None:
            try:
                verify.main(run.path)
            except (OSError, RuntimeError, ValueError):
                (run / "logs" / "reload.log").write_text(traceback.format_exc(), encoding="utf-8")
                process.returncode = 1

        process = SimpleNamespace(communicate=communicate, returncode=0)
        return contextlib.nullcontext(process)

    monkeypatch.setattr(verify, "begin", begin)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", SEEN)
def test_what_the_files_show(train: Train, here: Here, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    what, said = SEEN[fault]
    saves(monkeypatch, what)
    ran = train()
    assert ran.code == 6 and ran.verdict("saved") == "stopped" and "gate.saved: " in ran.err and said in ran.err
    assert ran.record["status"] == "failed" and said in ran.record["why"] and " — " in ran.record["why"]
    off = train("dpo", None, "--overwrite", gates={"saved": False})
    assert off.code == 0 and off.verdict("saved") == "off" and off.record["status"] == "finished"
    done = here("verify", "run")
    assert done.returncode == 6 and "gate.saved: " in done.stderr and said in done.stderr
    assert record()["gates"]["saved"]["verdict"] == "stopped"
    assert record()["status"] == "failed" and said in record()["why"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", HIDDEN)
def test_what_only_loading_shows(train: Train, here: Here, fault: str) -> None:
    what, said = HIDDEN[fault]
    assert train().code == 0 and record()["status"] == "finished"
    what()
    done = here("verify", "run")
    assert done.returncode == 6 and "gate.reload: " in done.stderr and said in " ".join(done.stderr.split())
    assert record()["gates"]["reload"]["verdict"] == "stopped" and record()["gates"]["saved"]["verdict"] == "passed"
    assert record()["status"] == "failed" and "gate.reload: " in record()["why"]


def test_a_model_that_was_mended_is_verified(train: Train, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own."""
    saves(monkeypatch, lambda: ADAPTER.rename("elsewhere"))
    assert train().code == 6 and record()["status"] == "failed"
    Path("elsewhere").rename(ADAPTER)
    done = here("verify", "run")
    assert done.returncode == 0 and "gate.saved" in done.stdout, done.stderr
    assert record()["status"] == "finished" and not record()["why"]


@pytest.mark.usefixtures("quick")
def test_a_model_that_was_lost_is_made_again(train: Train, here: Here) -> None:
    """By the way out that the gate names."""
    first = train()
    before = load_file(ADAPTER)
    ADAPTER.unlink()
    done = here("verify", "run")
    assert first.code == 0 and done.returncode == 6 and "train again with --resume" in done.stderr
    ran = train("dpo", None, "--resume")
    assert ran.code == 0 and ran.record["status"] == "finished", ran.err
    after = load_file(ADAPTER)
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


# 35: the adapter is on the wrong base, or nobody applies it.


def test_an_adapter_that_nobody_applies(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    saves(monkeypatch, reweighted(renamed))
    ran = train(gates={"reload": True})
    assert ran.code == 6 and ran.verdict("saved") == "passed" and ran.verdict("reload") == "stopped"
    found = ran.record["gates"]["reload"]
    assert found["value"] > 10 * found["limit"] and ran.record["status"] == "failed"
    away, base = (part.split()[0] for part in found["said"].split(" by ")[1:])
    assert away == base  # what was loaded is the base
    assert train("dpo", None, "--overwrite").code == 0 and record()["status"] == "finished"


@pytest.mark.usefixtures("quick")
def test_an_adapter_that_has_learned_nothing(train: Train) -> None:
    low = {"learning_rate": 1e-12}
    ran = train(training=low, gates={"reload": True})
    assert ran.code == 6 and ran.verdict("reload") == "stopped"
    assert "the saved model is as good as the base — a higher learning rate, or more steps" in ran.err
    assert train("dpo", None, "--overwrite", training=low).code == 0


def changed_base(folder: Path) -> None:
    """The weights that stand in `folder` are others now, such as of a later revision."""
    weights = load_file(folder / "model.safetensors")
    changed = {name: 1.1 * tensor for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, which may be changed."""
    return shutil.copytree(tiny, tmp_path / "base")


def test_an_adapter_names_the_base_that_it_is_on(train: Train, base: Path, tmp_path: Path) -> None:
    """Not the place where the one that it goes on from was trained; nor do its checkpoints."""
    assert train("sft", folder="parent", model={"name_or_path": str(base)}).code == 0
    moved = base.rename(tmp_path / "moved")
    child: dict[str, Any] = {"model": {"name_or_path": str(moved), "adapter": "parent"}, "lora": None}
    ran = train(training={"save_steps": 4}, **child)
    assert ran.code == 0 and ran.verdict("saved") == "passed", ran.err
    for folder in (MODEL, Path("run") / "checkpoints" / "step-4"):
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        assert named == str(moved) == record()["model"]["loaded_from"]


def test_an_adapter_keeps_the_name_of_another_base(
    train: Train, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT leaves it."""
    assert train("sft", folder="parent", model={"name_or_path": str(base)}).code == 0
    moved = base.rename(tmp_path / "moved")
    monkeypatch.setattr(models, "name_base", lambda model, recipe: None)
    ran = train(model={"name_or_path": str(moved), "adapter": "parent"}, lora=None)
    assert ran.code == 6 and ran.verdict("saved") == "stopped"
    assert f"adapter_config.json names {base} as the base, and {moved} is what was trained on" in ran.err
    assert f"put base_model_name_or_path back to {moved}" in ran.err


def test_a_smoke_run_goes_on_from_a_stand_in(train: Train) -> None:
    assert train("sft", folder="parent").code == 0
    ran = train("dpo", None, "--smoke", model={"adapter": "parent"}, lora=None)
    assert ran.code == 0 and ran.verdict("parent") == "passed" and "gate.parent" not in ran.err, ran.err
    assert "warning: gate.parent" not in ran.out


def test_training_goes_on_on_another_base(train: Train, base: Path) -> None:
    own: dict[str, Any] = {"model": {"name_or_path": str(base)}}
    assert train("sft", folder="parent", **own).code == 0
    child: dict[str, Any] = {"model": own["model"] | {"adapter": "parent"}, "lora": None}
    assert train(folder="same", **child).record["gates"]["parent"]["verdict"] == "passed"
    changed_base(base)
    ran = train(**child)
    assert ran.code == 5 and ran.verdict("parent") == "stopped"
    assert "gate.parent: parent/model was trained on other weights" in ran.err and "in the same revision" in ran.err
    assert train(gates={"parent": False}, folder="off", **child).code == 0


def test_training_goes_on_from_an_adapter_of_unknown_base(train: Train) -> None:
    assert train("sft", folder="parent").code == 0
    Path("parent/model").rename("alone")
    ran = train(model={"adapter": "alone"}, lora=None)
    assert ran.code == 0 and ran.verdict("parent") == "warned"
    assert "alone has no run.json that says on which weights it was trained" in " ".join(ran.out.split())


def test_training_goes_on_on_a_base_that_is_stored_otherwise(train: Train) -> None:
    assert train("sft", folder="parent").code == 0
    ran = train(model={"adapter": "parent"}, lora=None, quantization={})
    assert ran.code == 0 and ran.verdict("parent") == "warned", ran.err
    said = ran.record["gates"]["parent"]["said"]
    assert "was trained on weights in float32, and is used on weights in nf4" in said


@pytest.mark.usefixtures("quick")
def test_the_base_is_another_one_now(train: Train, here: Here, base: Path) -> None:
    assert train(model={"name_or_path": str(base)}).code == 0
    changed_base(base)
    done = here("verify", "run")
    assert done.returncode == 4 and "the base has other weights" in done.stderr
    assert record()["status"] == "finished"


@pytest.mark.usefixtures("quick")
def test_the_base_is_named_where_it_is_another_one(train: Train, here: Here, base: Path) -> None:
    assert train(model={"name_or_path": str(base)}).code == 0
    changed_base(base)
    said = here("verify", "run").stderr
    assert "other weights" in said and "--resume" not in said


def test_the_base_is_gone(train: Train, here: Here, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matter of the machine: nothing is wrong with what was saved."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train(model={"name_or_path": str(base)}).code == 0
    shutil.rmtree(base)
    done = here("verify", "run")
    assert done.returncode == 4 and "model.name_or_path: the base cannot be loaded: " in done.stderr
    assert record()["status"] == "finished"


@pytest.mark.usefixtures("quick")
def test_all_weights_are_those_of_the_base(train: Train, here: Here, tiny: Path) -> None:
    """Whoever copies the wrong file."""
    assert train(lora=None, training={"learning_rate": 1e-5}).code == 0
    shutil.copy(tiny / "model.safetensors", MODEL / "model.safetensors")
    done = here("verify", "run")
    assert done.returncode == 6 and "gate.reload: " in done.stderr
    away, base = (part.split()[0] for part in record()["gates"]["reload"]["said"].split(" by ")[1:])
    assert away == base


# 36: merging changes the model. Nothing is merged: the base stays, and the adapter is loaded beside it.


def test_nothing_is_merged(train: Train, base: Path) -> None:
    before = digest(base)
    ran = train(model={"name_or_path": str(base)}, gates={"reload": True}, quantization={})
    assert ran.code == 0 and ran.verdict("quantized") == "passed" and ran.verdict("reload") == "passed", ran.err
    assert digest(base) == before
    weights = load_file(ADAPTER)
    assert len(weights) == 28 and all("lora_" in name for name in weights)
    assert not (MODEL / "model.safetensors").exists() and not (MODEL / "config.json").exists()
    config = json.loads((MODEL / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(base)
    apart = ran.record["gates"]["reload"]
    assert apart["value"] <= 1e-4 and float(apart["said"].rsplit(" ", 1)[1]) > 100 * apart["value"]


# What is no fault, but may surprise.


@pytest.fixture
def dropout(monkeypatch: pytest.MonkeyPatch) -> list[set[float]]:
    """The dropout rates in every model that is trained."""
    found: list[set[float]] = []

    def noting(build: Callable[..., Trainer]) -> Callable[..., Trainer]:
        def noted(*given: Any) -> Trainer:
            trainer = build(*given)
            found.append({m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)} - {0.0})
            return trainer

        return noted

    for method, build in list(fit.BUILD.items()):
        monkeypatch.setitem(fit.BUILD, method, noting(build))
    return found


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_dropout_that_trl_switches_off_is_named(train: Train, dropout: list[set[float]], method: str) -> None:
    lora = {"lora_dropout": 0.3}
    ran = train(method, lora=lora)
    said = f"note: lora.lora_dropout is switched off by TRL's {method}; `trl: {{disable_dropout: false}}` keeps it"
    assert ran.code == 0 and said in " ".join(ran.out.split())
    kept = train(method, lora=lora, trl={"disable_dropout": False}, folder="kept")
    assert kept.code == 0 and "lora_dropout" not in kept.out
    assert dropout == [set(), {0.3}]


def test_dropout_of_sft_stays(train: Train, dropout: list[set[float]]) -> None:
    ran = train("sft", lora={"lora_dropout": 0.3})
    assert ran.code == 0 and "lora_dropout" not in ran.out and dropout == [{0.3}]


def test_dropout_of_a_parent_is_named(train: Train, dropout: list[set[float]]) -> None:
    assert train("sft", lora={"lora_dropout": 0.3}, folder="parent").code == 0
    ran = train(model={"adapter": "parent"}, lora=None)
    assert ran.code == 0 and dropout == [{0.3}, set()]
    assert "lora_dropout is switched off" in " ".join(ran.out.split())


def test_padding_free_is_refused(train: Train) -> None:
    ran = train(trl={"padding_free": True})
    assert ran.code == 2 and "trl.padding_free: " in ran.err and "TRL's DPO ignores it" in ran.err


def test_an_accuracy_of_0_at_the_start_is_no_fault(train: Train) -> None:
    """Policy and reference are the same weights: every pair is a tie, which TRL counts as wrong, and we by half."""
    ran = train(data={"eval_fraction": 0.25})
    first = json.loads((ran.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert ran.code == 0 and (first["rewards/accuracies"], first["rewards/margins"]) == (0.0, 0.0)
    assert first["loss"] == pytest.approx(0.6931471805599453)
    summary = json.loads((ran.folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["before"]["reward_accuracy"], summary["before"]["margin"]) == (0.5, 0.0)
    assert {found["verdict"] for found in ran.record["gates"].values()} <= {"passed", "off"}
