"""Nothing runs but what was asked for, nothing is written elsewhere, and nothing secret is written at all."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from alignctl import quiet
from alignctl.cli import training
from alignctl.recipe.load import load
from alignctl.rundir import RunDir
from alignctl.train import card, display, preflight, verify

Train = Callable[..., Any]
Here = Callable[..., subprocess.CompletedProcess[str]]


def complaints(err: str) -> list[str]:
    """What the command itself says on stderr."""
    return [line for line in err.splitlines() if line.startswith("alignctl: ")]


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


# 1: code that a model's repository carries.

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).touch()


class XConfig(LlamaConfig):
    model_type = {kind!r}


class XModel(LlamaForCausalLM):
    config_class = XConfig


class XTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def carrying(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder of a model of the given kind whose code, and that of its tokenizer, leaves the file `ran`."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def made(kind: str) -> Path:
        folder = tmp_path / f"carrying-{kind}"
        shutil.copytree(tiny, folder)
        code = CODE.format(mark=str(tmp_path / "ran"), kind=kind)
        (folder / "modeling_x.py").write_text(code, encoding="utf-8")
        classes = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
        change(folder / "config.json", model_type=kind, architectures=["XModel"], auto_map=classes)
        return folder

    return made


def test_code_of_a_model_does_not_run(train: Train, carrying: Callable[..., Path], tmp_path: Path) -> None:
    ran = train(model={"name_or_path": str(carrying("xkind"))})
    assert ran.code == 2 and not (tmp_path / "ran").exists()
    (said,) = complaints(ran.err)
    assert "Python code" in said and "model.trust_remote_code=true" in said


def test_code_beside_an_architecture_that_transformers_knows_does_not_run(
    train: Train, carrying: Callable[..., Path], tmp_path: Path
) -> None:
    folder = carrying("llama")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_x.XTokenizer"]})
    ran = train(model={"name_or_path": str(folder)})
    assert ran.code == 0 and not (tmp_path / "ran").exists()
    assert ran.record["model"]["trust_remote_code"] is False and "trust_remote_code" not in ran.out
    assert "Python code" not in (ran.folder / "model" / "README.md").read_text(encoding="utf-8")


def test_code_of_a_tokenizer_does_not_run(train: Train, carrying: Callable[..., Path], tmp_path: Path) -> None:
    folder = carrying("llama")
    classes = {"AutoTokenizer": [None, "modeling_x.XTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="XTokenizer", auto_map=classes)
    ran = train(model={"name_or_path": str(folder)})
    assert ran.code == 2 and not (tmp_path / "ran").exists()
    (said,) = complaints(ran.err)
    assert "model.trust_remote_code=true" in said


def test_a_smoke_run_needs_no_code(train: Train, carrying: Callable[..., Path], tmp_path: Path) -> None:
    ran = train("dpo", None, "--smoke", model={"name_or_path": str(carrying("xsmoke"))})
    assert ran.code == 0 and not (tmp_path / "ran").exists()
    assert "stands in, guessed from nothing" in ran.out


def test_code_of_a_tokenizer_that_is_trusted_runs(train: Train, carrying: Callable[..., Path], tmp_path: Path) -> None:
    folder = carrying("llama")
    classes = {"AutoTokenizer": [None, "modeling_x.XTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="XTokenizer", auto_map=classes)
    ran = train(model={"name_or_path": str(folder), "trust_remote_code": True})
    assert ran.code == 0 and (tmp_path / "ran").exists(), ran.err


def test_code_that_is_trusted_runs_and_is_told_of(train: Train, carrying: Callable[..., Path], tmp_path: Path) -> None:
    ran = train(model={"name_or_path": str(carrying("trusted")), "trust_remote_code": True})
    assert ran.code == 0 and (tmp_path / "ran").exists(), ran.err
    assert "note: model.trust_remote_code is on" in ran.out.partition("step 1/4")[0]
    assert ran.record["model"]["trust_remote_code"] is True
    assert "`model.trust_remote_code`" in (ran.folder / "model" / "README.md").read_text(encoding="utf-8")


def test_processes_import_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("dataclasses", "pickle"):
        (tmp_path / f"{name}.py").write_text(f"open({name!r}, 'w')\nraise ImportError\n", encoding="utf-8")
    with quiet.libraries(tmp_path / "libraries.log"):
        done = subprocess.run([sys.executable, "-m", "alignctl.errors"], check=False)
        worker = multiprocessing.get_context("spawn").Process(target=os.getcwd)
        worker.start()
        worker.join()
    assert (done.returncode, worker.exitcode) == (0, 0), (tmp_path / "libraries.log").read_text(encoding="utf-8")
    assert not (tmp_path / "dataclasses").exists() and not (tmp_path / "pickle").exists()


def test_attention_that_a_config_names_is_not_fetched(train: Train, tiny: Path, tmp_path: Path) -> None:
    """`org/name` is code of the hub to transformers; what a recipe may say of it is in tests/recipe."""
    folder = tmp_path / "kernel"
    shutil.copytree(tiny, folder)
    change(folder / "config.json", _attn_implementation="kernels-community/flash-attn2")
    ran = train(model={"name_or_path": str(folder)})
    assert ran.code == 0, ran.err


# 2: weights that are pickles.


class Touches:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def pickled(tiny: Path, tmp_path: Path) -> Path:
    """A model folder whose weights are a pickle file that makes the folder `ran`."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Touches(tmp_path / "ran")}, folder / "pytorch_model.bin")
    return folder


