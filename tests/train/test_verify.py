"""Is the saved model the trained one: what is on the disk, and what it computes when it is loaded again."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from saved import WEIGHTS, change
from torch import nn

from alignctl.errors import MachineError, VerifyError
from alignctl.recipe import catalog
from alignctl.rundir import RunDir, read_json, write_json
from alignctl.train import verify
from alignctl.train.gates import Gates, Result
from alignctl.train.tokenizer import text_hash

MakeGates = Callable[..., Gates]
Here = Callable[..., subprocess.CompletedProcess[str]]
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
