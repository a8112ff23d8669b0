"""What the log of a run and its answers say of it while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignctl.evaluate.generation import Answer
from alignctl.recipe.schema import Recipe
from alignctl.train import guards
from alignctl.train.gates import Gates, Result
from alignctl.train.guards import Answers, Signs

MakeGates = Callable[..., Gates]
CONTROL = TrainerControl()


def at(step: int, last: int = 1000) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


# --- signs --------------------------------------------------------------------------------------------------------


def signs(gates: Gates, method: str = "dpo", *, batch: int = 4, passes: int = 1, **section: Any) -> Signs:
    """For rows whose chosen answers have 3 tokens on average."""
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": [{"path": "p"}]},
            "training": {
                "learning_rate": 1e-4,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": passes,
            },
            method: {"beta": 0.1, **section},
        }
    )
    rows: Any = SimpleNamespace(lengths=lambda name: {"chosen_ids": numpy.array([2, 4])}[name])
    return Signs(recipe, rows, gates)


def log(guard: Signs, args: TrainingArguments, lines: Iterable[dict[str, float]], last: int = 1000) -> None:
    """Log lines of consecutive steps."""
    plain = {"loss": 0.5, "rewards/chosen": 0.0, "logps/chosen": -1.0, "rewards/accuracies": 0.5}
    for step, line in enumerate(lines, 1):
        guard.on_log(args, at(step, last), CONTROL, logs=plain | line)


def test_chosen_answers_that_become_unlikely(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    """A reward of -0.12 is -1.2 nats an answer of 3 tokens; three lines in a row."""
    gates = make_gates()
    guard = signs(gates)
    low, high = {"rewards/chosen": -0.12}, {"rewards/chosen": -0.06}
    log(guard, args, [low, low, high, low, low])
    assert "drift" not in gates.results
    guard.on_log(args, at(6), CONTROL, logs={"loss": 0.5, "rewards/accuracies": 0.5, **low})
    assert gates.results["drift"] == Result(
        "warned", "chosen answers have become unlikelier: -0.40 nats a token", -0.4, -0.3, 6
    )
    log(guard, args, [high] * 3)
    assert gates.results["drift"].verdict == "warned" and len(said) == 1 and "higher beta" in said[0]


def test_a_little_less_likely_is_usual(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates()
    guard = signs(gates)
    log(guard, args, [{"rewards/chosen": -0.089}] * 9)
    guard.on_train_end(args, at(9), CONTROL)
    assert gates.results["drift"] == Result("passed", "chosen answers: -0.30 nats a token", -0.297, -0.3) and not said


def test_orpo_is_held_against_its_first_line(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates = make_gates()
    guard = signs(gates, "orpo")
    log(guard, args, [{"logps/chosen": value} for value in (-9.0, -9.25, -9.25, -9.25)])
    guard.on_train_end(args, at(4), CONTROL)
    assert (gates.results["drift"].verdict, gates.results["drift"].value) == ("passed", -0.25)
    log(signs(gates, "orpo"), args, [{"logps/chosen": value} for value in (-2.0, -2.25, -2.35, -2.35, -2.4)])
    assert gates.results["drift"] == Result(
        "warned", "chosen answers have become unlikelier: -0.40 nats a token", -0.4, -0.3, 5
    )


def test_the_way_out_of_orpo_is_no_key_of_dpo(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    log(signs(make_gates(), "orpo"), args, [{"logps/chosen": value} for value in (-2.0, -3.0, -3.0, -3.0)])
    assert len(said) == 1 and said[0].endswith(" — a lower learning rate holds them")


RIGHT = {"rewards/accuracies": 1.0}


def test_pairs_that_are_told_apart_at_once(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates()
    guard = signs(gates)
    log(guard, args, [RIGHT] * 2, 30)
    assert "easy" not in gates.results
    log(guard, args, [{"rewards/accuracies": 0.75}, *[RIGHT] * 2], 30)
    assert "easy" not in gates.results
    log(signs(gates), args, [RIGHT] * 3, 30)
    found = gates.results["easy"]
    assert (found.verdict, found.said) == ("warned", "all of 12 pairs in a row were told apart by step 3 of 30")
    assert len(said) == 1 and "alignctl check" in said[0]
    guard.on_train_end(args, at(30), CONTROL)
    assert gates.results["easy"].verdict == "warned"


@pytest.mark.parametrize(
    ("batch", "passes", "lines", "last", "warns"),
    [
        (4, 1, 3, 29, False),  # step 3 is beyond a tenth of 29
        (3, 1, 3, 30, False),  # 9 pairs say little
        (3, 1, 4, 40, True),
        (2, 2, 3, 30, True),
        (1, 1, 11, 120, False),
        (1, 1, 12, 120, True),
    ],
)
def test_how_early_and_how_many(
    args: TrainingArguments, make_gates: MakeGates, batch: int, passes: int, lines: int, last: int, warns: bool
) -> None:
    gates = make_gates()
    guard = signs(gates, batch=batch, passes=passes)
    log(guard, args, [RIGHT] * lines, last)
    guard.on_train_end(args, at(last, last), CONTROL)
    assert gates.results["easy"].verdict == ("warned" if warns else "passed")


def test_a_log_line_may_stand_for_several_steps(args: TrainingArguments, make_gates: MakeGates) -> None:
    args.logging_steps, gates = 5, make_gates()
    guard = signs(gates, batch=1)
    for step in (5, 10, 15):
        guard.on_log(args, at(step, 150), CONTROL, logs={"loss": 0.5, "rewards/chosen": 0.0, **RIGHT})
    assert gates.results["easy"].said.startswith("all of 15 pairs in a row")


def ended(gates: Gates, args: TrainingArguments, losses: list[float], method: str = "dpo", **section: Any) -> None:
    guard = signs(gates, method, **section)
    log(guard, args, [{"loss": loss} for loss in losses])
    guard.on_train_end(args, at(len(losses)), CONTROL)


@pytest.mark.parametrize(
    ("losses", "verdict", "loss"),
    [
        ([0.4] * 15 + [0.6951, 0.6971] * 2 + [0.6961], "warned", 0.6961),  # 0.003 above ln 2
        ([0.4] * 15 + [0.6891] * 5, "warned", 0.6891),
        ([0.4] * 15 + [0.7] * 5, "passed", 0.7),
        ([0.69] * 15 + [0.5] * 5, "passed", 0.5),
        ([0.69] * 16 + [0.49] * 4, "passed", 0.53),  # (0.69 + 4 * 0.49) / 5
        ([0.6931] * 19, "passed", 0.6931),  # too short to tell
    ],
)
def test_a_loss_that_ends_at_ln_2(
    args: TrainingArguments, make_gates: MakeGates, losses: list[float], verdict: str, loss: float
) -> None:
    gates = make_gates()
    ended(gates, args, losses)
    found = gates.results["noise"]
    assert (found.verdict, found.value) == (verdict, loss) and f"the loss ended at {loss:.4f}" in found.said
    assert (found.limit == 0.6931) and ("ln 2" in found.said) is (verdict == "warned")


def test_ln_2_means_nothing_to_other_losses(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates = make_gates(noise=True)
    ended(gates, args, [0.6931] * 20, "orpo")
    ended(gates, args, [0.6931] * 20, loss_type="ipo")
    ended(gates, args, [0.6931] * 20, loss_type=["sigmoid", "sft"])
    assert "noise" not in gates.results and gates.results["easy"].verdict == "passed"


def test_no_log_line_is_no_loss(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates = make_gates()
    ended(gates, args, [])
    assert gates.results["noise"] == Result("passed", "not measured: nothing was logged")


def test_lines_that_are_no_log_of_training(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates = make_gates()
    guard = signs(gates)
    for logs in ({"eval_loss": 0.5, "eval_rewards/chosen": -9.0}, {"train_loss": 0.5}, {"loss": 0.5, "entropy": 1.0}):
        guard.on_log(args, at(1), CONTROL, logs=logs)
    assert gates.results == {}


def test_signs_that_are_switched_off(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates(drift=False, easy=False, noise=False)
    guard = signs(gates)
    log(guard, args, [{"loss": 0.6931, "rewards/chosen": -9.0, **RIGHT}] * 20)
    guard.on_train_end(args, at(20), CONTROL)
    assert {found.verdict for found in gates.results.values()} == {"off"} and not said


# --- answers ------------------------------------------------------------------------------------------------------


def answers(text: str, ended: int = 4) -> list[Answer]:
    """Four answers, of which so many end."""
    return [Answer(text, len(text.split()), i < ended) for i in range(4)]


FRESH, LOOPS = "one two three four five", "tea tea tea tea tea"  # 4 of 4 and 1 of 4 pairs of words are new


def test_answers_that_repeat_themselves(make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates()
    guards.collapse(answers(FRESH), answers(LOOPS), gates, 7)
    found = gates.results["answers"]
    assert (found.verdict, found.value, found.limit, found.step) == ("warned", 0.25, 0.5, 7)
    assert found.said == "100% of 4 answers end, and 25% of their word pairs are new; before training 100% and 100%"
    assert len(said) == 1 and "samples.jsonl" in said[0]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (answers(FRESH), answers(FRESH), "passed"),
        (answers(LOOPS), answers(LOOPS), "passed"),  # they did so before
        (answers("a a a b a"), answers("a a a a b"), "passed"),  # from 3 of 4 to 2 of 4, which is enough
        (answers("a a a a b c"), answers("a a a a a a"), "warned"),  # from 3 of 5 to 1 of 5
        (answers(FRESH, 4), answers(FRESH, 2), "warned"),
        (answers(FRESH, 4), answers(FRESH, 3), "passed"),
        (answers(FRESH, 0), answers(FRESH, 0), "passed"),
        (answers(FRESH, 0), answers(FRESH, 4), "passed"),
    ],
)
def test_what_answers_did_before(
    make_gates: MakeGates, before: list[Answer], after: list[Answer], verdict: str
) -> None:
    gates = make_gates()
    guards.collapse(before, after, gates)
    assert gates.results["answers"].verdict == verdict


def test_answers_are_asked_for_at_every_evaluation(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates, given = make_gates(), [answers(FRESH), answers(LOOPS)]
    guard = Answers(lambda: given.pop(0), answers(FRESH), gates)
    guard.on_evaluate(args, at(5), CONTROL)
    assert (gates.results["answers"].verdict, gates.results["answers"].step) == ("passed", 5)
    guard.on_evaluate(args, at(10), CONTROL)
    assert (gates.results["answers"].verdict, gates.results["answers"].step) == ("warned", 10)