def test_a_pickle_file_is_not_read(train: Train, pickled: Path, tmp_path: Path) -> None:
    ran = train(model={"name_or_path": str(pickled)})
    assert ran.code == 2 and not (tmp_path / "ran").exists()
    (said,) = complaints(ran.err)
    assert "no .safetensors weights" in said and "model.use_safetensors=false" in said


def test_a_pickle_file_that_the_config_names_is_not_read(train: Train, tiny: Path, tmp_path: Path) -> None:
    """It is the one name that transformers takes although it was told to take safetensors alone."""
    folder = tmp_path / "named"
    shutil.copytree(tiny, folder)
    change(folder / "config.json", transformers_weights="adapter_model.bin")
    torch.save(load_file(tiny / "model.safetensors"), folder / "adapter_model.bin")
    ran = train(model={"name_or_path": str(folder)})
    assert ran.code == 2
    (said,) = complaints(ran.err)
    assert "adapter_model.bin" in said and "model.use_safetensors=false" in said


def test_a_pickle_file_that_holds_more_than_weights_runs_nothing(train: Train, pickled: Path, tmp_path: Path) -> None:
    ran = train(model={"name_or_path": str(pickled), "use_safetensors": False})
    assert ran.code == 2 and not (tmp_path / "ran").exists()
    (said,) = complaints(ran.err)
    assert "holds more than weights" in said and "safetensors" in said


