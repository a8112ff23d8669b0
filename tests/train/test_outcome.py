"""What the numbers of a run mean: hand-made scores before and after training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir, write_json
from alignctl.train import data, outcome
from alignctl.train.data import Rows
from alignctl.train.gates import Gates, Result
from alignctl.train.tokens import Encoder

MakeGates = Callable[..., Gates]
Numbers = list[float]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "logs").mkdir()
    return RunDir(tmp_path)


def scored(
    run: RunDir, when: str, chosen: Numbers, rejected: Numbers, answers: list[dict[str, Any]] | None = None
) -> None:
    """Held-out pairs whose rewards and log-probabilities a token are these."""
    scores = {
        f"{side}_{what}": numbers
        for side, numbers in (("chosen", chosen), ("rejected", rejected))
        for what in ("rewards", "logps_per_token")
    }
    write_json(run / "logs" / f"{when}.json", {"loss": 0.5, "scores": scores, "answers": answers or []})


# --- labels -------------------------------------------------------------------------------------------------------


def likelier(run: RunDir, count: int, of: int, rejected: float) -> None:
    """The chosen answer is the likelier one in `count` of `of` pairs."""
    scored(run, "before", [rejected + 0.5] * count + [rejected - 0.5] * (of - count), [rejected] * of)


@pytest.mark.parametrize(
    ("count", "of", "rejected", "verdict"),
    [
        (2, 20, -1.5, "warned"),  # Wilson's interval ends at 0.301
        (3, 20, -1.5, "passed"),  # at 0.360
        (25, 100, -1.5, "warned"),  # at 0.343
        (26, 100, -1.5, "passed"),  # at 0.354
        (0, 19, -1.5, "passed"),  # too few to tell
        (0, 20, -1.01, "warned"),
        (0, 20, -0.99, "passed"),  # the model's own answers
        (20, 20, -1.5, "passed"),
    ],
)
def test_most_rejected_answers_are_the_likelier_ones(
    run: RunDir, make_gates: MakeGates, said: list[str], count: int, of: int, rejected: float, verdict: str
) -> None:
    likelier(run, count, of, rejected)
    gates = make_gates()
    outcome.judge_before(run, gates)
    assert gates.results["labels"] == Result(
        verdict,  # type: ignore[arg-type]
        f"the model finds the chosen answer likelier in {count} of {of} held-out pairs",
        count / of,
        0.35,
    )
    assert ["swapped?" in line for line in said] == [True] * (verdict == "warned")


def test_the_training_pairs_that_are_asked(
    write_rows: Callable[..., Path], data_recipe: Callable[..., Recipe], encoder: Encoder
) -> None:
    def rows(count: int) -> Rows:
        file = write_rows({"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count))
        return data.prepare(data_recipe("dpo", file), encoder)[0]

    few, enough, many = rows(19), rows(64), rows(200)
    assert outcome.asked_of(few, 1) == (few, "19 training pairs (all of them, too few to tell)")
    assert outcome.asked_of(enough, 1) == (enough, "64 training pairs (all of them)")
    some, which = outcome.asked_of(many, 1)
    places = [some.place(i) for i in range(len(some))]
    assert len(set(places)) == 64 and places == sorted(places, key=lambda place: int(place.split(":")[1]))
    assert which == f"64 training pairs (picked with training.seed: {', '.join(places[:3])} and 61 more)"
    assert outcome.asked_of(many, 1)[1] == which != outcome.asked_of(many, 2)[1]


def test_equal_answers_are_not_likelier(run: RunDir, make_gates: MakeGates) -> None:
    scored(run, "before", [-2.0] * 20, [-2.0] * 20)
    gates = make_gates()
    outcome.judge_before(run, gates)
    assert (gates.results["labels"].verdict, gates.results["labels"].value) == ("warned", 0.0)


def test_rows_have_no_labels(run: RunDir, make_gates: MakeGates) -> None:
    write_json(run / "logs" / "before.json", {"scores": {"nll": [1.0] * 20}, "answers": []})
    gates = make_gates()
    outcome.judge_before(run, gates)
    assert gates.results == {}


def test_labels_are_not_asked_when_the_gate_is_off(run: RunDir, make_gates: MakeGates) -> None:
    likelier(run, 0, 20, -2.0)
    gates = make_gates(labels=False)
    outcome.judge_before(run, gates)
    assert gates.results["labels"].verdict == "off"


# --- length -------------------------------------------------------------------------------------------------------


def held_out(longer: list[int]) -> Any:
    """Rows whose chosen answers are so many tokens longer than the rejected ones, of 100."""
    lengths = {"chosen_ids": numpy.array([100 + n for n in longer]), "rejected_ids": numpy.array([100] * len(longer))}
    return SimpleNamespace(lengths=lengths.__getitem__)


def judged(run: RunDir, gates: Gates, margins: Numbers, longer: list[int]) -> Result:
    scored(run, "before", margins, [0.0] * len(margins))
    scored(run, "after", margins, [0.0] * len(margins))
    outcome.judge_after(run, held_out(longer), gates)
    return gates.results["length"]


def exchanged(i: int, j: int, count: int = 20) -> list[int]:
    """0, 1, … with two of them exchanged."""
    numbers = list(range(count))
    numbers[i], numbers[j] = j, i
    return numbers


@pytest.mark.parametrize(
    ("longer", "correlation", "meaning"),
    [
        (list(range(20)), 1.0, "the longer answer wins"),
        (list(range(20))[::-1], -1.0, "the shorter answer wins"),
        (exchanged(0, 11), 0.818, "the longer answer wins"),  # 1 - 6 * 2 * 11² / (20 * (20² - 1))
        (exchanged(0, 12), 0.783, ""),
        (exchanged(0, 12)[::-1], -0.783, ""),
    ],
)
def test_margins_that_rank_as_the_lengths_do(
    run: RunDir, make_gates: MakeGates, longer: list[int], correlation: float, meaning: str
) -> None:
    """What ranks alike need not grow alike."""
    found = judged(run, make_gates(), [1.5**i for i in range(20)], longer)
    assert found.verdict == ("warned" if meaning else "passed") and (found.value, found.limit) == (correlation, 0.8)
    words = f"margins and length differences of 20 held-out pairs correlate by {correlation:+.2f}"
    assert found.said == (f"{words}: {meaning}, whatever it says" if meaning else words)


@pytest.mark.parametrize(
    ("margins", "longer"),
    [
        ([1.0 * i for i in range(19)], list(range(19))),
        ([1.0 * i for i in range(20)], [0] * 20),
        ([0.0] * 20, list(range(20))),
        ([1.0 * i for i in range(20)], [3] * 20),
        ([0.5] * 20, list(range(20))),
    ],
)
def test_what_cannot_be_ranked(run: RunDir, make_gates: MakeGates, margins: Numbers, longer: list[int]) -> None:
    found = judged(run, make_gates(), margins, longer)
    assert (found.verdict, found.said, found.value) == ("passed", f"not measured: {len(longer)} held-out pairs", None)


def test_length_is_not_asked_when_the_gate_is_off(run: RunDir, make_gates: MakeGates) -> None:
    assert judged(run, make_gates(length=False), [1.0 * i for i in range(20)], list(range(20))).verdict == "off"


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ([5, 1, 3], [2, 0, 1]),
        ([3, 1, 3, 2], [2.5, 0, 2.5, 1]),
        ([7, 7, 7], [1, 1, 1]),
        ([-1, -1, 0, 4, 4, 4], [0.5, 0.5, 2, 4, 4, 4]),
        ([], []),
    ],
)
def test_equal_values_share_their_mean_rank(values: list[int], ranks: list[float]) -> None:
    assert outcome._ranks(numpy.array(values)).tolist() == ranks


# --- answers ------------------------------------------------------------------------------------------------------


def answer(text: str, *, stopped: bool = True) -> dict[str, Any]:
    return {"text": text, "tokens": len(text.split()), "stopped": stopped}


@pytest.mark.parametrize(
    ("after", "verdict"), [("one two three four", "passed"), ("tea tea tea tea", "warned"), (None, "silent")]
)
def test_answers_after_training(run: RunDir, make_gates: MakeGates, after: str | None, verdict: str) -> None:
    scored(run, "before", [0.0], [0.0], [answer("one two three four")] if after else [])
    scored(run, "after", [0.0], [0.0], [answer(after)] if after else [])
    gates = make_gates()
    outcome.judge_after(run, held_out([1]), gates)
    found = gates.results.get("answers")
    assert (found.verdict if found else "silent") == verdict


def test_answers_are_not_asked_when_the_gate_is_off(run: RunDir, make_gates: MakeGates) -> None:
    scored(run, "before", [0.0], [0.0], [answer("one two three four")])
    scored(run, "after", [0.0], [0.0], [answer("tea tea tea tea")])
    gates = make_gates(answers=False)
    outcome.judge_after(run, held_out([1]), gates)
    assert gates.results["answers"].verdict == "off"


# --- summary and samples ------------------------------------------------------------------------------------------


def test_nothing_is_held_out(run: RunDir, data_recipe: Callable[..., Recipe]) -> None:
    recipe = data_recipe("orpo", Path("unused.jsonl"))
    assert outcome.outcome(recipe, run, None) == (
        {"method": "orpo", "verdict": "not measured: the recipe holds no rows out"},
        [],
    )


def test_before_and_after_side_by_side(
    run: RunDir, write_rows: Callable[..., Path], data_recipe: Callable[..., Recipe], encoder: Encoder
) -> None:
    file = write_rows({"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8))
    recipe = data_recipe("dpo", file)
    rows, _ = data.prepare(recipe, encoder)
    scored(run, "before", [0.0] * 8, [0.0] * 8, [answer("a b", stopped=False), answer("c")])
    scored(run, "after", [0.5] * 8, [-0.5] * 8, [answer("d e f"), answer("g")])
    summary, samples = outcome.outcome(recipe, run, rows)
    assert (summary["verdict"], summary["difference"]) == ("better", 1.0)
    assert (summary["before"]["margin"], summary["after"]["margin"], summary["after"]["loss"]) == (0.0, 1.0, 0.5)
    assert summary["samples"] == {
        "n": 2,
        "mean_tokens": {"before": 1.5, "after": 2.0},
        "length_ratio": 2.0 / 1.5,
        "stop_rate": {"before": 0.5, "after": 1.0},
    }
    assert samples[0] == {
        "prompt": "Say 0.",
        "preferred": "yes 0",
        "before": "a b",
        "after": "d e f",
        "before_tokens": 2,
        "after_tokens": 3,
        "before_stopped": False,
        "after_stopped": True,
    }
    assert [sample["prompt"] for sample in samples] == ["Say 0.", "Say 1."]
    json.dumps(summary, allow_nan=False)
