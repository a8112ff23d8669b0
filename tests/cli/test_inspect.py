"""`alignctl inspect`: one row as the model will see it, what it is asked with, and rows written to a file."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from alignctl.recipe.load import load
from alignctl.train.tokenizer import load_encoder

Run = Callable[..., subprocess.CompletedProcess[str]]
Row = dict[str, Any]
Write = Callable[..., Path]
HOSTILE = "\x1b[31mred\x1b]0;owned\x07\x9b2J\u202e"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def pairs(n: int = 12) -> list[Row]:
    return [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No, {i + 1}."} for i in range(n)]


def chat(*contents: str, system: str = "") -> Row:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that a user can mend."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("alignctl: ") and " — " in line and not CONTROL.search(line)
    return line


def values(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    return out


def asked(messages: list[Row], *overrides: str) -> list[int]:
    """What the recipe's model is asked with for these messages."""
    return load_encoder(load(Path("r.yaml"), list(overrides)).recipe).prompt_ids(messages)


CHOSEN = "<|im_start|>user\nWhat is {0}?<|im_end|>\n<|im_start|>assistant\n⟦It is {0}.<|im_end|>⟧\n"
REJECTED = "<|im_start|>user\nWhat is {0}?<|im_end|>\n<|im_start|>assistant\n⟦No, {1}.<|im_end|>⟧\n"


# --- which row ---


def test_the_first_row_is_shown(data_set: Write, alignctl: Run) -> None:
    data_set(pairs())
    done = alignctl("inspect", "r.yaml")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("train row 1 of 12: rows.jsonl:1\n")
    assert CHOSEN.format(0) in done.stdout and REJECTED.format(0, 1) in done.stdout
    assert re.search(r"^chosen: (\d+) of (\d+) tokens are trained$", done.stdout, re.MULTILINE)
    assert re.search(r"the model is asked with the first \d+ tokens, and stops on <\|im_end\|> \(1\)\n$", done.stdout)


def test_a_row_by_its_number_place_length_or_chance(data_set: Write, here: Run) -> None:
    rows = pairs()
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[7]["chosen"] += " And more." * 9
    data_set(rows)
    shown = {row: here("inspect", "r.yaml", "--row", row).stdout for row in ("4", "5", "11", "rows.jsonl:6")}
    assert shown["4"].startswith("train row 4 of 11: rows.jsonl:4\n") and CHOSEN.format(3) in shown["4"]
    assert shown["5"].startswith("train row 5 of 11: rows.jsonl:6\n") and CHOSEN.format(5) in shown["5"]
    assert shown["11"].startswith("train row 11 of 11: rows.jsonl:12\n")
    assert shown["rows.jsonl:6"].splitlines()[0].endswith("row 5 of 11: rows.jsonl:6")
    assert shown["rows.jsonl:6"].splitlines()[1:] == shown["5"].splitlines()[1:]
    assert "rows.jsonl:8" in here("inspect", "r.yaml", "--longest").stdout.splitlines()[0]
    by_chance = {values(here("inspect", "r.yaml", "--random", "--json"))["place"] for _ in range(12)}
    assert 1 < len(by_chance) <= 11 and "rows.jsonl:5" not in by_chance


def test_a_dropped_row_says_why(data_set: Write, here: Run) -> None:
    rows = pairs()
    rows[4]["rejected"] = rows[4]["chosen"] + " "
    rows[6]["chosen"] = "Long. " * 900
    data_set(rows)
    done = here("inspect", "r.yaml", "--row", "rows.jsonl:5")
    assert done.returncode == 0 and "dropped: chosen equals rejected\n" in done.stdout
    assert '"It is 4. "' in done.stdout
    out = values(here("inspect", "r.yaml", "--row", "rows.jsonl:7", "--json"))
    assert out["place"] == "rows.jsonl:7" and out["dropped"] == "longer than max_length"
    assert out["canonical"]["prompt"] == [{"role": "user", "content": "What is 6?"}] and "sides" not in out
    assert values(here("inspect", "r.yaml", "--row", "rows.jsonl:7", "--json", "data.max_length=9999"))["sides"]


