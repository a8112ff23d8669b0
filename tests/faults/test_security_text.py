"""Text from elsewhere does not steer a terminal, JSON or Markdown."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from alignctl.recipe.load import load
from alignctl.train import card, display

Train = Callable[..., Any]
Here = Callable[..., subprocess.CompletedProcess[str]]


def complaints(err: str) -> list[str]:
    """What the command itself says on stderr."""
    return [line for line in err.splitlines() if line.startswith("alignctl: ")]


# 7: text from elsewhere in a terminal, in JSON and in Markdown.

EVIL = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eevil\u2066\x00\x7f"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def raw(*texts: str) -> list[str]:
    """The controls that would reach the terminal."""
    return RAW.findall("".join(texts))


@pytest.fixture
def without_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process the bars of transformers go to stderr, where a real run has them in its log."""
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)


def hostile(count: int = 16) -> list[dict[str, Any]]:
    words = ["tea", "rain", "bread", "stone"]
    return [
        {
            "prompt": f"Say {i} {EVIL} {words[i % 4]}",
            "chosen": f"{words[i % 4]} {EVIL} {i}",
            "rejected": f"{i} {words[(i + 1) % 4]} {EVIL}",
            f"extra{EVIL}": EVIL,
        }
        for i in range(count)
    ]


@pytest.mark.usefixtures("without_bars")
def test_rows_reach_the_terminal_without_controls(train: Train, here: Here) -> None:
    ran = train("dpo", hostile(), data={"eval_fraction": 0.25}, evaluation={"samples": 4, "max_new_tokens": 4})
    assert ran.code == 0, ran.err
    assert "owned" in ran.out and "\ufffd" in ran.out and raw(ran.out, ran.err) == []
    for file in ran.folder.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    samples = (ran.folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert {EVIL in json.loads(line)["prompt"] for line in samples if line} == {True}
    for command, *options in (["check"], ["check", "--json"], ["inspect"], ["inspect", "--json"], ["inspect", "--ids"]):
        done = here(command, "r.yaml", *options)
        assert done.returncode == 0 and raw(done.stdout, done.stderr) == [], (command, options)
        if "--json" in options:
            json.loads(done.stdout)
    assert EVIL in json.loads(here("inspect", "r.yaml", "--json").stdout)["canonical"]["prompt"][-1]["content"]


def test_a_table_with_controls_in_it(train: Train, here: Here, tmp_path: Path) -> None:
    name = EVIL.replace("\x00", "").replace("\r", "")
    assert train("dpo", hostile(), "dpo.bta=1").code == 2
    lines = [f"prompt,chosen,rejected,{name}", f"Say {name},tea {name},rain,{name}", f"Say {name},a,a,{name}"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for command in ("check", "inspect"):
        done = here(command, "r.yaml", "data.train.0.path=rows.csv", "data.max_dropped=1")
        assert done.returncode == 0 and raw(done.stdout, done.stderr) == [], done.stderr
    (tmp_path / "rows.csv").write_text(f"{name},b\n1,2\n", encoding="utf-8")
    done = here("check", "r.yaml", "data.train.0.path=rows.csv")
    assert done.returncode == 3 and "owned" in done.stderr and raw(done.stdout, done.stderr) == []


@pytest.mark.parametrize(
    "row",
    [
        {f"a{EVIL}": "x", "b": "y"},
        {"prompt": "a", "chosen": [{"role": f"user{EVIL}", "content": "b"}], "rejected": "c"},
        {"prompt": "a", "chosen": {EVIL: EVIL}, "rejected": "c"},
        {"messages": [{"from": EVIL, "value": EVIL}]},
        {"prompt": "a", "chosen": 5, "rejected": EVIL},
    ],
)
def test_errors_about_rows_hold_no_controls(train: Train, here: Here, row: dict[str, Any]) -> None:
    ran = train("dpo", [row])
    assert ran.code == 3 and raw(ran.out, ran.err) == [] and len(complaints(ran.err)) == len(ran.err.splitlines()) == 1
    done = here("check", "r.yaml")
    assert done.returncode == 3 and raw(done.stdout, done.stderr) == []


def test_names_of_files_and_words_hold_no_controls(train: Train, here: Here, tmp_path: Path) -> None:
    assert train("dpo", hostile(), "dpo.bta=1").code == 2
    name = EVIL.replace("\x00", "")
    (tmp_path / f"{name}.jsonl").write_text((tmp_path / "rows.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / f"{name}.yaml").write_text((tmp_path / "r.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text(f'{{"a": {name}', encoding="utf-8")
    given = json.dumps(f"{name}.jsonl")
    for words, code in (
        (["check", "r.yaml", f"data.train.0.path={given}"], 0),
        (["check", f"{name}.yaml"], 0),
        (["check", f"{name}-not-there.yaml"], 2),
        (["check", f"{name}"], 2),
        (["check", "r.yaml", f"model.{name}=1"], 2),
        (["check", "r.yaml", f"model.name_or_path=./{json.dumps(name)[1:-1]}"], 2),
        (["check", "r.yaml", "data.train.0.path=broken.jsonl"], 3),
        (["inspect", "r.yaml", f"data.train.0.path={given}"], 0),
        (["inspect", "r.yaml", "--row", f"{name}:7"], 2),
        (["inspect", "r.yaml", "--part", name], 2),
        (["recipes", "show", name], 2),
        (["verify", name], 2),
    ):
        done = here(*words)
        assert done.returncode == code and raw(done.stdout, done.stderr) == [], (words, done.stdout, done.stderr)


@pytest.mark.usefixtures("without_bars")
def test_the_name_of_a_run_folder_holds_no_controls(train: Train) -> None:
    ran = train(folder=EVIL.replace("\x00", ""))
    assert ran.code == 0 and "owned" in ran.out and raw(ran.out, ran.err) == []


def test_what_a_terminal_waits_for_holds_no_controls() -> None:
    stream = Terminal()
    with display.Display(stream).waiting(f"loading {EVIL}"):
        pass
    assert "owned" in stream.getvalue() and "\x1b]0;" not in stream.getvalue() and "\u202e" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# 7: the card.

NASTY = "org/`x`\n---\n# Owned\n| a | b |\r\n{{x: [\u202e<script>\"'"


def test_a_name_does_not_leave_its_place_in_the_card(train: Train) -> None:
    ran = train(model={"revision": NASTY})
    assert ran.code == 0, ran.err
    record, recipe = ran.record, load(ran.folder / "recipe.yaml").recipe
    model = recipe.model.model_copy(update={"name_or_path": NASTY, "adapter": NASTY, "chat_template": NASTY})
    source = recipe.data.train[0].model_copy(update={"path": NASTY, "split": NASTY})
    data = recipe.data.model_copy(update={"train": [source]})
    text = card.text(recipe.model_copy(update={"model": model, "data": data}), record | {"reference": NASTY}, {})
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "peft", "tags": ["alignctl", "trl", "dpo"]}
    assert [line for line in body.splitlines() if line.startswith(("#", "|", "-"))] == [
        *(line for line in body.splitlines() if line.startswith(("# ``", "- "))),
        "## Held-out rows",
    ]
    assert body.count("`` org/`x` --- # Owned | a | b |\ufffd {{x: [\ufffd") == 8
    assert raw(text) == []
