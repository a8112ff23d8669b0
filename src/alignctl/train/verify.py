"""Is the saved model the trained one? Scanned on disk, then loaded in a new process and compared.

`python -m alignctl.train.verify RUN` is that process; it writes what it computes to the run's logs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from alignctl import rundir, secrets
from alignctl.errors import AlignctlError, MachineError, Problem, VerifyError
from alignctl.recipe.load import load
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir
from alignctl.train import machine
from alignctl.train import model as models
from alignctl.train.data import Rows
from alignctl.train.gates import Gates
from alignctl.train.guards import sequences
from alignctl.train.tokenizer import text_hash
from alignctl.train.tokens import Encoder

ROWS = 4
TOKENS = 256
# How far a token's log-probability may be from the live model's: the same computation, in another process.
SAME = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
NO_BASE, NO_MEMORY = 3, 4
# What the system does to a process when there is no more.
_KILLED = -signal.SIGKILL
_ANEW = "train anew with --overwrite; gate.finite and gate.moved, where they are on, stop at the step that does this"
_AGAIN = "the checkpoints are whole: train again with --resume, and report it"


@torch.no_grad()
def note_live(trainer: Trainer, rows: Rows, encoder: Encoder, precision: torch.dtype, run: RunDir) -> None:
    """Write what the live model makes of a few rows to logs/live.json, for `reload` to compare with."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    ids = [list(sequences(rows, i)[0][:TOKENS]) for i in range(min(ROWS, len(rows)))]
    found = token_logps(model, ids, precision)
    live = {"ids": ids, "logps": found, "stop_ids": list(encoder.stop_ids)}
    live["dtype"] = str(precision).removeprefix("torch.")
    rundir.write_json(run / "logs" / "live.json", live)


@torch.no_grad()
def token_logps(model: PreTrainedModel, ids: list[list[int]], precision: torch.dtype) -> list[list[float]]:
    """Log-probability of every token but the first of each row."""
    was_training = model.training
    model.eval()
    out = []
    for row in ids:
        given = torch.tensor([row], device=model.device)
        with torch.autocast(model.device.type, dtype=precision, enabled=precision != torch.float32):
            logits = model(input_ids=given, use_cache=False).logits[0, :-1].float()
        out.append(logits.log_softmax(-1).gather(1, given[0, 1:, None]).squeeze(1).tolist())
    model.train(was_training)
    return out


def _mended(run: RunDir, otherwise: str) -> str:
    """The way out for a model that was whole when the run finished; `otherwise` where it has not, or nobody looked."""
    asked = [run.record.get("gates", {}).get(name, {}).get("verdict") != "off" for name in ("saved", "reload")]
    if "seconds" not in run.record or not all(asked):
        return otherwise
    how = f"--resume, from {run.checkpoints()[-1].name}" if run.checkpoints() else "--overwrite"
    return f"put it back as it was when the run finished, or train again with {how}"


def scan(run: RunDir, gates: Gates) -> None:
    """The gate `saved`: the files of `model/` hold what a model needs, and every number is finite.

    Raises:
        VerifyError: they do not.
    """
    folder = run / "model"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        gates.stopped("saved", f"{folder} holds no weights (.safetensors)", _mended(run, _AGAIN), error=VerifyError)
    count = zero = 0
    for file in files:
        for name, tensor in _tensors(file, run, gates):
            if not torch.isfinite(tensor).all():
                said = f"{name} in {file.name} holds values that are not finite"
                gates.stopped("saved", said, _mended(run, _ANEW), error=VerifyError)
            count += 1
            zero += "lora_B" in name and not tensor.any()
    if zero:
        said = (
            "1 adapter is all zero: it changes nothing"
            if zero == 1
            else f"{zero} adapters are all zero: they change nothing"
        )
        gates.stopped("saved", said, _mended(run, _ANEW), value=zero, limit=0, error=VerifyError)
    lacking = _lacking(run, trusted=bool(run.record.get("model", {}).get("trust_remote_code")))
    if lacking:
        gates.stopped("saved", lacking, _mended(run, _AGAIN), error=VerifyError)
    said = f"{count} tensors, all finite; template and stop tokens are there"
    if unnamed := _base_name(run, gates):
        way_out = "give them the base beside the adapter; alignctl takes it from recipe.yaml"
        gates.warned("saved", f"{said}; {unnamed}", way_out, value=count)
    else:
        gates.passed("saved", said, value=count)


def _base_name(run: RunDir, gates: Gates) -> str:
    """Why others cannot find the base of a saved adapter by the name that it is saved with; empty where they can."""
    config = run / "model" / "adapter_config.json"
    loaded_from = run.record.get("model", {}).get("loaded_from")
    if loaded_from is None or not config.is_file():
        return ""
    try:
        name = secrets.hide(str(rundir.read_json(config).get("base_model_name_or_path")))
    except ValueError as error:
        gates.stopped("saved", f"adapter_config.json cannot be read: {error}", _mended(run, _AGAIN), error=VerifyError)
    if name != secrets.hide(loaded_from):
        said = f"adapter_config.json names {name} as the base, and {loaded_from} is what was trained on"
        way_out = f"put base_model_name_or_path back to {loaded_from}"
        gates.stopped("saved", said, way_out, value=name, limit=loaded_from, error=VerifyError)
    hidden = f"adapter_config.json names the base as {name}, for a secret is not written: others cannot load it by that"
    return hidden if secrets.is_hidden(name) else ""


