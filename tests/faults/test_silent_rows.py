"""Silent faults of rows (8 to 10, 18, 20): each is given to a real run, which refuses it, counts it or sees through."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.formats.rows import assistant, user

Train = Callable[..., Any]
Here = Callable[..., subprocess.CompletedProcess[str]]
Row = dict[str, Any]

STOP = "<|im_end|>"
LONG = "river " * 200
SHORT = {"max_length": 64}
CUT = SHORT | {"overlong": "truncate_completion"}
MESSAGES: dict[str, Any] = {"train": [{"path": "rows.jsonl"}]}


def rows(count: int = 16, **values: str) -> list[Row]:
    """Pairs; `values` take the place of every fourth one's, from the first on."""
    pairs = [
        {"prompt": f"Say {i} and tea.", "chosen": f"tea {i} rain", "rejected": f"rain {i} tea"} for i in range(count)
    ]
    return [row | values if i % 4 == 0 else row for i, row in enumerate(pairs)]


def ledger(ran: Any) -> Row:
    """What became of the training rows."""
    return dict(json.loads((ran.folder / "ledger.json").read_text(encoding="utf-8"))["train"])


def warned(ran: Any) -> set[str]:
    found = json.loads((ran.folder / "ledger.json").read_text(encoding="utf-8"))["findings"]
    return {finding["name"] for finding in found if finding["warns"]}


def shown(here: Here, row: int, *options: str) -> dict[str, list[str]]:
    """The texts of a kept row's sides, as the last recipe makes the model see them: given and trained by turns."""
    done = here("inspect", "r.yaml", "--row", str(row), "--json", *options)
    assert done.returncode == 0, done.stderr
    sides = json.loads(done.stdout)["sides"]
    assert all([span["supervised"] for span in spans[:2]] == [False, True] for spans in sides.values())
    return {side: [span["text"] for span in spans] for side, spans in sides.items()}


# 8: rows whose answer is empty, from the start or after cutting.


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_empty_answers(train: Train, here: Here, method: str) -> None:
    given = rows(chosen=" \n")
    ran = train(method, given)
    assert ran.code == 3 and ran.record["status"] == "failed"
    assert "data.train: 4 of 16 rows would be dropped, more than data.max_dropped (5%): empty answer: 4 (" in ran.err
    assert "first: rows.jsonl:1, rows.jsonl:5, rows.jsonl:9" in ran.err
    ran = train(method, given, data={"max_dropped": 0.5}, folder="fewer")
    assert ran.code == 0 and ran.verdict("finite") == ran.verdict("saved") == "passed"
    assert ledger(ran)["kept"] == 12
    assert next(iter(shown(here, 1).values()))[1] == f"tea 1 rain{STOP}"


def test_prompts_that_leave_no_answer(train: Train) -> None:
    """One such row makes every weight NaN in TRL's ORPO."""
    ran = train("orpo", rows(prompt=LONG), data=CUT)
    assert ran.code == 3 and "prompt leaves no room for an answer: 4 (first: rows.jsonl:1" in ran.err
    ran = train("orpo", rows(prompt=LONG), data=CUT | {"max_dropped": 0.5}, folder="fewer")
    assert ran.code == 0 and ran.verdict("finite") == ran.verdict("saved") == "passed"
    assert ledger(ran)["kept"] == 12


# 9: rows that are too long disappear.


def test_too_many_rows_are_too_long(train: Train) -> None:
    ran = train(rows=rows(prompt=LONG), data=SHORT)
    assert ran.code == 3 and ran.record["status"] == "failed"
    assert "4 of 16 rows would be dropped, more than data.max_dropped (5%): longer than max_length: 4" in ran.err
    assert "first: rows.jsonl:1, rows.jsonl:5, rows.jsonl:9" in ran.err and "raise data.max_length" in ran.err
    ran = train(rows=rows(prompt=LONG), data=SHORT | {"max_dropped": 0.25}, folder="allowed")
    assert ran.code == 0 and ledger(ran)["kept"] == 12


def test_one_row_is_too_long(train: Train) -> None:
    given = [*rows(19), {"prompt": LONG, "chosen": "tea", "rejected": "rain"}]
    ran = train(rows=given, data=SHORT)
    assert ran.code == 0 and (ledger(ran)["rows"], ledger(ran)["kept"]) == (20, 19)
    assert ledger(ran)["dropped"] == {"longer than max_length": {"rows": 1, "first": ["rows.jsonl:20"]}}
    assert "1 dropped: 1 longer than max_length" in " ".join(ran.out.split())
    ran = train(rows=given, data=SHORT | {"overlong": "error"}, folder="none")
    assert ran.code == 3 and "data.train: rows longer than 64 tokens: 1 (first: rows.jsonl:20)" in ran.err


