"""Silent faults of the rows (21 to 27): each is planted in a real run, with its gate on and off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from silence import LN2, WORDS, better, findings, logged, printed, read, rows_of, worse
from transformers import Trainer

from alignctl.train import trl_seam

Train = Callable[..., Any]
Plant = Callable[[Callable[[Trainer], object]], None]


# 21: chosen and rejected are swapped, or chance decided which is which.


@pytest.fixture
def taught(train: Train) -> dict[str, Any]:
    """Sections of a run that goes on from an adapter that has learned a little to give the better answers."""
    ran = train("sft", rows_of(16, better, worse), folder="taught", training={"max_steps": 10, "learning_rate": 5e-3})
    assert ran.code == 0, ran.err
    return {"model": {"adapter": "taught"}, "lora": None}


def test_chosen_and_rejected_are_swapped(train: Train, taught: dict[str, Any]) -> None:
    held_out: dict[str, Any] = taught | {"data": {"eval_fraction": 0.5}}
    ran = train("dpo", rows_of(40, worse, better), **held_out)
    assert ran.code == 0 and ran.verdict("labels") == "warned", ran.err
    found = ran.record["gates"]["labels"]
    assert found["said"] == "the model finds the chosen answer likelier in 0 of 20 held-out pairs"
    assert (found["value"], found["limit"]) == (0.0, 0.35)
    assert "warning: gate.labels: " in ran.out and "are chosen and rejected swapped?" in printed(ran)
    right = train("dpo", rows_of(40, better, worse), folder="right", **held_out)
    assert right.verdict("labels") == "passed" and right.record["gates"]["labels"]["value"] == 1.0
    off = train("dpo", rows_of(40, worse, better), gates={"labels": False}, folder="off", **held_out)
    assert off.code == 0 and off.verdict("labels") == "off" and "swapped" not in off.out


def test_chosen_and_rejected_are_swapped_and_none_are_held_out(train: Train, taught: dict[str, Any]) -> None:
    """Training pairs are asked; a few held-out pairs are too few to tell."""
    for folder, more in (("none", {}), ("few", {"data": {"eval_fraction": 0.1}})):
        ran = train("dpo", rows_of(70, worse, better), folder=folder, **taught, **more)
        assert ran.code == 0 and ran.verdict("labels") == "warned", ran.err
        if not more:
            said = ran.record["gates"]["labels"]["said"]
            assert said.startswith("the model finds the chosen answer likelier in 0 of 64 training pairs (picked with ")
            assert said.endswith("training.seed: rows.jsonl:1, rows.jsonl:2, rows.jsonl:3 and 61 more)")
        assert "are chosen and rejected swapped?" in printed(ran)
        assert ran.verdict("length") == "passed"
    right = train("dpo", rows_of(70, better, worse), folder="right", **taught)
    assert right.verdict("labels") == "passed" and right.record["gates"]["labels"]["value"] == 1.0
    off = train("dpo", rows_of(70, worse, better), gates={"labels": False}, folder="off", **taught)
    assert off.code == 0 and off.verdict("labels") == "off" and "swapped" not in off.out


def test_scores_that_contradict_the_columns(train: Train) -> None:
    scored = [
        row | {"score_chosen": 1.0 if i % 3 == 0 else 3.0, "score_rejected": 2.0}
        for i, row in enumerate(rows_of(16, better, worse))
    ]
    ran = train("dpo", scored)
    found = findings(ran)["scores.reversed"]
    assert ran.code == 0 and (found["rows"], found["first"][:2]) == (6, ["rows.jsonl:1", "rows.jsonl:4"])
    assert "note: scores.reversed: 6 of 16 rows (37.5%)" in printed(ran)


def test_labels_of_chance(train: Train) -> None:
    """Every pair stands there both ways."""
    rows = rows_of(4, better, worse)
    rows += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    whole = {"max_steps": 20, "per_device_train_batch_size": 8}
    ran = train("dpo", rows, training=whole)
    assert ran.code == 0 and ran.verdict("noise") == "warned", ran.err
    assert "ln 2 is what guessing gives: nothing was learned" in printed(ran)
    assert all(abs(loss - LN2) < 1e-3 for loss in logged(ran, "loss"))
    off = train("dpo", rows, training=whole, gates={"noise": False}, folder="off")
    assert off.code == 0 and off.verdict("noise") == "off" and "guessing" not in off.out


# 22: both answers are the same.


def test_answers_that_are_the_same(train: Train, plant: Plant) -> None:
    trainers: list[Trainer] = []
    plant(trainers.append)
    rows = rows_of(16, better, lambda i: better(i) + "  " if i % 2 else worse(i))
    ran = train("dpo", rows)
    assert ran.code == 3 and trainers == []
    assert "8 of 16 rows would be dropped" in ran.err
    assert "chosen equals rejected: 8 (first: rows.jsonl:2, rows.jsonl:4, rows.jsonl:6)" in ran.err
    some = train("dpo", rows, data={"max_dropped": 1.0}, folder="some")
    dropped = read(some, "ledger.json")["train"]["dropped"]
    assert some.code == 0 and dropped["chosen equals rejected"]["rows"] == 8
    assert len(trainers[0].train_dataset) == 8
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in trainers[0].train_dataset)


def test_the_way_out_fits_answers_that_are_the_same(train: Train) -> None:
    ran = train("dpo", rows_of(16, better, better))
    assert ran.code == 3 and "chosen equals rejected: 16" in ran.err and "data.max_length" not in ran.err


def test_answers_that_are_nearly_the_same(train: Train) -> None:
    long = " ".join(WORDS * 4)
    ran = train("dpo", rows_of(16, lambda i: f"{long} {i % 8}", lambda i: f"{long} {i % 8 + 1}"))
    assert ran.code == 0 and findings(ran)["answers.alike"]["rows"] == 16
    assert "both fall together" in printed(ran)


def test_answers_of_the_same_words(train: Train) -> None:
    ran = train("dpo", rows_of(16, better, lambda i: better(i).upper() + "!" if i % 2 else worse(i)))
    found = findings(ran)["answers.same_words"]
    assert (ran.code, found["rows"], found["first"]) == (0, 8, ["rows.jsonl:2", "rows.jsonl:4", "rows.jsonl:6"]), (
        ran.err
    )
    assert "note: answers.same_words: 8 of 16 rows (50.0%)" in printed(ran)


# 23: one word tells the pairs apart.


def test_pairs_that_one_word_tells_apart(train: Train) -> None:
    rows = rows_of(240, lambda i: f"good {better(i)}", lambda i: f"bad {better(i)}")
    ran = train("dpo", rows, training={"max_steps": 40})
    assert ran.code == 0 and {"shortcut.words", "shortcut.first_token"} <= findings(ran).keys(), ran.err
    assert "note: shortcut.words: 100.0%" in printed(ran)
    assert ran.verdict("easy") == "warned" and ran.record["gates"]["easy"]["step"] == 4
    assert "all of 12 pairs in a row were told apart by step 4 of 40" in printed(ran)
    assert logged(ran, "rewards/accuracies")[:4] == [0.0, 1.0, 1.0, 1.0]
    off = train("dpo", rows, training={"max_steps": 40}, gates={"easy": False}, folder="off")
    assert off.code == 0 and off.verdict("easy") == "off" and "told apart" not in off.out


# 24: length decides.


def test_the_longer_answer_wins(train: Train) -> None:
    rows = rows_of(64, lambda i: " ".join((WORDS * 3)[: 4 + i % 15]), lambda i: WORDS[i % 8])
    sections = {"training": {"max_steps": 8, "learning_rate": 3e-3}, "data": {"eval_fraction": 0.4}}
    ran = train("dpo", rows, evaluation={"samples": 2, "max_new_tokens": 8}, **sections)
    assert ran.code == 0 and ran.verdict("length") == "warned", ran.err
    found = ran.record["gates"]["length"]
    assert found["value"] > 0.9 and "the longer answer wins, whatever it says" in found["said"]
    assert "note: shortcut.length: " in ran.out and findings(ran)["shortcut.length"]["warns"]
    assert read(ran, "ledger.json")["train"]["chosen_longer"] == 1.0
    samples = read(ran, "summary.json")["samples"]
    tokens = [sum(row[f"{when}_tokens"] for row in read(ran, "samples.jsonl")) for when in ("before", "after")]
    assert samples["length_ratio"] == pytest.approx(tokens[1] / tokens[0])
    off = train("dpo", rows, gates={"length": False}, folder="off", **sections)
    assert off.code == 0 and off.verdict("length") == "off" and "whatever it says" not in off.out


# 25: the margin rises while the chosen answers become unlikely.


def test_chosen_answers_become_unlikely(train: Train) -> None:
    alike = [f"{WORDS[i % 4]} {WORDS[(i + 1) % 8]}" for i in range(16)]
    rows = rows_of(16, lambda i: f"{alike[i]} yes", lambda i: f"{alike[i]} no")
    sections = {"training": {"max_steps": 20, "learning_rate": 3e-3}, "dpo": {"loss_type": "apo_down"}}
    ran = train("dpo", rows, **sections)
    assert ran.code == 0 and ran.verdict("drift") == "warned", ran.err
    assert "chosen answers have become unlikelier: -0." in printed(ran) and "a higher beta" in printed(ran)
    chosen, rejected = (logged(ran, f"rewards/{side}")[-1] for side in ("chosen", "rejected"))
    assert 0 > chosen > rejected
    off = train("dpo", rows, gates={"drift": False}, folder="off", **sections)
    assert off.code == 0 and off.verdict("drift") == "off" and "unlikelier" not in off.out


def test_a_likelihood_term_of_the_wrong_sign(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = trl_seam.orpo_loss

    def wrong(*given: Any) -> Any:
        terms = loss(*given)
        return replace(terms, nll=-terms.nll)

    monkeypatch.setattr(trl_seam, "orpo_loss", wrong)
    ran = train("orpo", training={"max_steps": 12, "learning_rate": 5e-3})
    found = ran.record["gates"]["drift"]
    assert ran.code == 0 and found["verdict"] == "warned" and found["value"] < -0.3, ran.err
    assert found["value"] == pytest.approx(logged(ran, "logps/chosen")[-1] - logged(ran, "logps/chosen")[0], abs=1e-2)


# 26: answers fall into repetition, or no longer end.

COLLAPSE: dict[str, Any] = {
    "lora": None,
    "training": {"max_steps": 20, "learning_rate": 1e-2},
    "data": {"eval_fraction": 0.15},
    "evaluation": {"samples": 4, "max_new_tokens": 24},
}


def test_answers_repeat_themselves(train: Train) -> None:
    rows = rows_of(32, lambda i: "tea " * 30, better)
    asked = COLLAPSE | {"training": COLLAPSE["training"] | {"eval_steps": 15}}
    ran = train("sft", rows, **asked)
    assert ran.code == 0 and ran.verdict("answers") == "warned", ran.err
    assert ran.record["gates"]["answers"]["value"] == pytest.approx(1 / 23, abs=1e-3)  # 24 times tea: 23 pairs, one new
    assert "their word pairs are new; before training 0% and" in printed(ran)
    assert printed(ran).index("warning: gate.answers") < printed(ran).index("step 20/20")
    off = train("sft", rows, gates={"answers": False}, folder="off", **asked)
    assert off.code == 0 and off.verdict("answers") == "off" and "warning: gate.answers" not in off.out


def test_answers_repeat_themselves_without_a_space(train: Train) -> None:
    ran = train("sft", rows_of(32, lambda i: "ha" * 40, better), **COLLAPSE)
    assert all("hahahaha" in row["after"] for row in read(ran, "samples.jsonl"))
    assert ran.verdict("answers") == "warned"


def test_answers_no_longer_end(train: Train) -> None:
    first = train("sft", rows_of(32, lambda i: "tea", better), folder="first", **COLLAPSE)
    assert first.record["gates"]["answers"]["said"].startswith("100% of 4 answers end")
    cut = COLLAPSE["data"] | {"max_length": 40, "overlong": "truncate_completion"}
    rows = rows_of(32, lambda i: " ".join([*WORDS, *map(str, range(9))]), better)
    ran = train("sft", rows, **COLLAPSE | {"model": {"name_or_path": "first/model"}, "data": cut})
    assert ran.code == 0 and ran.verdict("answers") == "warned", ran.err
    said = ran.record["gates"]["answers"]["said"]
    assert said.startswith("0% of 4 answers end") and "before training 100%" in said
    assert findings(ran)["rows.answer_cut"]["rows"] == read(ran, "ledger.json")["train"]["kept"]
    assert "learns not to stop" in printed(ran)


# 27: held-out prompts are trained on.


def test_held_out_prompts_in_the_training_rows(train: Train, plant: Plant, tmp_path: Path) -> None:
    trainers: list[Trainer] = []
    plant(trainers.append)
    held_out = [rows_of(4, better, worse)[0], {"prompt": "SAY  1. ", "chosen": "tea", "rejected": "rain"}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    ran = train("dpo", rows_of(16, better, worse), data={"eval": [{"path": "held.jsonl"}]})
    assert ran.code == 3 and "prompt is in the held-out rows: 2 (first: rows.jsonl:1, rows.jsonl:2)" in ran.err
    some = train("dpo", rows_of(16, better, worse), data={"eval": [{"path": "held.jsonl"}], "max_dropped": 1.0})
    assert some.code == 0 and findings(some)["eval.seen"]["rows"] == 2, some.err
    assert "note: eval.seen: 2 of 16 rows (12.5%)" in printed(some)
    trained, kept = (
        {tuple(row["prompt_ids"]) for row in part} for part in (trainers[0].train_dataset, trainers[0].eval_dataset)
    )
    assert len(trained) == 14 and len(kept) == 2 and trained.isdisjoint(kept)


def test_the_way_out_fits_held_out_prompts(train: Train) -> None:
    ran = train("dpo", rows_of(16, better, worse), data={"eval": [{"path": "rows.jsonl"}]})
    assert ran.code == 3 and "held-out rows: 16" in ran.err and "data.max_length" not in ran.err


def test_a_share_held_out_holds_whole_prompts(train: Train, plant: Plant) -> None:
    """Every prompt stands in four rows; no prompt is on both sides."""
    trainers: list[Trainer] = []
    plant(trainers.append)
    rows = [row | {"prompt": f"Say {i % 4}."} for i, row in enumerate(rows_of(16, better, worse))]
    ran = train("dpo", rows, data={"eval_fraction": 0.3})
    assert ran.code == 0, ran.err
    (trainer,) = trainers
    trained, kept = ([tuple(r["prompt_ids"]) for r in part] for part in (trainer.train_dataset, trainer.eval_dataset))
    assert (len(trained), len(kept)) == (12, 4) and set(trained).isdisjoint(kept)
