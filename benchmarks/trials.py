"""One fault, tried with TRL's own trainer and with alignctl's run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from faulty import LORA, TRAINING, Fault, Lab, Row
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from alignctl.cli.main import main as command_line
from alignctl.train import fit, standin

TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}


def trl_trainer(lab: Lab, method: str, rows: list[Row], model: Any, tokenizer: Any, **more: Any) -> Trainer:
    """TRL's own trainer with TRL's own config."""
    trainer_class, config_class = TRAINERS[method]
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    common |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "gradient_checkpointing": False}
    peft, held_out = more.pop("lora", LORA), more.pop("held_out", None)
    arguments = common | TRAINING | {"output_dir": str(lab.folder / "trl")} | more
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if held_out is not None:
        given["eval_dataset"] = Dataset.from_list(held_out)
    if peft is not None:
        given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **peft)
    return trainer_class(model, args=config_class(**arguments), **given)


def base(lab: Lab, *, four_bits: bool = False) -> Any:
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if four_bits else None
    return AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32, quantization_config=stored)


def by_trl(fault: Fault, lab: Lab) -> str:
    """What TRL's own trainer makes of a fault."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(lab.model)
    if fault.tokenizer is not None:
        fault.tokenizer(tokenizer)
    more = fault.theirs | {"lora": fault.lora, "held_out": fault.held_out}
    model = base(lab, four_bits=fault.four_bits)
    trainer = trl_trainer(lab, fault.method, fault.rows, model, tokenizer, **more)
    if fault.plant is not None:
        fault.plant(trainer)
    trainer.train()
    return fault.shows(trainer)


def by_alignctl(fault: Fault, lab: Lab, folder: Path | None = None) -> tuple[str, list[str]]:
    """How `alignctl METHOD recipe.yaml` ends, and what it says of the fault."""
    folder = folder or lab.folder / f"fault-{fault.number}"
    folder.mkdir()
    source = {"path": "rows.jsonl"}
    data: dict[str, Any] = {"train": [source]}
    for name, rows in (("rows", fault.rows), ("held-out", fault.held_out)):
        if rows is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if fault.held_out is not None:
        data["eval"] = [source | {"path": "held-out.jsonl"}]
    values: dict[str, Any] = {
        "model": {"name_or_path": str(lab.with_tokenizer(fault)), "dtype": "float32"},
        "lora": fault.lora,
        "data": data,
        "training": TRAINING,
        fault.method: {},
        "evaluation": {"samples": 0},
        "gates": {"reload": not fault.number},
    }
    for name, section in fault.ours.items():
        values[name] = {**(values.get(name) or {}), **section}
    text = yaml.safe_dump({name: section for name, section in values.items() if section is not None})
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    why: list[str] = []
    with planted(fault, why):
        code, found = went(folder, fault.method)
    return code, [f"cannot happen: {each}" for each in why if each] or found


def went(folder: Path, method: str, *options: str) -> tuple[str, list[str]]:
    """How the recipe in `folder` ends, and what its run says."""
    with contextlib.chdir(folder):
        code, error = called(method, "recipe.yaml", "--output", "run", *options)
    read = [folder / "run" / name for name in ("run.json", "ledger.json")]
    record, ledger = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {} for file in read)
    return f"exit {code}", said(record, ledger) or ([plain(error)] if code else [])


@contextlib.contextmanager
def planted(fault: Fault, why: list[str]) -> Iterator[None]:
    """Inside, alignctl's trainers are built with the fault; `why` gets the reason that it cannot happen there."""
    before = dict(fit.BUILD)

    def build(recipe: Any, parts: Any) -> Trainer:
        trainer = before[fault.method](recipe, parts)
        if fault.plant is not None:
            fault.plant(trainer)
        if fault.sound is not None:
            why.append(fault.sound(trainer))
        return trainer

    fit.BUILD[fault.method] = build
    try:
        yield
    finally:
        fit.BUILD.update(before)


def called(*arguments: str) -> tuple[int, str]:
    """The exit code of the command line, run in this process, and its error message."""
    sys.argv = ["alignctl", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            command_line()
        except SystemExit as ended:
            return int(ended.code or 0), error.getvalue().strip()
    return 0, ""


def plain(error: str) -> str:
    """The last line of an error: what is wrong, without the rows and the way out."""
    return re.split(r" \(first| — |, which is none", error.splitlines()[-1].removeprefix("alignctl: "))[0]


def said(record: dict[str, Any], ledger: dict[str, Any]) -> list[str]:
    """What alignctl's run folder says of a fault."""
    gates = record.get("gates", {})
    out = [f"`gate.{name}`" for name, found in gates.items() if found["verdict"] in ("warned", "stopped")]
    for part in ("train", "eval"):
        out += [f"ledger: {reason}" for reason in ledger.get(part, {}).get("dropped", {})]
    names = [found["name"] for found in ledger.get("findings", []) if found["warns"]]
    return out + [f"`{name}`" for name in names if name not in USUAL]


# Findings that every run on so few rows has.
USUAL = {"eval.size"}


def made(folder: Path) -> Lab:
    """The tiny model."""
    lab = Lab(folder)
    corpus = folder / "corpus.txt"
    corpus.write_text("Say tea and rain, bread and stone, river and lamp, cloud and wheel.\n", encoding="utf-8")
    family = standin.family("smollm")[0]
    standin._tokenizer(family, corpus, lab.model)
    standin._model(family, lab.model)
    return lab


@contextlib.contextmanager
def quiet(*, debug: bool = False) -> Iterator[None]:
    """Nothing that is written inside is seen, whoever writes it; with `debug` what goes to stderr is."""
    kept = [os.dup(1), os.dup(2)]
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for descriptor in (1,) if debug else (1, 2):
            os.dup2(nowhere.fileno(), descriptor)
        try:
            yield
        finally:
            for descriptor, original in enumerate(kept, 1):
                os.dup2(original, descriptor)
                os.close(original)
