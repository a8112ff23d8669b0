"""`alignctl check`: where every row went, what is odd about the rows, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Row = dict[str, Any]
Write = Callable[..., Path]

HOSTILE = "\x1b[31mred\x1b]0;owned\x07 \x1b[2J\x9b31m\u202e"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def pairs(n: int = 40) -> list[Row]:
    return [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No, {i + 1}."} for i in range(n)]


def faulty() -> list[Row]:
    """Forty pairs: rows 3, 5, 7 and 9 say the same twice, row 11 is too long, rows 12 and 13 are ties."""
    rows = pairs()
    for i in (2, 4, 6, 8):
        rows[i]["rejected"] = rows[i]["chosen"]
    rows[10]["chosen"] = "Long. " * 2000
    for row in rows:
        row |= {"score_chosen": 2, "score_rejected": 1}
    for i in (11, 12):
        rows[i]["score_rejected"] = 2
    return rows


def ledger(out: str, part: str = "train") -> dict[str, int]:
    """The lines of a part's ledger as they are printed, down to what is kept."""
    lines = iter(out.splitlines())
    found: dict[str, int] = {}
    for line in lines:
        match = re.match(r"\s*(−?)([\d,]+)  +(\S.*?)\s*$", line)
        if match and (found or match[3].startswith(f"rows in {part}")):
            found[match[3]] = (-1 if match[1] else 1) * int(match[2].replace(",", ""))
        if match and found and match[3] == "kept":
            return found
    raise AssertionError(out)


def adds_up(out: str, part: str = "train") -> bool:
    found = ledger(out, part)
    kept = found.pop("kept")
    return sum(found.values()) == kept