def test_a_row_that_is_dropped_as_it_is_read_is_shown_too(data_set: Write, here: Run) -> None:
    data_set([pairs()[0] | {"score_chosen": i % 2, "score_rejected": 0} for i in range(3)])
    done = here("inspect", "r.yaml", "data.train.0.tie_margin=0", "--row", "rows.jsonl:1")
    assert "tie" in done.stdout and "What is 0?" in done.stdout


def test_a_row_whose_question_is_held_out_is_dropped(data_set: Write, here: Run) -> None:
    data_set(pairs(2), name="eval.jsonl")
    data_set(pairs())
    done = here("inspect", "r.yaml", "data.eval=[{path: eval.jsonl}]", "--row", "rows.jsonl:1")
    assert "prompt is in the held-out rows" in done.stdout


def test_held_out_rows(data_set: Write, here: Run) -> None:
    data_set(pairs())
    first = here("inspect", "r.yaml", "data.eval_fraction=0.25", "--part", "eval").stdout.splitlines()[0]
    assert first.startswith("eval row 1 of 3: rows.jsonl:")
    of_train = (values(here("inspect", "r.yaml", "data.eval_fraction=0.25", "--row", f"{i}", "--json")) for i in (1, 9))
    assert first.split(": ")[1] not in [out["place"] for out in of_train]


def test_a_place_that_both_parts_have_is_that_of_the_part(data_set: Write, here: Run) -> None:
    data_set([row | {"chosen": "Held out."} for row in pairs()], name="held_out/rows.jsonl")
    data_set(pairs())
    arguments = ("data.eval=[{path: held_out/rows.jsonl}]", "--part", "eval", "--row", "rows.jsonl:3")
    assert "Held out." in here("inspect", "r.yaml", *arguments).stdout


BAD = [
    (["--row", "0"], "train has no row 0"),
    (["--row", "13"], "train has no row 13"),
    (["--row", "13", "--part", "eval", "data.eval_fraction=0.5"], "eval has no row 13"),
    (["--row", "-1"], "no row of train stands at -1"),
    (["--row", "rows.jsonl:13"], "a place such as pairs.jsonl:17"),
    (["--row", "other.jsonl:1"], "no row of train stands at other.jsonl:1"),
    (["--row", f"{HOSTILE}"], "no row of train stands at "),
    (["--side", "middle"], "one of chosen, rejected"),
    (["--side", "middle", "--json"], "one of chosen, rejected"),
    (["--part", "eval"], "the recipe has no rows for 'eval'"),
    (["--part", "test"], "one of train, eval"),
    (["--row", "1", "--longest"], "keep one"),
    (["--longest", "--random"], "keep one"),
    (["--row", "1", "--random", "--longest"], "keep one"),
]


def test_options_that_make_no_sense(data_set: Write, here: Run) -> None:
    data_set(pairs())
    for options, said in BAD:
        done = here("inspect", "r.yaml", *options)
        assert done.returncode == 2 and said in error(done), options


@pytest.mark.parametrize(
    "row",
    [
        "²",
        "",
    ],
)
def test_rows_that_are_no_number(data_set: Write, here: Run, row: str) -> None:
    data_set(pairs())
    assert here("inspect", "r.yaml", "--row", row).returncode == 2


def test_no_row_is_kept(data_set: Write, here: Run) -> None:
    data_set([row | {"rejected": row["chosen"]} for row in pairs()])
    done = here("inspect", "r.yaml")
    assert done.returncode == 2 and "alignctl check says why" in error(done)
    assert "chosen equals rejected" in here("inspect", "r.yaml", "--row", "rows.jsonl:2").stdout


def test_no_row_is_kept_and_none_is_there(data_set: Write, here: Run) -> None:
    data_set([row | {"rejected": row["chosen"]} for row in pairs()])
    done = here("inspect", "r.yaml", "--row", "rows.jsonl:13")
    assert done.returncode == 2 and "no row of train stands at rows.jsonl:13" in error(done)


# --- what is shown ---


def test_one_side_and_its_ids(data_set: Write, here: Run) -> None:
    data_set(pairs())
    done = here("inspect", "r.yaml", "--side", "rejected", "--ids")
    assert REJECTED.format(0, 1) in done.stdout and "It is" not in done.stdout
    spans = values(here("inspect", "r.yaml", "--json", "--side", "rejected"))["sides"]["rejected"]
    shown = re.findall(r"^(given|trained) ids: (\[[\d,\s]*\])", done.stdout, re.MULTILINE)
    assert [(kind == "trained", json.loads(ids)) for kind, ids in shown] == [(s["supervised"], s["ids"]) for s in spans]


