"""What came out of a run: summary, answers, and the gates that ask what the numbers mean."""

from __future__ import annotations

from typing import Any

import numpy

from alignctl import rundir
from alignctl.evaluate import scores, verdict
from alignctl.evaluate.generation import Answer
from alignctl.evaluate.scores import PairScores, RowScores
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir
from alignctl.statistics import wilson
from alignctl.train import facts, guards, heldout
from alignctl.train.data import Rows
from alignctl.train.gates import Gates
from alignctl.train.ledger import FIRST

# A rejected answer that the model itself wrote is likely; one that is likelier than the chosen one and is not the
# model's own hints at swapped columns. Mean log-probability a token.
OWN = -1.0
LABELS = 0.35
LENGTH = 0.8
FEWEST = 20
# Training pairs that are asked about where too few are held out.
ASKED = 64
# The gates that ask held-out rows alone.
HELD_OUT = ("length", "answers")


def kept(run: RunDir, when: str) -> dict[str, Any]:
    """What was measured `before` or `after` training."""
    return rundir.read_json(run / "logs" / f"{when}.json")


def answers(run: RunDir, when: str) -> list[Answer]:
    """The answers to held-out prompts `before` or `after` training."""
    return [Answer(**answer) for answer in kept(run, when)["answers"]]


def outcome(recipe: Recipe, run: RunDir, held_out: Rows | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """summary.json and the rows of samples.jsonl."""
    if held_out is None:
        return {"method": recipe.method, "verdict": "not measured: the recipe holds no rows out"}, []
    measured = {when: kept(run, when) for when in ("before", "after")}
    found = {when: scores.from_lists(values["scores"]) for when, values in measured.items()}
    samples = [
        {
            "prompt": heldout.prompt(row)[-1]["content"],
            "preferred": heldout.preferred(row),
            **{when: measured[when]["answers"][i]["text"] for when in measured},
            **{f"{when}_tokens": measured[when]["answers"][i]["tokens"] for when in measured},
            **{f"{when}_stopped": measured[when]["answers"][i]["stopped"] for when in measured},
        }
        for i, row in enumerate(heldout.asked(held_out, len(measured["before"]["answers"])))
    ]
    summary = {
        "method": recipe.method,
        **_judged(run, found, held_out),
        **{when: {"loss": measured[when]["loss"], **found[when].summary()} for when in measured},
        "samples": facts.sample_numbers(samples),
    }
    return summary, samples


def _judged(run: RunDir, found: dict[str, PairScores | RowScores], held_out: Rows) -> dict[str, Any]:
    """The verdict, its reason, and the paired difference that it comes from."""
    judged = scores.verdict(found["before"], found["after"], held_out.column("key"))
    given = {when: answers(run, when) for when in found}
    broken = verdict.collapsed(given["before"], given["after"]) if given["after"] else ""
    said = verdict.conclude([broken] if broken else [], [verdict.preference(judged)])
    return judged | {"verdict": said.word, "reason": said.reason}


def judge_before(run: RunDir, gates: Gates) -> None:
    """The gate `labels`, from the held-out pairs before training."""
    found = scores.from_lists(kept(run, "before")["scores"])
    if isinstance(found, PairScores) and gates.on("labels"):
        sides = found.chosen_logps_per_token, found.rejected_logps_per_token
        labels(*sides, f"{len(found.margins)} held-out pairs", gates)


def asked_of(rows: Rows, seed: int) -> tuple[Rows, str]:
    """Up to `ASKED` training pairs, and which they are, in words."""
    n = len(rows)
    if n <= ASKED:
        return rows, f"{n} training pairs (all of them{', too few to tell' if n < FEWEST else ''})"
    some = rows.some(sorted(numpy.random.default_rng(seed).permutation(n)[:ASKED]))
    first = ", ".join(some.place(i) for i in range(FIRST))
    return some, f"{ASKED} training pairs (picked with training.seed: {first} and {ASKED - FIRST} more)"


def labels(chosen: numpy.ndarray, rejected: numpy.ndarray, pairs: str, gates: Gates) -> None:
    """The gate `labels`: under the model that training starts from, which answers are the likelier ones?

    `chosen` and `rejected` are mean log-probabilities a token, `[n]`, of the `pairs` in words.
    """
    n, likelier = len(chosen), int((chosen > rejected).sum())
    high = wilson(likelier, n)[1]
    said = f"the model finds the chosen answer likelier in {likelier} of {pairs}"
    if n >= FEWEST and high < LABELS and rejected.mean() < OWN:
        way_out = "are chosen and rejected swapped? alignctl inspect shows the pairs"
        gates.warned("labels", said, way_out, value=round(likelier / n, 3), limit=LABELS)
    else:
        gates.passed("labels", said, value=round(likelier / n, 3), limit=LABELS)


def judge_after(run: RunDir, held_out: Rows, gates: Gates) -> None:
    """The gates `length` and `answers`, from the held-out rows after training."""
    found = scores.from_lists(kept(run, "after")["scores"])
    if isinstance(found, PairScores) and gates.on("length"):
        _length(found, held_out.lengths("chosen_ids") - held_out.lengths("rejected_ids"), gates)
    given = {when: answers(run, when) for when in ("before", "after")}
    if given["after"] and gates.on("answers"):
        guards.collapse(given["before"], given["after"], gates)


def _length(found: PairScores, longer: numpy.ndarray, gates: Gates) -> None:
    """Are the margins a matter of length? Their rank correlation with the difference in length, both ways."""
    n = len(longer)
    if n < FEWEST or not numpy.ptp(longer) or not numpy.ptp(found.margins):
        gates.passed("length", f"not measured: {n} held-out pairs")
        return
    correlation = float(numpy.corrcoef(_ranks(found.margins), _ranks(longer))[0, 1])
    said = f"margins and length differences of {n} held-out pairs correlate by {correlation:+.2f}"
    if abs(correlation) > LENGTH:
        which = "longer" if correlation > 0 else "shorter"
        way_out = "dpo.loss_type: sigmoid_norm, dpo.ld_alpha, or pairs of like length"
        said += f": the {which} answer wins, whatever it says"
        gates.warned("length", said, way_out, value=round(correlation, 3), limit=LENGTH)
    else:
        gates.passed("length", said, value=round(correlation, 3), limit=LENGTH)


def _ranks(values: numpy.ndarray) -> numpy.ndarray:
    """Ranks from 0 on; equal values share their mean rank."""
    found, where, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts + 1) / 2)[where] if len(found) else values
