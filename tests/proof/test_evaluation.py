"""`alignctl eval` as a whole: the conclusion from what was measured, and the command on real runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from alignctl.evaluate.generation import Answer
from alignctl.proof import evaluation, measure, tasks, trained
from alignctl.proof.likelihood import Scored
from alignctl.proof.measure import Measured
from alignctl.proof.table import Compared
from alignctl.recipe.load import load
from alignctl.recipe.schema import Recipe

GOOD, STUCK = Answer("one two three four five", 5, True), Answer("and " * 40, 40, False)


@pytest.fixture
def dpo() -> Recipe:
    values: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "p"}]}, "dpo": {"beta": 0.5}}
    return Recipe.model_validate(values | {"training": {"learning_rate": 1e-4}})


def measured(
    chosen: float, rejected: float, *, answers: Answer = GOOD, general: float = -10.0, drawn: float = -3.0
) -> Measured:
    """Twenty pairs of two tokens a side, with these log-probabilities an answer."""
    sums = numpy.array([numpy.full(20, chosen), numpy.full(20, rejected)])
    texts = Scored(numpy.full((1, 4), general), numpy.full((1, 4), 10.0))
    return Measured(
        Scored(sums, numpy.full((2, 20), 2.0)),
        texts,
        [answers] * 4,
        Scored(numpy.full((1, 4), drawn), numpy.full((1, 4), 6.0)),
    )


def compared(recipe: Recipe, reference: Measured, tuned: Measured) -> Compared:
    return Compared(recipe, True, reference, tuned, numpy.arange(20), numpy.arange(4))


def test_the_numbers_of_two_models_by_hand(dpo: Recipe) -> None:
    """Rewards: beta 0.5 times +2 and -1, so a margin of 1.5; KL: 4 nats an answer of 6 tokens."""
    both = compared(dpo, measured(-6, -4, drawn=-7.0), measured(-4, -5, answers=STUCK))
    found = {number.name: number for number in both.numbers()}
    margin, accuracy = found["reward_margin"], found["reward_accuracy"]
    assert margin.tuned is not None and margin.tuned.value == 1.5
    assert accuracy.reference is not None and accuracy.tuned is not None
    assert (accuracy.reference.value, accuracy.tuned.value, accuracy.n) == (0.5, 1.0, 20)
    by_token = found["normalised_accuracy"]
    assert by_token.reference is not None and by_token.tuned is not None
    assert (by_token.reference.value, by_token.tuned.value) == (0.0, 1.0)
    chosen = found["chosen_logps_per_token"]
    assert chosen.difference is not None and chosen.difference.value == 1.0
    assert [found[name].tuned.value for name in ("kl_per_answer", "kl_per_token")] == [4.0, pytest.approx(4 / 6)]  # type: ignore[union-attr]
    assert found["length_ratio"].tuned is not None and found["length_ratio"].tuned.value == 8.0
    assert found["stop_rate"].difference is not None and found["stop_rate"].difference.value == -1.0


@pytest.mark.parametrize(
    ("tuned", "word", "reason"),
    [
        (measured(-4, -5), "better", "rise of the reward margin"),
        (measured(-6, -4), "no evidence", "rise of the reward margin"),
        (measured(-7, -3), "worse", "rise of the reward margin"),
        (measured(-4, -5, answers=STUCK), "broken", "answers repeat themselves"),
        (measured(-4, -5, general=-18.0), "broken", "general text has become 2.2 times less likely"),
        (measured(float("nan"), -5), "broken", "not finite"),
    ],
)
def test_the_conclusion(dpo: Recipe, tuned: Measured, word: str, reason: str) -> None:
    found = evaluation.conclusion(compared(dpo, measured(-6, -4), tuned), [])
    assert found.word == word
    assert reason in found.reason


def test_orpo_is_judged_by_its_own_reward(dpo: Recipe) -> None:
    orpo = Recipe.model_validate(dpo.model_dump(exclude={"dpo"}) | {"orpo": {}})
    rising = compared(orpo, measured(-9, -4), measured(-6, -4))
    assert evaluation.conclusion(rising, []).word == "no evidence"  # the rejected answers are still the likelier ones
    assert evaluation.conclusion(compared(orpo, measured(-9, -4), measured(-3, -4)), []).word == "better"


def test_kl_is_that_of_the_distributions(finished: Callable[..., Path]) -> None:
    """Of answers of one token, KL(tuned ‖ start) can be summed over the whole vocabulary; the estimate agrees."""
    run = trained.opened(finished("dpo", training={"learning_rate": 5e-3, "max_steps": 12}))
    models, prompt = run.load(), [5, 9, 12, 40]
    settings = measure.Settings(400, 1, 7, 50, torch.float32)
    with torch.no_grad():
        tuned = models.tuned(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        drawn = measure.draw(models.tuned, run.encoder, [prompt] * 400, settings)
        ours = measure.likelihood.score(models.tuned, drawn.lines(), 0, torch.float32, 50)
        with models.start() as start:
            theirs = measure.likelihood.score(start, drawn.lines(), 0, torch.float32, 50)
            reference = start(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    exact = (tuned.exp() * (tuned - reference)).sum().item()
    each = (ours.sums - theirs.sums)[0]
    assert exact > 0.01
    assert each.mean() == pytest.approx(exact, abs=4 * each.std() / 20)


def test_results_of_the_harness_are_read() -> None:
    given = {
        "results": {"quiz": {"alias": "quiz", "acc,none": 0.75, "acc_stderr,none": 0.1, "ppl,none": 9, "name": "x"}},
        "n-samples": {"quiz": {"original": 8, "effective": 8}},
        "higher_is_better": {"quiz": {"acc": True, "ppl": False}},
    }
    found = tasks._read(given)
    assert found == {
        ("quiz", "acc"): tasks.Result(0.75, 0.1, 8, True),
        ("quiz", "ppl"): tasks.Result(9.0, 0.0, 8, False),
    }
    before = {key: replace(value, value=0.5) for key, value in found.items()}
    accuracy, ppl = tasks.numbers(before, found)
    assert (accuracy.name, accuracy.better, ppl.better) == ("quiz/acc", "higher", "lower")
    assert accuracy.tuned is not None and accuracy.tuned.interval == pytest.approx((0.554, 0.946), abs=1e-3)
    assert accuracy.reference is not None and accuracy.reference.value == 0.5


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_eval(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`alignctl eval …` in this process, in the workshop."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("ALIGNCTL_CACHE", str(workshop / "cache"))
    return lambda *arguments: here("eval", *arguments)


Eval = Callable[..., subprocess.CompletedProcess[str]]


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checkpoints"))
    return to


def test_eval_says_what_it_found_and_keeps_it(finished: Callable[..., Path], run_eval: Eval, tmp_path: Path) -> None:
    folder = copied(finished("dpo"), tmp_path / "run")
    (tmp_path / "rule.py").write_text("def short(prompt, answer):\n    return -len(answer)\n", encoding="utf-8")
    done = run_eval(str(folder), "--judge-rule", f"{tmp_path / 'rule.py'}:short")
    assert done.returncode == 0, done.stderr
    for said in ("reward accuracy", "KL per answer", "perplexity of general text", "win rate", "better: rise of the"):
        assert said in done.stdout
    kept = json.loads((folder / "evaluations" / "held-out.json").read_text(encoding="utf-8"))
    assert kept["verdict"] == "better" and kept["against"]["what"] == "start"
    assert {"preferences", "likelihood", "drift", "answers", "forgetting"} == {n["group"] for n in kept["numbers"]}
    assert len(kept["answers"]) == 4 and len(kept["rows"]["tuned"]["chosen_logps_per_token"]) == 8
    assert kept["judges"][0]["n"] == 4
    trained_with = json.loads((folder / "logs" / "after.json").read_text(encoding="utf-8"))["scores"]
    for side in ("chosen", "rejected"):
        column = f"{side}_logps_per_token"
        assert kept["rows"]["tuned"][column] == pytest.approx(trained_with[column], abs=1e-4)


def test_eval_as_a_command_of_its_own(finished: Callable[..., Path], workshop: Path, tmp_path: Path) -> None:
    folder = copied(finished("dpo"), tmp_path / "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNCTL_CACHE": str(workshop / "cache")}
    command = [sys.executable, "-m", "alignctl", "eval", str(folder), "--samples", "1"]
    done = subprocess.run(command, cwd=workshop, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"


def test_eval_prints_json_alone(finished: Callable[..., Path], run_eval: Eval, tmp_path: Path) -> None:
    folder = copied(finished("orpo"), tmp_path / "run")
    done = run_eval(str(folder), "--data", "other.jsonl", "--samples", "0", "--json")
    found = json.loads(done.stdout)
    assert found["answers"] == [] and found["data"]["overlap"] == 0
    assert (folder / "evaluations" / f"{found['name']}.json").is_file()


def test_eval_against_another_run_and_against_the_base(
    finished: Callable[..., Path], run_eval: Eval, tmp_path: Path
) -> None:
    folder = copied(finished("dpo"), tmp_path / "run")
    other = finished("orpo")
    names = set()
    for against in (str(other), "base"):
        done = run_eval(str(folder), "--against", against, "--samples", "2", "--json")
        assert done.returncode == 0, done.stderr
        names.add(json.loads(done.stdout)["name"])
    assert names == {f"held-out-against-{other.name}", "held-out-against-base"}
    kept = json.loads((folder / "evaluations" / f"held-out-against-{other.name}.json").read_text(encoding="utf-8"))
    theirs = json.loads((other / "logs" / "after.json").read_text(encoding="utf-8"))["scores"]
    assert kept["rows"]["reference"]["chosen_logps_per_token"] == pytest.approx(
        theirs["chosen_logps_per_token"], abs=1e-4
    )


def test_an_sft_run_is_evaluated_by_likelihood_and_on_pairs(
    finished: Callable[..., Path], run_eval: Eval, tmp_path: Path
) -> None:
    folder = copied(finished("sft"), tmp_path / "run")
    found = json.loads(run_eval(str(folder), "--json").stdout)
    assert {"nll", "kl_per_answer"} <= {number["name"] for number in found["numbers"]}
    found = json.loads(run_eval(str(folder), "--json", "--data", "test.jsonl").stdout)
    assert {"reward_accuracy", "normalised_margin"} <= {number["name"] for number in found["numbers"]}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nowhere",), 2, "is no run"),
        (("RUN", "--data", "nothing.jsonl"), 3, "no such file"),
        (("RUN", "--against", "nowhere"), 2, "is no run"),
        (("RUN", "--judge-url", "http://127.0.0.1:9"), 2, "--judge-model go together"),
        (("RUN", "--judge-rule", "rule.py"), 2, "FILE.py:FUNCTION"),
    ],
)
def test_what_cannot_be_evaluated(
    finished: Callable[..., Path], run_eval: Eval, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    folder = copied(finished("dpo"), tmp_path / "run")
    done = run_eval(*(str(folder) if word == "RUN" else word for word in arguments))
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not list((folder / "evaluations").glob("*.json"))


def test_a_recipe_of_the_run_is_what_was_trained(finished: Callable[..., Path]) -> None:
    assert load(finished("dpo") / "recipe.yaml").recipe == trained.opened(finished("dpo")).recipe