def test_held_out_rows_are_too_long(train: Train, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"Ask {i}.", "chosen": LONG, "rejected": "rain"}) for i in range(4)]
    (tmp_path / "held.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ran = train(rows=rows(), data=SHORT | {"eval": [{"path": "held.jsonl"}]})
    assert ran.code == 3 and "data.eval: 4 of 4 rows would be dropped, so none is left" in ran.err


# 10: an answer is cut, and with it the token that ends it.


def test_answers_are_cut_when_asked_for_only(train: Train, here: Here) -> None:
    given = rows(chosen=LONG)
    ran = train(rows=given, data=SHORT)
    assert ran.code == 3 and "longer than max_length: 4" in ran.err
    ran = train(rows=given, data=CUT, folder="cut")
    assert ran.code == 0 and ledger(ran)["kept"] == 16
    assert ledger(ran)["cut"] == {
        "answer cut, without its end token": {"rows": 4, "first": ["rows.jsonl:1", "rows.jsonl:5", "rows.jsonl:9"]}
    }
    said = " ".join(ran.out.split())
    assert "rows.answer_cut: 4 of 16 rows (25.0%)" in said and "without an end learns not to stop" in said
    assert shown(here, 1)["chosen"][-1].startswith("river river") and STOP not in shown(here, 1)["chosen"][-1]
    assert shown(here, 1)["rejected"][-1] == f"rain 0 tea{STOP}" and shown(here, 2)["chosen"][-1] == f"tea 1 rain{STOP}"


# 18: the prompt is guessed from what two texts share.


def test_no_prompt_is_guessed(train: Train) -> None:
    given = [{side: f"{row['prompt']} Well, {row[side]}" for side in ("chosen", "rejected")} for row in rows()]
    ran = train(rows=given)
    assert ran.code == 3 and ran.record["status"] == "failed"
    assert "rows.jsonl:1: columns are `chosen` (a string), `rejected` (a string), which is none of the" in ran.err
    assert "columns: {prompt: …}" in ran.err


SHAPES: dict[str, Callable[[str, str], Any]] = {
    "prompt": lambda asks, answer: answer,
    "transcript": lambda asks, answer: f"\n\nHuman: {asks}\n\nAssistant: {answer}",
    "turns": lambda asks, answer: [user(asks), assistant(answer)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_that_begin_alike(train: Train, here: Here, shape: str) -> None:
    """What both answers begin with is trained, although no column says where the prompt ends."""
    given = []
    for row in rows():
        sides = {side: SHAPES[shape](row["prompt"], f"Well, {row[side]}") for side in ("chosen", "rejected")}
        given.append(sides | ({"prompt": row["prompt"]} if shape == "prompt" else {}))
    assert train(rows=given).code == 0
    asked = f"<|im_start|>user\nSay 2 and tea.{STOP}\n<|im_start|>assistant\n"
    assert shown(here, 3) == {
        "chosen": [asked, f"Well, tea 2 rain{STOP}"],
        "rejected": [asked, f"Well, rain 2 tea{STOP}"],
    }


# 20: a conversation is cut to one turn.


def talk(i: int) -> list[Any]:
    """Three questions with their answers."""
    return [turn for t in range(3) for turn in (user(f"Say {i} and {t}."), assistant(f"tea {i} {t}"))]


def test_all_turns_of_a_dialogue(train: Train, here: Here) -> None:
    ran = train("sft", [{"messages": talk(i)} for i in range(16)], data=MESSAGES)
    assert ran.code == 0
    turns = shown(here, 16)["row"]
    assert turns[1::2] == [f"tea 15 {t}{STOP}" for t in range(3)]
    assert [f"Say 15 and {t}." in turn for t, turn in enumerate(turns[::2])] == [True] * 3


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_all_turns_before_an_answer(train: Train, here: Here, method: str) -> None:
    given = [{"prompt": talk(i)[:-1], "chosen": talk(i)[-1:], "rejected": [assistant("rain")]} for i in range(16)]
    assert train(method, given).code == 0
    asked, answer = shown(here, 16)["chosen"]
    assert asked.count("<|im_start|>") == 6 and answer == f"tea 15 2{STOP}"
    assert all(turn["content"] in asked for turn in talk(15)[:-1])


def test_turns_are_cut_when_asked_for_only(train: Train, here: Here) -> None:
    given = [{"messages": talk(i)} for i in range(16)]
    ran = train("sft", given, data=MESSAGES | {"max_length": 70})
    assert ran.code == 3 and "longer than max_length: 16" in ran.err
    ran = train("sft", given, data=MESSAGES | {"max_length": 70, "overlong": "truncate_prompt"}, folder="cut")
    assert ran.code == 0 and "rows.prompt_cut: 16 of 16 rows" in " ".join(ran.out.split())
    assert ledger(ran)["cut"]["oldest turns of the prompt left out"]["rows"] == 16
    assert "rows.prompt_cut" in warned(ran)
    assert "".join(shown(here, 1)["row"]).count("<|im_start|>") == 4


def test_turns_out_of_order(train: Train) -> None:
    ran = train("sft", [{"messages": [user("Say tea."), *talk(i)]} for i in range(16)], data=MESSAGES)
    assert ran.code == 3 and "16 of 16 rows would be dropped, so none is left: roles do not alternate: 16" in ran.err