def values(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What `--json` prints, once its counts add up."""
    out: dict[str, Any] = json.loads(done.stdout)
    for part in out["ledger"].values():
        for counted in (part, *part["sources"]):
            away = [*counted["dropped"].values(), *counted["set_aside"].values()]
            assert counted["rows"] == counted["kept"] + sum(places["rows"] for places in away)
            assert all(len(places["first"]) == min(3, places["rows"]) for places in counted["dropped"].values())
    return out


def error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of the error."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("alignctl: ") and not CONTROL.search(line)
    return line


# --- in a process of its own ---


def test_clean_rows(data_set: Write, alignctl: Run) -> None:
    data_set(pairs())
    done = alignctl("check", "r.yaml", "data.eval_fraction=0.25")
    assert done.returncode == 0 and done.stderr == ""
    out = done.stdout
    assert re.search(r"^recipe +r\.yaml: dpo, no mistake found", out)
    assert "with a system role, stops on <|im_end|>" in out and "at most 1024 tokens; longer rows: drop" in out
    assert ledger(out) == {"rows in train": 40, "set aside: held out by data.eval_fraction": -10, "kept": 30}
    assert ledger(out, "eval") == {"rows in eval": 10, "kept": 10}
    assert adds_up(out) and adds_up(out, "eval")
    assert "! eval.size  10 held-out rows" in out and "✓ rows.duplicate  none" in out
    assert re.search(r"cache\s+miss\s+\w{12}", out)
    again = alignctl("check", "r.yaml", "data.eval_fraction=0.25")
    assert re.search(r"cache\s+hit\s+\w{12}", again.stdout) and "miss" not in again.stdout
    assert ledger(again.stdout) == ledger(out)


def test_too_many_dropped(data_set: Write, alignctl: Run) -> None:
    data_set(faulty())
    done = alignctl("check", "r.yaml", "data.train.0.tie_margin=0")
    assert done.returncode == 3
    assert ledger(done.stdout) == {
        "rows in train": 40,
        "set aside: tie (rows.jsonl:12, rows.jsonl:13)": -2,
        "dropped: chosen equals rejected (rows.jsonl:3, rows.jsonl:5, rows.jsonl:7)": -4,
        "dropped: longer than max_length (rows.jsonl:11)": -1,
        "kept": 33,
    }
    assert adds_up(done.stdout)
    line = error(done)
    assert "data.train: 5 of 38 rows would be dropped, more than data.max_dropped (5%)" in line
    assert "chosen equals rejected: 4 (first: rows.jsonl:3, rows.jsonl:5, rows.jsonl:7)" in line


def loaded(folder: Path, code: str) -> tuple[list[str], float]:
    """The libraries that a process has imported after `code`, and its CPU seconds."""
    code += (
        "\nimport sys, time\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'bitsandbytes', 'pyarrow'}\n"
        "print(time.process_time(), *sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    seconds, *found = done.stderr.splitlines()[-1].split()
    return found, float(seconds)


def test_local_rows_need_neither_trl_nor_peft_nor_datasets(tmp_path: Path, data_set: Write) -> None:
    data_set(pairs())
    code = (
        "from alignctl.cli import check, inspect\n"
        "check.command('r.yaml', None, as_json=False)\n"
        "inspect.command('r.yaml', None, row='2', longest=False, at_random=False, part='train', side=None,\n"
        "                ids=True, as_json=False, export=None)"
    )
    found, _ = loaded(tmp_path, code)
    assert "transformers" in found and not {"trl", "peft", "datasets", "bitsandbytes"} & set(found)


def test_a_wrong_recipe_is_answered_before_anything_is_imported(tmp_path: Path, data_set: Write) -> None:
    data_set(pairs())
    code = (
        "import sys; from alignctl.cli.main import main\n"
        "sys.argv = ['alignctl', 'check', 'r.yaml', 'lora.rank=4', 'training.learning_rate=fast']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2\n"
    )
    found, seconds = loaded(tmp_path, code)
    assert found == [] and seconds < 0.7


def test_a_hub_that_cannot_be_reached(data_set: Write, alignctl: Run) -> None:
    data_set(pairs())
    done = alignctl("check", "r.yaml", "model.name_or_path=nobody/nothing")
    assert done.returncode == 4 and "cannot be reached" in error(done) and "give a local folder" in error(done)
    assert done.stdout == ""


# --- in this one ---


def test_json(data_set: Write, here: Run) -> None:
    data_set(faulty())
    arguments = ("check", "r.yaml", "--json", "data.eval_fraction=0.25", "data.max_dropped=0.5")
    done = here(*arguments)
    assert done.returncode == 0 and done.stderr == ""
    out = values(done)
    assert out["method"] == "dpo" and out["encoder"]["stops_on"] == ["<|im_end|>"] and out["encoder"]["system_role"]
    train, held_out = out["ledger"]["train"], out["ledger"]["eval"]
    assert train["dropped"]["chosen equals rejected"] == {
        "rows": 4,
        "first": ["rows.jsonl:3", "rows.jsonl:5", "rows.jsonl:7"],
    }
    assert held_out["rows"] == held_out["kept"] == train["set_aside"]["held out by data.eval_fraction"]["rows"]
    assert train["kept"] + held_out["kept"] == train["sources"][0]["kept"] == 35
    assert train["sources"][0]["format"] == "prompt-chosen-rejected"
    found = {finding["name"]: finding for finding in out["findings"]}
    tie = found["scores.tie"]
    assert tie["warns"] and 0 < tie["rows"] <= 2 and tie["rows"] == len(tie["first"]) and tie["way_out"]
    assert not found["rows.duplicate"]["warns"] and len(found) == len(out["findings"])
    again = values(here(*arguments))
    assert train["sources"][0]["cache"].startswith("miss ")
    assert again["ledger"]["train"]["sources"][0].pop("cache").startswith("hit ")
    train["sources"][0].pop("cache")
    assert again["ledger"]["train"] == train and again["findings"] == out["findings"]


def test_json_of_too_many_dropped(data_set: Write, here: Run) -> None:
    data_set(faulty())
    done = here("check", "r.yaml", "--json")
    assert done.returncode == 3 and "would be dropped" in error(done)
    assert values(done)["ledger"]["train"]["kept"] == 35


def test_overrides(data_set: Write, here: Run) -> None:
    rows = pairs()
    for i in (1, 30):
        rows[i]["rejected"] = "and so on " * 8
    data_set(rows)
    assert values(here("check", "r.yaml", "--json"))["ledger"]["train"]["dropped"] == {}
    out = values(here("check", "r.yaml", "--json", "data.max_length=64", "orpo={}", "dpo=null"))
    lost = {"longer than max_length": {"rows": 2, "first": ["rows.jsonl:2", "rows.jsonl:31"]}}
    assert out["ledger"]["train"]["dropped"] == lost
    assert out["encoder"]["max_length"] == 64 and out["method"] == "orpo"
    done = here("check", "r.yaml", "data.max_length=64", "data.overlong=error", "data.max_dropped=1")
    assert done.returncode == 3 and "rows longer than 64 tokens: 2 (first: rows.jsonl:2, " in error(done)
    assert adds_up(done.stdout)
    cut = values(here("check", "r.yaml", "--json", "data.max_length=64", "data.overlong=truncate_completion"))
    assert [f["rows"] for f in cut["findings"] if f["name"] == "rows.answer_cut"] == [2]


def test_rows_for_sft(data_set: Write, here: Run) -> None:
    data_set([{"prompt": f"Q{i}", "completion": "A."} for i in range(9)] + [{"prompt": "Q", "completion": ""}], "sft")
    done = here("check", "r.yaml", "data.max_dropped=0.2")
    assert done.returncode == 0
    assert ledger(done.stdout) == {"rows in train": 10, "dropped: empty answer (rows.jsonl:10)": -1, "kept": 9}
    assert "prompt-completion" in done.stdout and "shortcut" not in done.stdout


def test_no_row_left(data_set: Write, here: Run) -> None:
    data_set([row | {"rejected": row["chosen"]} for row in pairs(9)])
    done = here("check", "r.yaml")
    assert done.returncode == 3 and "9 of 9 rows would be dropped, so none is left" in error(done)
    assert ledger(done.stdout)["kept"] == 0 and adds_up(done.stdout)


def test_no_held_out_row_left(data_set: Write, here: Run) -> None:
    data_set([row | {"rejected": row["chosen"]} for row in pairs(9)], name="eval.jsonl")
    data_set(pairs())
    done = here("check", "r.yaml", "data.eval=[{path: eval.jsonl}]")
    assert done.returncode == 3 and "data.eval: 9 of 9 rows would be dropped" in error(done)
    assert ledger(done.stdout, "eval")["kept"] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', "rows.jsonl:2: not JSON"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a", "chosen": 1}\n', "rows.jsonl:3: `"),
        ('{"p\\u001b[31m": "a", "chosen": "b"}\n', "rows.jsonl:1: columns are"),
        ("", "has no rows"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, data_set: Write, here: Run, text: str, said: str) -> None:
    data_set([])
    (tmp_path / "rows.jsonl").write_text(text)
    done = here("check", "r.yaml")
    assert done.returncode == 3 and said in error(done) and " — " in error(done)
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["./nope", "./empty"])
def test_no_model_there(tmp_path: Path, data_set: Write, here: Run, name: str) -> None:
    data_set(pairs())
    (tmp_path / "empty").mkdir()
    done = here("check", "r.yaml", f"model.name_or_path={name}")
    assert done.returncode == 2 and error(done).startswith("alignctl: model") and " — " in error(done)
    assert done.stdout == ""


def test_a_change_of_the_rows_or_the_rules_is_a_miss(data_set: Write, here: Run) -> None:
    def cache(*overrides: str) -> str:
        found = values(here("check", "r.yaml", "--json", *overrides))["ledger"]["train"]["sources"][0]["cache"]
        return str(found).split()[0]

    data_set(pairs())
    assert [cache(), cache(), cache("training.learning_rate=1")] == ["miss", "hit", "hit"]
    assert [cache("data.max_length=99"), cache("model.chat_template=zephyr"), cache()] == ["miss", "miss", "hit"]
    data_set(pairs(41))
    assert cache() == "miss"


def test_escape_sequences_are_not_printed(data_set: Write, here: Run) -> None:
    """In the texts, in the name of the file and so in every place, and in the name of the recipe."""
    rows = [row | {"prompt": f"{HOSTILE} {row['prompt']} [INST]"} for row in pairs(9)]
    rows[3]["rejected"] = rows[3]["chosen"]
    data_set(rows, name=f"d\x1b[31m/{HOSTILE}.jsonl")
    source = json.dumps([{"path": f"d\x1b[31m/{HOSTILE}.jsonl"}])
    done = here("check", "r.yaml", f"data.train={source}")
    assert done.returncode == 3 and "owned" in done.stdout and "owned" in error(done)
    assert "text.rendered  8 of 8 rows" in done.stdout
    assert not CONTROL.search(done.stdout)
    assert "\x1b" not in here("check", "r.yaml", "--json", f"data.train={source}").stdout
    assert not CONTROL.search(here("check", f"{HOSTILE}.yaml").stderr)


def test_json_prints_no_control_character(data_set: Write, here: Run) -> None:
    data_set(pairs(9), name=f"{HOSTILE}.jsonl")
    source = json.dumps([{"path": f"{HOSTILE}.jsonl"}])
    assert not CONTROL.search(here("check", "r.yaml", "--json", f"data.train={source}").stdout)
