"""Nothing runs but what was asked for: code of a model, pickles, templates."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from alignctl import quiet

Train = Callable[..., Any]


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
