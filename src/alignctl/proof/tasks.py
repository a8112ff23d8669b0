"""Benchmarks of lm-evaluation-harness, through its own API, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.evaluate.numbers import Estimate, Kind, Number
from alignctl.train.tokens import Encoder

_Z = 1.959963984540054


@dataclass(frozen=True)
class Result:
    """One metric of one task: its value, its standard error, how many items, and whether more is better."""

    value: float
    error: float
    n: int
    higher: bool


Results = dict[tuple[str, str], Result]


def check(names: Sequence[str]) -> None:
    """Stop before anything is loaded when the harness is not there.

    Raises:
        MachineError: it is not installed.
    """
    if names and importlib.util.find_spec("lm_eval") is None:
        raise MachineError(Problem("--tasks", "lm-eval is not installed", "pip install 'alignctl[lm-eval]'"))


def run(model: PreTrainedModel, encoder: Encoder, names: Sequence[str]) -> Results:
    """Every metric of the tasks `names` (or YAML files of tasks), under `model`.

    Raises:
        RecipeError: the harness knows no such task.
    """
    if not names:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=encoder.tokenizer, batch_size=8),
            tasks=list(names),
            log_samples=False,
            bootstrap_iters=1000,  # with none there are no standard errors
        )
    except (ValueError, KeyError) as error:
        raise RecipeError(Problem("--tasks", " ".join(str(error).split()), "lm-eval ls tasks")) from error
    return _read(found)


def _read(found: dict[str, Any]) -> Results:
    """`{"results": {task: {"acc,none": 0.5, "acc_stderr,none": 0.1, …}}}` as results."""
    out: Results = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            n = int(found["n-samples"][task]["effective"])
            higher = bool(found.get("higher_is_better", {}).get(task, {}).get(metric, True))
            out[task, metric] = Result(float(value), float(error) if isinstance(error, float) else 0.0, n, higher)
    return out


def numbers(reference: Results, tuned: Results) -> list[Number]:
    """The results of both models as numbers of an evaluation; their intervals are normal ones."""
    out = []
    for (task, metric), found in tuned.items():
        kind = Kind(f"{task}/{metric}", f"{task}, {metric}", "tasks", "", "higher" if found.higher else "lower")
        before = reference[task, metric]
        out.append(
            Number(**vars(kind), n=found.n, reference=_estimate(before), tuned=_estimate(found), difference=None)
        )
    return out


def _estimate(found: Result) -> Estimate:
    half = _Z * found.error
    return Estimate(found.value, (found.value - half, found.value + half))