def test_a_pickle_file_that_is_asked_for_is_told_of(train: Train, tiny: Path, pickled: Path) -> None:
    torch.save(load_file(tiny / "model.safetensors"), pickled / "pytorch_model.bin")
    ran = train(model={"name_or_path": str(pickled), "use_safetensors": False})
    assert ran.code == 0, ran.err
    assert "note: model.use_safetensors is off" in ran.out.partition("step 1/4")[0]
    assert ran.record["model"]["use_safetensors"] is False
    assert "`model.use_safetensors: false`" in (ran.folder / "model" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """An adapter folder whose weights are a pickle file that makes the folder `ran`."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config["base_model_name_or_path"] = str(tiny)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save({"x": Touches(tmp_path / "ran")}, folder / "adapter_model.bin")
    return folder


def test_an_adapter_that_is_a_pickle_file_is_not_read(train: Train, adapter: Path, tmp_path: Path) -> None:
    ran = train(lora=None, model={"adapter": str(adapter)})
    assert ran.code == 2 and not (tmp_path / "ran").exists()
    (said,) = complaints(ran.err)
    assert "adapter_model.safetensors" in said and "model.use_safetensors=false" in said
    ran = train(lora=None, model={"adapter": str(adapter), "use_safetensors": False}, folder="asked")
    assert ran.code == 2 and not (tmp_path / "ran").exists()
    assert "holds more than weights" in ran.err


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_in_the_place_of_the_base_is_refused(
    train: Train, adapter: Path, tiny: Path, tmp_path: Path, beside: bool
) -> None:
    """The library would load it, or the base that its config names, from wherever that is."""
    for file in tiny.iterdir():
        if beside or file.name.startswith(("tokenizer", "chat")):
            shutil.copy(file, adapter)
    ran = train(model={"name_or_path": str(adapter)})
    assert ran.code == 2 and not (tmp_path / "ran").exists()
    (said,) = complaints(ran.err)
    assert "is an adapter, or holds one" in said and "model.adapter" in said


def test_an_adapter_that_loads_others_is_refused(train: Train, adapter: Path, tmp_path: Path) -> None:
    change(adapter / "adapter_config.json", peft_type="XLORA", adapters={"0": str(tmp_path / "other")})
    (adapter / "adapter_model.safetensors").touch()
    ran = train(model={"adapter": str(adapter)})
    assert ran.code == 2 and "of the kind XLORA" in ran.err


# 4: chat templates.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ ().__class__.__mro__ }}", "'__class__' of 'tuple' object is unsafe"),
        ("{% if ().__class__.__mro__[1].__subclasses__() %}x{% endif %}", "'__class__' of 'tuple' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os.mkdir('ran') }}", "'__init__' of 'type' object is unsafe"),
        ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "is unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% include '/etc/hosts' %}", "no loader"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 13 }}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_does_not_leave_its_sandbox(train: Train, tmp_path: Path, template: str, what: str) -> None:
    (tmp_path / "own.jinja").write_text(template + CHATML, encoding="utf-8")
    ran = train(model={"chat_template": "own.jinja"})
    assert ran.code == 2 and not (tmp_path / "ran").exists()
    (said,) = complaints(ran.err)
    assert said.startswith("alignctl: model.chat_template: cannot render a conversation: ") and what in said


IN_ONE_ROW = "{% for m in messages %}{% if 'river' in m.content %}{{ THIS }}{% endif %}{% endfor %}" + CHATML


@pytest.mark.parametrize(
    ("this", "what"),
    [
        ("m.__class__.__mro__", "'__class__' of 'dict' object is unsafe"),
        ("range(10 ** 9)", "Range too big"),
    ],
)
def test_a_template_does_not_leave_its_sandbox_in_a_row(train: Train, tmp_path: Path, this: str, what: str) -> None:
    (tmp_path / "own.jinja").write_text(IN_ONE_ROW.replace("THIS", this), encoding="utf-8")
    ran = train(model={"chat_template": "own.jinja"})
    (said,) = complaints(ran.err)
    assert said.startswith("alignctl: model.chat_template: cannot render a row: ") and what in said
    assert ran.code == 2


def test_the_attributes_that_a_filter_reads_are_none(train: Train, tmp_path: Path) -> None:
    """Jinja's `attr` gives nothing instead of refusing, and so the tokens are those without it."""
    (tmp_path / "own.jinja").write_text("{{ messages|attr('__class__') }}" + CHATML, encoding="utf-8")
    found = train(model={"chat_template": "own.jinja"}).record["data"]["train"]["fingerprint"]
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    assert train(model={"chat_template": "own.jinja"}, folder="plain").record["data"]["train"]["fingerprint"] == found


# 5: secrets.

TOKEN = 'tok"en/ü-5ecret9'


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("ALIGNCTL_PRIVATE", "pr1vate-revision")
    return TOKEN


def told(ran: Any) -> list[str]:
    """Where a run tells a secret, in any spelling: files of its folder, stdout, stderr."""
    spelled = {form.encode() for form in (TOKEN, json.dumps(TOKEN)[1:-1], "%C3%BC-5ecret9", "5ecret9", "pr1vate")}
    found = {str(path): path.read_bytes() for path in ran.folder.rglob("*") if path.is_file()}
    found |= {"stdout": ran.out.encode(), "stderr": ran.err.encode()}
    return [name for name, content in found.items() if any(form in content for form in spelled)]


def saying(monkeypatch: pytest.MonkeyPatch, what: str, then: Exception | None = None) -> None:
    """Let a library say `what` on both streams of the process before the first step, and then fail or go on."""
    examine = preflight.examine

    def examined(*given: Any, **more: Any) -> None:
        os.write(1, f"GET {what}\n".encode())
        os.write(2, f"{what}\n".encode())
        subprocess.run(["sh", "-c", 'echo "$1" >&2', "sh", json.dumps(what)], check=True)
        if then is not None:
            raise then
        examine(*given, **more)

    monkeypatch.setattr(preflight, "examine", examined)


def test_what_a_library_prints_is_not_kept(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, secret)
    ran = train()
    assert ran.code == 0 and told(ran) == []
    log = (ran.folder / "logs" / "libraries.log").read_text(encoding="utf-8")
    assert "GET ${oc.env:HF_TOKEN}\n${oc.env:HF_TOKEN}\n" in log and '"${oc.env:HF_TOKEN}"' in log


def test_an_error_that_holds_a_secret(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, secret, ValueError(f"401 for https://me:{secret}@example.org"))
    ran = train()
    assert ran.code == 1 and told(ran) == []
    assert ran.record["status"] == "failed" and "https://me:${oc.env:HF_TOKEN}@example.org" in ran.record["why"]
    assert "https://me:${oc.env:HF_TOKEN}@example.org" in ran.err


def test_a_secret_on_the_command_line(train: Train, secret: str) -> None:
    words = [f"trl.run_name='https://me:{secret}@example.org'", f"model.revision='{secret}'"]
    ran = train("dpo", None, *words, data={"eval_fraction": 0.25}, evaluation={"samples": 2, "max_new_tokens": 4})
    assert ran.code == 0, ran.err
    assert told(ran) == []
    assert "'model.revision='\"'\"'${oc.env:HF_TOKEN}" in ran.record["command"]
    kept = yaml.safe_load((ran.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["revision"] == "${oc.env:HF_TOKEN}"
    assert kept["trl"]["run_name"] == "https://me:${oc.env:HF_TOKEN}@example.org"


def test_a_secret_in_the_recipe(train: Train, secret: str) -> None:
    names = {"revision": "${oc.env:ALIGNCTL_PRIVATE}"}
    ran = train(model=names, trl={"run_name": "${oc.env:ALIGNCTL_PRIVATE}"}, training={"save_steps": 2})
    assert ran.code == 0 and told(ran) == []
    assert ran.record["model"]["revision"] == "${oc.env:ALIGNCTL_PRIVATE}"
    assert "`${oc.env:ALIGNCTL_PRIVATE}`" in (ran.folder / "model" / "README.md").read_text(encoding="utf-8")


def test_a_place_in_the_recipe(train: Train, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT writes the base's folder into the adapter's config, and nobody but the sweep at the end knows of it."""
    monkeypatch.setenv("ALIGNCTL_PLACE", str(tiny))
    ran = train(model={"name_or_path": "${oc.env:ALIGNCTL_PLACE}"})
    assert ran.code == 0, ran.err
    config = json.loads((ran.folder / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "${oc.env:ALIGNCTL_PLACE}"
    texts = [path.read_bytes() for path in ran.folder.rglob("*") if path.is_file()] + [ran.out.encode()]
    assert not any(str(tiny).encode() in text for text in texts)


def test_a_run_that_is_killed_has_told_nothing(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def examined(built: preflight.Built, **given: Any) -> None:
        seen.update({path.name: path.read_text(encoding="utf-8") for path in built.parts.run.glob("*.*")})

    monkeypatch.setattr(preflight, "examine", examined)
    train("dpo", None, f"model.revision='{secret}'")
    assert {"run.json", "recipe.yaml", "ledger.json"} <= set(seen)
    assert [name for name, text in seen.items() if "5ecret9" in text] == []


def test_a_run_that_hides_something_can_be_resumed(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints know what was written to them: the secrets are out before."""
    given = {"trl": {"run_name": "${oc.env:ALIGNCTL_PRIVATE}"}, "training": {"save_steps": 2}}
    with monkeypatch.context() as failing:
        failing.setattr(verify, "note_live", lambda *given: (_ for _ in ()).throw(KeyError(secret)))
        ran = train("dpo", None, f"model.revision='{secret}'", **given)
    assert ran.code == 1 and ran.record["status"] == "failed" and told(ran) == []
    ran = train("dpo", None, f"model.revision='{secret}'", "--resume", **given)
    assert ran.code == 0 and ran.record["status"] == "finished", ran.err
    assert told(ran) == []


def test_a_traceback_that_holds_a_secret(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, "nothing", ValueError(f"401 for {secret} \x1b]0;title\x07"))
    ran = train("dpo", None, "--debug")
    assert "Traceback" in ran.err and "401 for ${oc.env:HF_TOKEN}" in ran.err
    assert TOKEN not in ran.err and "\x1b" not in ran.err


def test_the_command_that_is_kept_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "ab12cd34")
    monkeypatch.setattr(sys, "argv", ["alignctl", "dpo", "r.yaml", "model.revision=ab12cd34", "--resume"])
    assert training._command_line() == "alignctl dpo r.yaml 'model.revision=${oc.env:HF_TOKEN}'"


def test_what_is_verified_later_holds_no_secret(
    train: Train, here: Here, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def begin(run: RunDir) -> Iterator[None]:
        (run / "logs" / "reload.log").write_text(f"Warning: {secret}\n", encoding="utf-8")
        yield

    ran = train()
    monkeypatch.setattr(verify, "begin", begin)
    monkeypatch.setattr(verify, "reload", lambda *given: None)
    assert here("verify", "run").returncode == 0 and told(ran) == []
    assert (ran.folder / "logs" / "reload.log").read_text(encoding="utf-8") == "Warning: ${oc.env:HF_TOKEN}\n"


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_check_and_inspect_show_no_secret(train: Train, here: Here, secret: str, command: str) -> None:
    row = {"prompt": f"My token is {secret}.", "chosen": "Good to know.", "rejected": "Oh no, it is not."}
    ran = train("dpo", [row], "dpo.bta=1")  # writes the files and stops
    assert ran.code == 2
    for options in ([], ["--json"]):
        done = here(command, "r.yaml", f"model.revision='{secret}'", "data.max_dropped=1", *options)
        assert done.returncode == 0, done.stderr
        assert "5ecret9" not in done.stdout + done.stderr
    assert "My token is ${oc.env:HF_TOKEN}." in done.stdout or command == "check"


# 6: where a run writes.


def test_tensorboard_writes_into_the_run_folder(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"
    (packages / "tensorboard").mkdir(parents=True)
    (packages / "tensorboard" / "__init__.py").write_text("__version__ = '0'\n", encoding="utf-8")
    (packages / "tensorboardX.py").write_text(WRITER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setattr(transformers.integrations.integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    ran = train(logging={"report_to": "tensorboard"})
    assert ran.code == 0, ran.err
    assert (ran.folder / "logs" / "tensorboard" / "events").is_file()
    assert not (tmp_path / "elsewhere").exists()


def test_no_model_of_the_hub_is_asked_to_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without safetensors, transformers asks a service to open a pull request in the model's repository."""
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    with quiet.libraries(tmp_path / "libraries.log"):
        assert transformers.utils.import_utils.is_env_variable_true("DISABLE_SAFETENSORS_CONVERSION")
    assert '"DISABLE_SAFETENSORS_CONVERSION"' in inspect.getsource(transformers.modeling_utils)


WRITER = """
from pathlib import Path


class SummaryWriter:
    def __init__(self, log_dir):
        Path(log_dir).mkdir(parents=True)
        self.file = Path(log_dir) / "events"

    def add_text(self, *given):
        self.file.touch()

    add_scalar = add_text

    def flush(self):
        pass

    close = flush
"""


# 7: text from elsewhere in a terminal, in JSON and in Markdown.

EVIL = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eevil\u2066\x00\x7f"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def raw(*texts: str) -> list[str]:
    """The controls that would reach the terminal."""
    return RAW.findall("".join(texts))


@pytest.fixture
def without_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process the bars of transformers go to stderr, where a real run has them in its log."""
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)


def hostile(count: int = 16) -> list[dict[str, Any]]:
    words = ["tea", "rain", "bread", "stone"]
    return [
        {
            "prompt": f"Say {i} {EVIL} {words[i % 4]}",
            "chosen": f"{words[i % 4]} {EVIL} {i}",
            "rejected": f"{i} {words[(i + 1) % 4]} {EVIL}",
            f"extra{EVIL}": EVIL,
        }
        for i in range(count)
    ]


@pytest.mark.usefixtures("without_bars")
def test_rows_reach_the_terminal_without_controls(train: Train, here: Here) -> None:
    ran = train("dpo", hostile(), data={"eval_fraction": 0.25}, evaluation={"samples": 4, "max_new_tokens": 4})
    assert ran.code == 0, ran.err
    assert "owned" in ran.out and "\ufffd" in ran.out and raw(ran.out, ran.err) == []
    for file in ran.folder.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    samples = (ran.folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert {EVIL in json.loads(line)["prompt"] for line in samples if line} == {True}
    for command, *options in (["check"], ["check", "--json"], ["inspect"], ["inspect", "--json"], ["inspect", "--ids"]):
        done = here(command, "r.yaml", *options)
        assert done.returncode == 0 and raw(done.stdout, done.stderr) == [], (command, options)
        if "--json" in options:
            json.loads(done.stdout)
    assert EVIL in json.loads(here("inspect", "r.yaml", "--json").stdout)["canonical"]["prompt"][-1]["content"]


def test_a_table_with_controls_in_it(train: Train, here: Here, tmp_path: Path) -> None:
    name = EVIL.replace("\x00", "").replace("\r", "")
    assert train("dpo", hostile(), "dpo.bta=1").code == 2
    lines = [f"prompt,chosen,rejected,{name}", f"Say {name},tea {name},rain,{name}", f"Say {name},a,a,{name}"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for command in ("check", "inspect"):
        done = here(command, "r.yaml", "data.train.0.path=rows.csv", "data.max_dropped=1")
        assert done.returncode == 0 and raw(done.stdout, done.stderr) == [], done.stderr
    (tmp_path / "rows.csv").write_text(f"{name},b\n1,2\n", encoding="utf-8")
    done = here("check", "r.yaml", "data.train.0.path=rows.csv")
    assert done.returncode == 3 and "owned" in done.stderr and raw(done.stdout, done.stderr) == []


@pytest.mark.parametrize(
    "row",
    [
        {f"a{EVIL}": "x", "b": "y"},
        {"prompt": "a", "chosen": [{"role": f"user{EVIL}", "content": "b"}], "rejected": "c"},
        {"prompt": "a", "chosen": {EVIL: EVIL}, "rejected": "c"},
        {"messages": [{"from": EVIL, "value": EVIL}]},
        {"prompt": "a", "chosen": 5, "rejected": EVIL},
    ],
)
def test_errors_about_rows_hold_no_controls(train: Train, here: Here, row: dict[str, Any]) -> None:
    ran = train("dpo", [row])
    assert ran.code == 3 and raw(ran.out, ran.err) == [] and len(complaints(ran.err)) == len(ran.err.splitlines()) == 1
    done = here("check", "r.yaml")
    assert done.returncode == 3 and raw(done.stdout, done.stderr) == []


def test_names_of_files_and_words_hold_no_controls(train: Train, here: Here, tmp_path: Path) -> None:
    assert train("dpo", hostile(), "dpo.bta=1").code == 2
    name = EVIL.replace("\x00", "")
    (tmp_path / f"{name}.jsonl").write_text((tmp_path / "rows.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / f"{name}.yaml").write_text((tmp_path / "r.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text(f'{{"a": {name}', encoding="utf-8")
    given = json.dumps(f"{name}.jsonl")
    for words, code in (
        (["check", "r.yaml", f"data.train.0.path={given}"], 0),
        (["check", f"{name}.yaml"], 0),
        (["check", f"{name}-not-there.yaml"], 2),
        (["check", f"{name}"], 2),
        (["check", "r.yaml", f"model.{name}=1"], 2),
        (["check", "r.yaml", f"model.name_or_path=./{json.dumps(name)[1:-1]}"], 2),
        (["check", "r.yaml", "data.train.0.path=broken.jsonl"], 3),
        (["inspect", "r.yaml", f"data.train.0.path={given}"], 0),
        (["inspect", "r.yaml", "--row", f"{name}:7"], 2),
        (["inspect", "r.yaml", "--part", name], 2),
        (["recipes", "show", name], 2),
        (["verify", name], 2),
    ):
        done = here(*words)
        assert done.returncode == code and raw(done.stdout, done.stderr) == [], (words, done.stdout, done.stderr)


@pytest.mark.usefixtures("without_bars")
def test_the_name_of_a_run_folder_holds_no_controls(train: Train) -> None:
    ran = train(folder=EVIL.replace("\x00", ""))
    assert ran.code == 0 and "owned" in ran.out and raw(ran.out, ran.err) == []


def test_what_a_terminal_waits_for_holds_no_controls() -> None:
    stream = Terminal()
    with display.Display(stream).waiting(f"loading {EVIL}"):
        pass
    assert "owned" in stream.getvalue() and "\x1b]0;" not in stream.getvalue() and "\u202e" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# 7: the card.

NASTY = "org/`x`\n---\n# Owned\n| a | b |\r\n{{x: [\u202e<script>\"'"


def test_a_name_does_not_leave_its_place_in_the_card(train: Train) -> None:
    ran = train(model={"revision": NASTY})
    assert ran.code == 0, ran.err
    record, recipe = ran.record, load(ran.folder / "recipe.yaml").recipe
    model = recipe.model.model_copy(update={"name_or_path": NASTY, "adapter": NASTY, "chat_template": NASTY})
    source = recipe.data.train[0].model_copy(update={"path": NASTY, "split": NASTY})
    data = recipe.data.model_copy(update={"train": [source]})
    text = card.text(recipe.model_copy(update={"model": model, "data": data}), record | {"reference": NASTY}, {})
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == NASTY.replace("\r", "\ufffd").replace("\u202e", "\ufffd")
    assert yaml.safe_load(front)["tags"] == ["alignctl", "trl", "dpo"]
    assert [line for line in body.splitlines() if line.startswith(("#", "|", "-"))] == [
        *(line for line in body.splitlines() if line.startswith(("# ``", "- "))),
        "## Held-out rows",
    ]
    assert body.count("`` org/`x` --- # Owned | a | b |\ufffd {{x: [\ufffd") == 8
    assert raw(text) == []


# 8: the folder of a run.


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_run_is_left_alone(train: Train, tmp_path: Path, kind: str, option: list[str]) -> None:
    mine = tmp_path / "mine"
    if kind == "file":
        mine.write_text("mine", encoding="utf-8")
    else:
        mine.mkdir()
        (mine / "notes.txt").write_text("mine", encoding="utf-8")
    if kind == "link":
        (tmp_path / "link").symlink_to(mine)
    before = {path: path.read_bytes() for path in (mine, *mine.rglob("*")) if path.is_file()}
    ran = train("dpo", None, *option, folder="link" if kind == "link" else "mine")
    assert ran.code == 2 and len(complaints(ran.err)) == 1
    assert {path: path.read_bytes() for path in (mine, *mine.rglob("*")) if path.is_file()} == before


def test_links_in_a_run_folder_are_not_followed(train: Train, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine", encoding="utf-8")
    run = train().folder
    linked = ["model", "logs", "checkpoints", "checkpoints.writing", "model.writing", "stand-in"]
    files = ["recipe.yaml", "ledger.json", "metrics.jsonl", "summary.json", "run.json.writing", "ledger.json.writing"]
    for name in (*linked, *files):
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine / "notes.txt" if name in files else mine)
    ran = train("dpo", None, "--overwrite")
    assert ran.code == 0, ran.err
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    assert (mine / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not any(path.is_symlink() for path in ran.folder.rglob("*"))


def test_a_lock_that_is_a_link_is_not_followed(train: Train, tmp_path: Path) -> None:
    run = train().folder
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "elsewhere")
    ran = train("dpo", None, "--overwrite")
    assert ran.code == 2 and not (tmp_path / "elsewhere").exists()