def _tensors(file: Path, run: RunDir, gates: Gates) -> list[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return [(name, opened.get_tensor(name)) for name in opened.keys()]  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        gates.stopped("saved", f"{file} cannot be read: {error}", _mended(run, _AGAIN), error=VerifyError)


def _lacking(run: RunDir, *, trusted: bool) -> str:
    """What the tokenizer or the generation config lacks; empty when nothing."""
    folder, live = run / "model", rundir.read_json(run / "logs" / "live.json")
    try:
        generation = rundir.read_json(folder / "generation_config.json")
    except ValueError as error:
        return f"generation_config.json cannot be read: {error}"
    ends = generation.get("eos_token_id") or []
    missing = set(live["stop_ids"]) - set(ends if isinstance(ends, list) else [ends])
    if missing:
        return f"generation_config.json lacks the stop tokens {sorted(missing)}: answers would not end"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # noqa: BLE001 (the tokenizers library raises nothing more telling)
        return f"the tokenizer cannot be loaded: {' '.join(str(error).split())}"
    if text_hash(str(tokenizer.chat_template)) != run.record["template"]["sha256"]:
        return "the tokenizer's chat template is not the one that was trained with"
    return ""


@contextlib.contextmanager
def begin(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    """A new process that imports what it needs, and waits for `reload`; it ends when its `with` block does."""
    command = [sys.executable, "-m", "alignctl.train.verify", str(run.path)]
    with (run / "logs" / "reload.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def reload(run: RunDir, gates: Gates, process: subprocess.Popen[str]) -> None:
    """The gate `reload`: loaded in a new process, the model computes what it did when it was trained, and not the base.

    Raises:
        MachineError: the base is not there any more, or there is no memory for it.
        VerifyError: it does not.
    """
    process.communicate("go\n")
    if process.returncode:
        lines = (run / "logs" / "reload.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        if process.returncode == NO_BASE:
            raise MachineError(Problem("model.name_or_path", f"the base cannot be loaded: {last}", "put it back"))
        if process.returncode in (NO_MEMORY, _KILLED):
            why = last if process.returncode == NO_MEMORY else "the system killed the process that did so"
            what = f"there is not enough to load the saved model a second time: {why}"
            raise MachineError(Problem("memory", what, f"alignctl verify {run.path} when there is"))
        way_out = _mended(run, _AGAIN)
        gates.stopped("reload", f"the saved model cannot be loaded: {last}", way_out, error=VerifyError)
    live = rundir.read_json(run / "logs" / "live.json")
    found = rundir.read_json(run / "logs" / "reloaded.json")
    limit = SAME[live["dtype"]]
    apart, moved = _worst(found["logps"], live["logps"]), _worst(found["base"], live["logps"])
    said = (
        f"loaded in a new process, log-probabilities differ by {apart:.1e} a token at most, the base's by {moved:.1e}"
    )
    trained_on = run.record.get("model", {}).get("base_fingerprint")
    if not apart <= limit and trained_on not in (None, found["base_fingerprint"]):
        what = "the base has other weights than it had in training, so the saved model cannot be looked at"
        raise MachineError(Problem("model.name_or_path", what, "put the old ones back"))
    if not apart <= limit:
        way_out = _mended(run, _ANEW if math.isnan(apart) else _AGAIN)
        gates.stopped("reload", said, way_out, value=apart, limit=limit, error=VerifyError)
    if not moved > apart:
        what = f"{said}: the saved model is as good as the base"
        gates.stopped(
            "reload", what, "a higher learning rate, or more steps", value=moved, limit=apart, error=VerifyError
        )
    gates.passed("reload", said, value=apart, limit=limit)


def _worst(found: list[list[float]], expected: list[list[float]]) -> float:
    """The largest difference; not a number where any is not."""
    rows = [torch.tensor(pair, dtype=torch.float64) for pair in zip(found, expected, strict=True)]
    return torch.cat([(ours - theirs).abs() for ours, theirs in rows]).max().item()


def main(folder: Path) -> None:
    """Load the model of the run in `folder`, and what it was trained from; write what both make of the noted rows."""
    recipe = load(folder / "recipe.yaml").recipe
    live = rundir.read_json(folder / "logs" / "live.json")
    where = machine.detect()
    precision = where.precision(recipe.model.dtype)
    try:
        base = models.load_base(recipe, precision, where)
    except (OSError, AlignctlError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(NO_BASE)
    found: dict[str, Any] = {"base_fingerprint": models.base_fingerprint(base)}
    found["base"] = token_logps(base, live["ids"], precision)
    if recipe.trains_adapter:
        tuned = PeftModel.from_pretrained(base, folder / "model").eval()
    else:
        del base  # there may be room for one of them
        gc.collect()
        torch.cuda.empty_cache()
        tuned = models.load_base(_saved(recipe, folder / "model"), precision, where)
    found["logps"] = token_logps(tuned, live["ids"], precision)
    rundir.write_text(folder / "logs" / "reloaded.json", json.dumps(found))


def _saved(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` with the saved weights in the place of the base's."""
    changes = {"name_or_path": str(folder), "revision": None}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})


def run(folder: Path) -> None:
    """`main`, with an exit code of its own where memory runs out."""
    try:
        main(folder)
    except (RuntimeError, MemoryError, OSError) as error:
        if not (said := machine.out_of_memory(error)):
            raise
        print(said, file=sys.stderr)
        sys.exit(NO_MEMORY)


if __name__ == "__main__" and sys.stdin.readline():
    run(Path(sys.argv[1]))
