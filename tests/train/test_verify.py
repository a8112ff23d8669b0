"""Is the saved model the trained one: what is on the disk, and what it computes when it is loaded again."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from alignctl.errors import AlignctlError, MachineError, Problem, VerifyError
from alignctl.recipe import catalog
from alignctl.rundir import RunDir, read_json, write_json
from alignctl.train import fit, standin, verify
from alignctl.train import model as models
from alignctl.train.gates import Gates, Result
from alignctl.train.tokenizer import text_hash

MakeGates = Callable[..., Gates]
Here = Callable[..., subprocess.CompletedProcess[str]]
WEIGHTS = "adapter_model.safetensors"
CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"


def stopped(gate: Callable[..., None], run: RunDir, gates: Gates, *given: Any, said: str) -> Result:
    """What `gate` left when it ended the run saying `said`."""
    with pytest.raises(VerifyError, match=said) as error:
        gate(run, gates, *given)
    name = {"scan": "saved", "reload": "reload"}[gate.__name__]
    found = gates.results[name]
    assert error.value.exit_code == 6 and str(error.value).startswith(f"gate.{name}: {found.said} — ")
    assert found.verdict == "stopped" and read_json(run / "run.json")["gates"][name]["verdict"] == "stopped"
    return found


# --- saved --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, make_tokenizer: Callable[[str], Any]) -> RunDir:
    """A run that has saved an adapter of two layers, a tokenizer, and what generation stops at."""
    tokenizer, folder = make_tokenizer("smollm"), tmp_path / "model"
    tokenizer.chat_template = catalog.template("chatml")
    tokenizer.save_pretrained(folder)
    weights = {f"{layer}.lora_{half}.weight": torch.ones(4, 2) for layer in "qv" for half in "AB"}
    save_file(weights, folder / WEIGHTS)
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 7]})
    (tmp_path / "logs").mkdir()
    write_json(
        tmp_path / "logs" / "live.json", {"stop_ids": [1, 7], "logps": [[-1.0, -2.0], [-3.0]], "dtype": "float32"}
    )
    template = {"name": "chatml", "sha256": text_hash(tokenizer.chat_template)}
    write_json(tmp_path / "run.json", {"template": template, "model": {"base_fingerprint": "b"}})
    return RunDir(tmp_path)


def change(run: RunDir, name: str, values: torch.Tensor) -> None:
    """Change one saved tensor."""
    save_file(load_file(run / "model" / WEIGHTS) | {name: values}, run / "model" / WEIGHTS)


def test_a_whole_model(run: RunDir, make_gates: MakeGates) -> None:
    gates = make_gates()
    verify.scan(run, gates)
    assert gates.results["saved"] == Result("passed", "4 tensors, all finite; template and stop tokens are there", 4)


def test_no_weights(run: RunDir, make_gates: MakeGates) -> None:
    (run / "model" / WEIGHTS).unlink()
    stopped(verify.scan, run, make_gates(), said=r"model holds no weights \(\.safetensors\) — .*--resume")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite(run: RunDir, make_gates: MakeGates, value: float) -> None:
    values = torch.ones(4, 2)
    values[3, 1] = value
    change(run, "v.lora_A.weight", values)
    stopped(verify.scan, run, make_gates(), said=rf"v\.lora_A\.weight in {WEIGHTS} holds values that are not finite")


def test_every_file_is_read(run: RunDir, make_gates: MakeGates) -> None:
    save_file({"more": torch.ones(2)}, run / "model" / "model-00002.safetensors")
    gates = make_gates()
    verify.scan(run, gates)
    assert gates.results["saved"].value == 5
    save_file({"more": torch.tensor([1.0, math.nan])}, run / "model" / "model-00002.safetensors")
    stopped(verify.scan, run, gates, said=r"more in model-00002\.safetensors")


def test_an_adapter_that_changes_nothing(run: RunDir, make_gates: MakeGates) -> None:
    """Only B counts: with A at 0 no gradient would have moved B."""
    gates = make_gates()
    change(run, "v.lora_A.weight", torch.zeros(4, 2))
    verify.scan(run, gates)
    change(run, "v.lora_B.weight", torch.zeros(4, 2))
    found = stopped(verify.scan, run, gates, said="1 adapter is all zero: ")
    assert (found.value, found.limit) == (1, 0)
    change(run, "q.lora_B.weight", torch.zeros(4, 2))
    assert stopped(verify.scan, run, make_gates(), said="2 adapters are all zero: ").value == 2


@pytest.mark.parametrize("kept", [0, 20, 200])
def test_a_file_that_cannot_be_read(run: RunDir, make_gates: MakeGates, kept: int) -> None:
    file = run / "model" / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    stopped(verify.scan, run, make_gates(), said=rf"{WEIGHTS} cannot be read: ")


def test_another_template(run: RunDir, make_gates: MakeGates) -> None:
    file = run / "model" / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    stopped(verify.scan, run, make_gates(), said="chat template is not the one that was trained with")
    file.unlink()
    stopped(verify.scan, run, make_gates(), said="chat template is not the one that was trained with")


@pytest.mark.parametrize(
    ("config", "missing"),
    [({"eos_token_id": [1]}, r"\[7\]"), ({"eos_token_id": 7}, r"\[1\]"), ({}, r"\[1, 7\]"), (None, r"\[1, 7\]")],
)
def test_a_stop_token_is_missing(
    run: RunDir, make_gates: MakeGates, config: dict[str, Any] | None, missing: str
) -> None:
    file = run / "model" / "generation_config.json"
    file.unlink()
    if config is not None:
        write_json(file, config)
    stopped(verify.scan, run, make_gates(), said=rf"lacks the stop tokens {missing}: answers would not end")


def test_one_stop_token_needs_no_list(run: RunDir, make_gates: MakeGates) -> None:
    write_json(run / "logs" / "live.json", {"stop_ids": [7]})
    write_json(run / "model" / "generation_config.json", {"eos_token_id": 7})
    verify.scan(run, make_gates())


def test_no_tokenizer(run: RunDir, make_gates: MakeGates) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / "model" / name).unlink()
    stopped(verify.scan, run, make_gates(), said="the tokenizer cannot be loaded: ")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_cut_short(run: RunDir, make_gates: MakeGates, name: str) -> None:
    file = run / "model" / name
    file.write_bytes(file.read_bytes()[:-9])
    stopped(verify.scan, run, make_gates(), said="the tokenizer cannot be loaded: ")


def test_a_tokenizer_of_another_kind(run: RunDir, make_gates: MakeGates) -> None:
    """Sound JSON, and nothing that the tokenizers library reads."""
    (run / "model" / "tokenizer.json").write_text('{"model": {}, "added_tokens": []}', encoding="utf-8")
    stopped(verify.scan, run, make_gates(), said="the tokenizer cannot be loaded: ")


def test_a_generation_config_that_is_cut_short(run: RunDir, make_gates: MakeGates) -> None:
    file = run / "model" / "generation_config.json"
    file.write_bytes(file.read_bytes()[:-9])
    stopped(verify.scan, run, make_gates(), said=r"generation_config\.json")


# --- reload: what is compared -------------------------------------------------------------------------------------


def process(run: RunDir, found: dict[str, Any] | None = None, *, code: int = 0, log: str = "") -> Any:
    """A process that writes `found` and `log` when it is told to go."""
    (run / "logs" / "reload.log").touch()

    def communicate(text: str) -> None:
        assert text == "go\n"
        (run / "logs" / "reload.log").write_text(log, encoding="utf-8")
        if found is not None:
            write_json(run / "logs" / "reloaded.json", {"base_fingerprint": "b", **found})

    return SimpleNamespace(communicate=communicate, returncode=code)


BASE = [[-1.0, -2.5], [-3.0]]


def test_the_same_model(run: RunDir, make_gates: MakeGates) -> None:
    gates = make_gates()
    verify.reload(run, gates, process(run, {"logps": [[-1.0, -2.0], [-3.0005]], "base": BASE}))
    found = gates.results["reload"]
    assert found.verdict == "passed" and found.value == pytest.approx(5e-4) and found.limit == 1e-3
    assert found.said.endswith("log-probabilities differ by 5.0e-04 a token at most, the base's by 5.0e-01")


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 5e-2), ("float16", 2e-2)])
def test_another_model(run: RunDir, make_gates: MakeGates, dtype: str, limit: float) -> None:
    write_json(run / "logs" / "live.json", read_json(run / "logs" / "live.json") | {"dtype": dtype})
    gates = make_gates()
    verify.reload(run, gates, process(run, {"logps": [[-1.0, -2.0 + 0.9 * limit], [-3.0]], "base": BASE}))
    other = process(run, {"logps": [[-1.0, -2.0 - 1.1 * limit], [-3.0]], "base": BASE})
    found = stopped(verify.reload, run, gates, other, said="loaded in a new process, log-probabilities differ by")
    assert found.value == pytest.approx(1.1 * limit) and found.limit == limit


@pytest.mark.parametrize(
    "planted", [[[math.nan, -2.0], [-3.0]], [[-1.0, math.nan], [-3.0]], [[-1.0, -2.0], [math.nan]]]
)
def test_what_is_not_a_number_is_another_model(run: RunDir, make_gates: MakeGates, planted: list[list[float]]) -> None:
    other = process(run, {"logps": planted, "base": BASE})
    stopped(verify.reload, run, make_gates(), other, said="differ by nan a token")


@pytest.mark.parametrize("apart", [0.0, 5e-4])
def test_the_base_again(run: RunDir, make_gates: MakeGates, apart: float) -> None:
    same = [[-1.0, -2.0 - apart], [-3.0]]
    other = process(run, {"logps": same, "base": same})
    found = stopped(verify.reload, run, make_gates(), other, said="the saved model is as good as the base — a higher")
    assert found.value == found.limit == pytest.approx(apart)


@pytest.mark.parametrize(
    ("log", "last"),
    [
        ("Traceback\n  line\nOSError: no file named config.json\n\n", "OSError: no file named config.json"),
        ("", "it said nothing"),
    ],
)
def test_a_model_that_cannot_be_loaded(run: RunDir, make_gates: MakeGates, log: str, last: str) -> None:
    other = process(run, code=1, log=log)
    stopped(verify.reload, run, make_gates(), other, said=f"the saved model cannot be loaded: {last} — ")


def test_a_base_that_cannot_be_loaded_is_no_fault_of_the_model(run: RunDir, make_gates: MakeGates) -> None:
    gates = make_gates()
    with pytest.raises(MachineError, match=r"model\.name_or_path: the base cannot be loaded: gone") as error:
        verify.reload(run, gates, process(run, code=verify.NO_BASE, log="gone"))
    assert error.value.exit_code == 4 and "reload" not in gates.results


def test_another_base_is_no_fault_of_the_model(run: RunDir, make_gates: MakeGates) -> None:
    gates = make_gates()
    other = {"logps": [[-1.0, -2.5], [-3.0]], "base": BASE, "base_fingerprint": "c"}
    with pytest.raises(MachineError, match="the base has other weights than it had in training"):
        verify.reload(run, gates, process(run, other))
    assert "reload" not in gates.results
    verify.reload(run, gates, process(run, other | {"logps": [[-1.0, -2.0], [-3.0]]}))
    assert gates.results["reload"].verdict == "passed"


@pytest.mark.parametrize(
    ("code", "log", "why"),
    [
        (verify.NO_MEMORY, "CUDA out of memory. Tried to allocate 2.00 GiB.", "a second time: CUDA out of memory"),
        (-9, "Warning: something else", "a second time: the system killed the process that did so"),
    ],
)
def test_no_memory_for_it_is_no_fault_of_the_model(
    run: RunDir, make_gates: MakeGates, code: int, log: str, why: str
) -> None:
    gates = make_gates()
    with pytest.raises(MachineError, match=rf"memory: .* {why}.* — alignctl verify ") as error:
        verify.reload(run, gates, process(run, code=code, log=log))
    assert error.value.exit_code == 4 and "reload" not in gates.results


@pytest.mark.parametrize("error", [RuntimeError(f"x. {CPU}"), MemoryError(), torch.OutOfMemoryError("CUDA: none")])
def test_the_process_says_that_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(verify, "main", lambda folder: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as ended:
        verify.run(Path())
    assert ended.value.code == verify.NO_MEMORY and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(verify, "main", lambda folder: (_ for _ in ()).throw(RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        verify.run(Path())


def test_the_process_waits_until_it_is_asked(run: RunDir) -> None:
    """It ends by itself when nobody asks."""
    with verify.begin(run) as waiting:
        assert waiting.args == [sys.executable, "-m", "alignctl.train.verify", str(run.path)]
        waiting.stdin.close()
        assert waiting.wait(60) == 0
    assert not (run / "logs" / "reloaded.json").exists()


# --- reload: what is computed -------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Over four tokens, the next one is certain to be the token after, or each is as likely."""

    device = torch.device("cpu")

    def __init__(self, certain: float) -> None:
        super().__init__()
        self.certain, self.dropout = certain, nn.Dropout(0.9)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not self.training and not use_cache
        logits = self.dropout(torch.zeros(*input_ids.shape, 4))
        return SimpleNamespace(logits=logits.scatter(2, (input_ids[..., None] + 1) % 4, self.certain))


def test_log_probabilities_by_hand() -> None:
    model: Any = Fixed(0.0).train()
    found = verify.token_logps(model, [[0, 1, 2], [3, 3]], torch.float32)
    assert found == [[pytest.approx(-math.log(4))] * 2, [pytest.approx(-math.log(4))]] and model.training
    model = Fixed(math.log(5)).eval()
    right, wrong = pytest.approx(math.log(5 / 8)), pytest.approx(math.log(1 / 8))
    assert verify.token_logps(model, [[0, 1, 3, 0]], torch.float32) == [[right, wrong, right]] and not model.training


# --- whole runs ---------------------------------------------------------------------------------------------------


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