@pytest.mark.parametrize("template", ["model", "alpaca", "instruct", "mistral-instruct", "zephyr"])
def test_the_model_is_asked_as_it_is_trained(data_set: Write, here: Run, template: str) -> None:
    turns = [*chat("Tea ?", "Leaves .", "Coffee?", system="Be short.")["messages"]]
    row = {"prompt": turns} | {k: [{"role": "assistant", "content": k + "."}] for k in ("chosen", "rejected")}
    data_set([row] * 2)
    out = values(here("inspect", "r.yaml", "--json", f"model.chat_template={template}"))
    assert out["canonical"] == row and out["dropped"] is None and out["place"] == "rows.jsonl:1"
    assert out["asked_with"] == asked(row["prompt"], f"model.chat_template={template}")
    for side in ("chosen", "rejected"):
        given, trained = out["sides"][side]
        assert given["ids"] == out["asked_with"] and not given["supervised"]
        assert trained["supervised"] and trained["text"].startswith((f"{side}.", f" {side}."))
        assert trained["ids"][-1] in out["stop_ids"] and not set(trained["ids"][:-1]) & set(out["stop_ids"])


def test_a_dialogue_has_several_trained_spans(data_set: Write, here: Run) -> None:
    row = chat("Tea?", "Leaves.", "Coffee?", "Beans.")
    data_set([row], "sft")
    done = here("inspect", "r.yaml")
    assert re.findall(r"⟦(.*?)⟧", done.stdout, re.DOTALL) == ["Leaves.<|im_end|>", "Beans.<|im_end|>"]
    assert re.search(r"^row: \d+ of \d+ tokens are trained$", done.stdout, re.MULTILINE)
    out = values(here("inspect", "r.yaml", "--json"))
    spans = out["sides"]["row"]
    assert [span["supervised"] for span in spans] == [False, True, False, True]
    assert out["asked_with"] == asked(row["messages"][:3]) == [i for span in spans[:3] for i in span["ids"]]
    assert "one of row" in error(here("inspect", "r.yaml", "--side", "chosen"))


def test_a_dialogue_cut_within_a_question_is_asked_with_what_is_before_its_answer(data_set: Write, here: Run) -> None:
    data_set([chat("Tea?", "Leaves.", "Coffee? " * 30, "Beans.")], "sft")
    out = values(here("inspect", "r.yaml", "--json", "data.max_length=60", "data.overlong=truncate_completion"))
    assert out["asked_with"] == asked(chat("Tea?")["messages"])


def marked(answer: str, data_set: Write, here: Run) -> str:
    """What stands between the marks when `answer` is trained."""
    data_set([pairs()[0] | {"chosen": answer}])
    return here("inspect", "r.yaml", "--side", "chosen").stdout.partition("⟦")[2].partition("<|im_end|>⟧")[0]


def test_the_marks_hold_the_answer_and_nothing_else(data_set: Write, here: Run) -> None:
    answer = "  [bold]Not markup[/bold]  " + "word " * 60 + "\n\n  ```\n漢字 🙂 \n"
    assert marked(answer, data_set, here) == answer
    assert marked(HOSTILE + "x", data_set, here) == CONTROL.sub("\N{REPLACEMENT CHARACTER}", HOSTILE) + "x"


def test_the_marks_hold_tabs_as_they_are(data_set: Write, here: Run) -> None:
    assert marked("a\tb", data_set, here) == "a\tb"


