"""`alignctl serve`: which server is run, and what it is told. The servers are scripts that print their arguments."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignctl.cli import serve

RECIPE: dict[str, Any] = {
    "model": {"name_or_path": "org/base", "revision": "abc"},
    "lora": {"r": 12},
    "data": {"train": [{"path": "rows.jsonl"}]},
    "training": {"learning_rate": 1e-4},
    "dpo": {},
}
Alignctl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """A finished run's folder as far as `serve` reads it; `sections` change its recipe, `adapter` its adapter."""

    def make(status: str = "finished", adapter: dict[str, Any] | None = None, **sections: Any) -> Path:
        folder = tmp_path / "runs" / "mine"
        (folder / "model").mkdir(parents=True)
        values = {name: section for name, section in {**RECIPE, **sections}.items() if section is not None}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        record = {"status": status, "command": "alignctl dpo r.yaml", "machine": {"dtype": "bfloat16"}}
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
        (folder / "model" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
        config = {"r": 12, "rank_pattern": {}, **(adapter or {})}
        (folder / "model" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


def scripts(tmp_path: Path, *names: str) -> Path:
    """A folder with scripts of these names, which print their arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in names:
        (folder / name).write_text('#!/bin/sh\necho "RAN $@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put scripts of these names on the PATH, and nothing else; transformers' server has its packages."""

    def put(*names: str) -> Path:
        folder = scripts(tmp_path, *names)
        monkeypatch.setattr(serve.sys, "executable", str(folder / "python"))
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name if "transformers" in names else None)
        return folder

    return put


def argv(here: Alignctl, *arguments: str) -> list[str]:
    done = here("serve", *arguments, "--print")
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_vllm_is_told_base_adapter_template_and_stop_tokens(run: Any, servers: Any, here: Alignctl) -> None:
    folder, programs = run(), servers("transformers", "vllm")
    model = folder / "model"
    assert argv(here, str(folder), "--port", "9000") == [
        str(programs / "vllm"),
        "serve",
        "org/base",
        "--revision=abc",
        "--enable-lora",
        f"--lora-modules=mine={model}",
        "--max-lora-rank=16",
        f"--tokenizer={model}",
        f"--generation-config={model}",
        "--dtype=bfloat16",
        f"--chat-template={model / 'chat_template.jinja'}",
        "--port",
        "9000",
    ]


def test_a_4_bit_base_is_served_in_4_bits(run: Any, servers: Any, here: Alignctl) -> None:
    servers("vllm")
    assert "--quantization=bitsandbytes" in argv(here, str(run(quantization={"load_in_4bit": True})))


def test_the_largest_rank_of_a_layer_counts(run: Any, servers: Any, here: Alignctl) -> None:
    servers("vllm")
    assert "--max-lora-rank=64" in argv(here, str(run(adapter={"rank_pattern": {"q_proj": 40}})))


def test_all_weights_are_served_as_they_are(run: Any, servers: Any, here: Alignctl) -> None:
    folder, programs = run(lora=None), servers("vllm")
    found = argv(here, str(folder))
    assert found[:4] == [str(programs / "vllm"), "serve", str(folder / "model"), "--served-model-name=mine"]
    assert not any("lora" in word for word in found)


def test_transformers_serves_what_is_whole(run: Any, servers: Any, here: Alignctl) -> None:
    folder, programs = run(lora=None), servers("transformers")
    model = str(folder / "model")
    expected = [str(programs / "transformers"), "serve", model, "--dtype=bfloat16", "--port", "8000"]
    assert argv(here, str(folder)) == expected


def test_a_merged_model_is_served(tmp_path: Path, servers: Any, here: Alignctl) -> None:
    folder, programs = tmp_path / "merged", servers("transformers")
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "alignctl.json").write_text('{"onto": "original", "dtype": "float16"}', encoding="utf-8")
    expected = [str(programs / "transformers"), "serve", str(folder), "--dtype=float16", "--port", "8000"]
    assert argv(here, str(folder)) == expected


def test_the_server_takes_the_place_of_the_command(run: Any, alignctl: Alignctl, tmp_path: Path) -> None:
    folder, programs = run(), scripts(tmp_path, "vllm")
    path = f"{programs}{os.pathsep}/usr/bin"
    done = alignctl("serve", str(folder), "--", "--max-model-len", "2048", PATH=path)
    assert done.returncode == 0, done.stderr
    first, ran = done.stdout.splitlines()
    assert first.startswith(f"vllm serves mine on port 8000: {programs / 'vllm'} serve org/base")
    assert ran.startswith("RAN serve org/base") and ran.endswith("--port 8000 --max-model-len 2048")


def test_an_adapter_needs_vllm(run: Any, servers: Any, here: Alignctl) -> None:
    servers("transformers")
    done = here("serve", str(run()))
    assert done.returncode == 4
    assert "transformers serve loads whole models alone" in done.stderr and "alignctl merge" in done.stderr


def test_vllm_serves_no_dora(run: Any, servers: Any, here: Alignctl) -> None:
    servers("vllm")
    done = here("serve", str(run(adapter={"use_dora": True})))
    assert done.returncode == 4
    assert "vLLM serves no DoRA adapters — alignctl merge" in done.stderr


def test_without_a_server_the_way_out_is_told(run: Any, servers: Any, here: Alignctl) -> None:
    servers()
    done = here("serve", str(run()))
    assert done.returncode == 4
    assert "neither vLLM nor transformers[serving] is installed — pip install vllm" in done.stderr


def test_transformers_without_its_packages_does_not_count(
    run: Any, servers: Any, here: Alignctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers("transformers")
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert "neither vLLM nor transformers[serving]" in here("serve", str(run(lora=None))).stderr


@pytest.mark.parametrize(
    ("status", "said"), [("failed", "is not finished (status: failed)"), ("", "is neither a run nor a merged model")]
)
def test_what_was_not_finished_is_not_served(run: Any, here: Alignctl, tmp_path: Path, status: str, said: str) -> None:
    done = here("serve", str(run(status=status) if status else tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
