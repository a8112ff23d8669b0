"""What the gates cost: the seconds that a real run spends in each, beside all of its seconds.

Trains demo-dpo (SmolLM2-135M, LoRA) for 200 steps in this process, with a clock around every gate.

python benchmarks/gates.py
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairs import facts, heading

from alignctl.cli.main import main as command_line
from alignctl.train import fit, guards, machine, outcome, preflight, verify

SPENT: dict[str, float] = defaultdict(float)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its seconds added up under `name`."""

    @functools.wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            SPENT[name] += time.perf_counter() - began

    return run


def watch() -> None:
    """Put a clock around every gate."""
    for name in ("targets", "quantized", "trainable", "learning_rate", "parent", "memory", "reference"):
        setattr(preflight, name, timed(name, getattr(preflight, name)))
    fit._engine = timed("packed", fit._engine)
    events = ("_look", "on_train_begin", "on_pre_optimizer_step", "on_step_end", "on_log", "on_train_end")
    kinds = {"finite": guards.Finite, "trainable": guards.Optimizer, "moved": guards.Moved, "signs": guards.Signs}
    for name, kind in kinds.items():
        for event in set(events) & set(vars(kind)):
            setattr(kind, event, timed(name, getattr(kind, event)))
    fit._ask_labels = timed("labels", fit._ask_labels)
    outcome.judge_after = timed("length, answers", outcome.judge_after)
    verify.note_live = timed("reload", verify.note_live)
    verify.scan = timed("saved", verify.scan)
    verify.begin = timed("reload", verify.begin)
    verify.reload = timed("reload", verify.reload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    found = facts(machine.detect())
    watch()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"training.max_steps={args.steps}", "evaluation.samples=8", "--output", str(Path(folder) / "run")]
        sys.argv = ["alignctl", "dpo", "demo-dpo", *overrides]
        began = time.perf_counter()
        try:
            command_line()
        except SystemExit as ended:  # as a command ends
            if ended.code:
                raise
        whole = time.perf_counter() - began
    print(heading(found))
    print(f"| gate | seconds | of {whole:.0f} |\n|---|---|---|")
    for name, seconds in sorted(SPENT.items(), key=lambda each: -each[1]):
        print(f"| {name} | {seconds:.2f} | {seconds / whole:.2%} |")
    print(f"| all | {sum(SPENT.values()):.2f} | {sum(SPENT.values()) / whole:.2%} |")


if __name__ == "__main__":
    main()