def in_a_terminal(*arguments: str) -> pyte.Screen:
    """The screen after a command in a terminal of its own."""
    screen = pyte.Screen(120, 50)
    stream = pyte.ByteStream(screen)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.pop("NO_COLOR", None)
        os.environ.update(TERM="xterm-256color", COLUMNS="120", LINES="50", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        os.execv(sys.executable, [sys.executable, "-m", "alignctl", *arguments])
    with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
        while data := os.read(terminal, 65536):
            stream.feed(data)
    assert os.waitpid(pid, 0)[1] == 0
    return screen


def styles(screen: pyte.Screen) -> Iterator[tuple[str, set[tuple[str, bool]]]]:
    """Every line that is not blank, with the colours and underlines of its letters."""
    for y in range(screen.lines):
        text = screen.display[y].rstrip()
        cells = [screen.buffer[y][x] for x in range(len(text))]
        if text:
            yield text, {(cell.fg, cell.underscore) for cell in cells if cell.data.strip()}


def test_colours_in_a_terminal(data_set: Write) -> None:
    data_set([pairs()[0] | {"prompt": "Tea \x1b[32m?", "chosen": "Leaves,\nyes."}])
    screen = in_a_terminal("inspect", "r.yaml", "--side", "chosen")
    found = dict(styles(screen))
    assert "⟦" not in "".join(found)
    assert found["Tea \N{REPLACEMENT CHARACTER}[32m?<|im_end|>"] == {("default", False), ("magenta", False)}
    assert found["<|im_start|>assistant"] == {("default", False), ("magenta", False)}
    assert found["Leaves,"] == {("green", True)}
    assert found["yes.<|im_end|>"] == {("green", True), ("magenta", True)}
    (y,) = [y for y in range(screen.lines) if screen.display[y].startswith("yes.")]
    colours = [screen.buffer[y][x].fg for x in range(len("yes.<|im_end|>"))]
    assert colours == ["green"] * 4 + ["magenta"] * 10


# --- rows as a file ---


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_exported_rows_are_the_same_rows(tmp_path: Path, data_set: Write, here: Run, method: str) -> None:
    """Read again with a recipe of its own, the file gives the same ids."""
    transcripts = [
        {
            "chosen": f"\n\nHuman: {i}?\n\nAssistant: Which {i}?\n\nHuman: That.\n\nAssistant: Café 漢字 {i}\u2028",
            "rejected": f"\n\nHuman: {i}?\n\nAssistant: Which {i}?\n\nHuman: That.\n\nAssistant: {HOSTILE}{i}",
        }
        for i in range(20)
    ]
    answer = [] if method == "dpo" else ["data.train.0.answer=chosen"]
    data_set([*transcripts, transcripts[3] | {"rejected": transcripts[3]["chosen"]}], method)
    split = ("data.eval_fraction=0.2", "data.max_dropped=0.1")
    for part in ("train", "eval"):
        done = here("inspect", "r.yaml", *answer, *split, "--part", part, "--export", f"{part}.jsonl")
        written = len((tmp_path / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")) - 1
        assert done.returncode == 0 and done.stdout == f"{written} rows written to {part}.jsonl\n"
    before = values(here("check", "r.yaml", "--json", *answer, *split))["ledger"]
    again = "data={train: [{path: train.jsonl}], eval: [{path: eval.jsonl}]}"
    after = values(here("check", "r.yaml", "--json", again, "data.eval_fraction=null"))["ledger"]
    for part in ("train", "eval"):
        assert after[part]["fingerprint"] == before[part]["fingerprint"]
        assert after[part]["sources"][0]["format"] == ("conversational" if method == "dpo" else "messages")
        assert after[part]["kept"] == after[part]["rows"] == before[part]["kept"]
    first = values(here("inspect", "r.yaml", "--json", *answer, *split))
    reread = values(here("inspect", "r.yaml", "--json", again, "data.eval_fraction=null"))
    assert {**reread, "place": ""} == {**first, "place": ""}


def test_files_that_cannot_be_exported_to(tmp_path: Path, data_set: Write, here: Run) -> None:
    data_set(pairs())
    (tmp_path / "mine.jsonl").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("mine.jsonl", ".", "nowhere/new.jsonl", "mine.jsonl/new.jsonl", "/proc/new.jsonl", "x" * 250):
        done = here("inspect", "r.yaml", "--export", name)
        assert done.returncode == 2 and "--export: " in error(done) and "name another file" in error(done), name
    assert [p for p in sorted(tmp_path.rglob("*")) if "cache" not in p.parts] == before
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_names_that_are_too_long(data_set: Write, here: Run) -> None:
    data_set(pairs())
    done = here("inspect", "r.yaml", "--export", "x" * 300)
    assert done.returncode == 2 and "name another file" in error(done)


def test_a_method_may_be_changed_on_the_command_line(data_set: Write, here: Run) -> None:
    data_set(pairs())
    out = values(here("inspect", "r.yaml", "dpo=null", "sft={}", "data.train.0.answer=chosen", "--json"))
    assert list(out["sides"]) == ["row"]
