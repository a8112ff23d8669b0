"""A run that is killed at random moments, and goes on each time: does it end as one that was never killed?

Prints where the kills fell, and exits 1 when a run ends with another bit in its weights or metrics than the
uninterrupted one, or when a checkpoint that counts is not whole.

python benchmarks/kills.py --kills 200
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faulty
import torch
import trials
import yaml

from alignctl import rundir
from alignctl.cli.main import main as command_line
from alignctl.rundir import RunDir

# What a run imports on its way: a process that is forked with all of it there begins at once.
ON_THE_WAY = (
    "alignctl.cli.app",
    "alignctl.cli.training",
    "alignctl.train.fit",
    "bitsandbytes.nn",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)
# What a clock or the machine decides.
MEASURED = ("tokens_per_second", "pairs_per_second", "peak_memory_gib", "peak_host_gib", "eta_seconds")
BEFORE, TRAINING = "before the first checkpoint", "while training"
WRITING, SAVING = "while a checkpoint was being written", "while the model was being saved, or after"


def recipe(model: Path) -> dict[str, Any]:
    """24 steps over six epochs with a checkpoint every third one, and all gates but the one that starts a process."""
    return {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": {"r": 4, "lora_dropout": 0.1},
        "data": {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.2},
        "training": {
            "learning_rate": 5e-4,
            "max_steps": 24,
            "save_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
        "dpo": {},
        "evaluation": {"samples": 0},
        "gates": {"reload": False},
        "trl": {"disable_dropout": False},
    }


def forked(work: Callable[[], object], log: Path) -> int:
    """The number of a new process that does `work`, writes to `log`, and exits 0 when all went well."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:  # noqa: BLE001 (nothing may go on in the child)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(number: int, seconds: float | None = None) -> int:
    """The exit code of a process, which is killed after `seconds`; -9 when it was."""
    handle = os.pidfd_open(number)
    if not select.select([handle], [], [], seconds)[0]:
        os.kill(number, signal.SIGKILL)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@dataclass
class Lab:
    """A folder with a recipe, and what its runs came to."""

    folder: Path
    chance: random.Random
    seconds: float = 0.0
    fell: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    anew: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def attempt(self, run: str, *options: str, seconds: float | None = None) -> int:
        """The exit code of `alignctl dpo`, which is killed after `seconds`."""

        def work() -> None:
            os.chdir(self.folder)
            sys.argv = ["alignctl", "dpo", "recipe.yaml", "--output", run, *options]
            command_line()

        return ended(forked(work, self.log), seconds)

    def whole(self) -> None:
        """The run that is not killed."""
        began = time.monotonic()
        self.check(self.attempt("whole"))
        self.seconds = time.monotonic() - began

    def check(self, code: int) -> None:
        if code:
            sys.exit(f"exit code {code}: {self.log.read_text(errors='replace')[-2000:]}")

    def killed_often(self, run: str, kills: int) -> None:
        """Train `run` to its end through `kills` kills at most."""
        folder, options = self.folder / run, []
        while True:
            before, last = unfinished(folder), sum(self.fell.values()) >= kills
            seconds = None if last else self.chance.uniform(0, self.seconds)
            code = self.attempt(run, *options, seconds=seconds)
            if code != -signal.SIGKILL:
                self.check(code)
                return
            found = RunDir(folder)
            self.fell[where(found, before)] += 1
            self.wrong += [f"{path} is not whole" for path in found.checkpoints() if not whole(path)]
            if found.status == "finished":
                return
            options = ["--resume"] if found.checkpoints() else ["--overwrite"]
            self.resumed += "--resume" in options
            self.anew += "--overwrite" in options

    def compare(self, run: str) -> None:
        ours, theirs = self.folder / run, self.folder / "whole"
        weights = "model/adapter_model.safetensors"
        if (ours / weights).read_bytes() != (theirs / weights).read_bytes():
            self.wrong.append(f"{run}: other weights")
        if metrics(ours) != metrics(theirs):
            self.wrong.append(f"{run}: other metrics")
        if unfinished(ours) or RunDir(ours).status != "finished":
            self.wrong.append(f"{run}: is not tidy")


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def whole(checkpoint: Path) -> bool:
    """Whether a checkpoint holds what it says."""
    return bool(rundir.read_json(checkpoint / rundir.NOTE)["files"] == rundir.digests(checkpoint))


def unfinished(run: Path) -> set[tuple[str, int]]:
    """What is being written in a run's folder."""
    found = [*run.glob("checkpoints/.writing/*"), *run.glob("model*")]
    return {(path.name, path.stat().st_ino) for path in found if path.name != "model" or not finished(run)}


def finished(run: Path) -> bool:
    return RunDir(run).record.get("status") == "finished"


def where(run: RunDir, before: set[tuple[str, int]]) -> str:
    """Where a kill fell; `before` is what an earlier one had left unfinished."""
    names = {name for name, _ in unfinished(run.path) - before}
    if finished(run.path) or names & {"model", "model.writing"}:
        return SAVING
    if names:
        return WRITING
    return TRAINING if run.checkpoints() else BEFORE


def made(folder: Path) -> None:
    """The tiny model, its rows and its recipe."""
    rows = "".join(json.dumps(row) + "\n" for row in faulty.pairs(20))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    model = trials.made(folder).model
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(model)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with trials.quiet():
        for name in ON_THE_WAY:
            importlib.import_module(name)
    began, runs = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["ALIGNCTL_CACHE"] = str(Path(name) / "cache")
        lab = Lab(Path(name), random.Random(args.seed))
        lab.check(ended(forked(lambda: made(lab.folder), lab.log)))
        lab.whole()
        while sum(lab.fell.values()) < args.kills and time.monotonic() - began < args.seconds:
            runs += 1
            lab.killed_often(f"run-{runs}", args.kills)
            lab.compare(f"run-{runs}")
    print(f"| {sum(lab.fell.values())} kills, seed {args.seed} | |\n|---|---|")
    for kind in (BEFORE, TRAINING, WRITING, SAVING):
        print(f"| {kind} | {lab.fell[kind]} |")
    print(f"\n{lab.resumed} times a run went on with --resume, {lab.anew} times it began anew with --overwrite.")
    equal = runs - len({line.partition(":")[0] for line in lab.wrong})
    print(f"{equal} of {runs} runs ended with the weights and metrics of the uninterrupted one, bit for bit.")
    print(f"{time.monotonic() - began:.0f} s; the uninterrupted run took {lab.seconds:.1f} s.")
    print(*lab.wrong, sep="\n")
    sys.exit(1 if lab.wrong else 0)


if __name__ == "__main__":
    main()
