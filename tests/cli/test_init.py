"""`alignctl init`: flags, questions, and recipes of other tools."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.cli import check
from alignctl.errors import Interrupted, Problem
from alignctl.recipe.load import load

Run = Callable[..., subprocess.CompletedProcess[str]]
TRL = "model_name_or_path: a/b\ndataset_name: c/d\nloss_type: sigmoid\nlearning_rate: 1e-6\nhub_model_id: x\n"


@pytest.fixture
def rows(data_set: Callable[..., Path]) -> list[dict[str, Any]]:
    """Thirty pairs in `rows.jsonl` of the current folder, which holds nothing else."""
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"Maybe {i}, or so."} for i in range(30)]
    data_set(pairs)
    Path("r.yaml").unlink()
    return pairs


def left() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"rows.jsonl", "cache"}


@pytest.mark.usefixtures("rows")
def test_a_recipe_that_passes_its_check(here: Run, model_folder: Path) -> None:
    done = here("init", "--method", "dpo", "--model", str(model_folder), "--data", "rows.jsonl", "--output", "new.yaml")
    assert done.returncode == 0, done.stderr
    assert "recipe    new.yaml: dpo, no mistake found" in done.stdout and "rows in train" in done.stdout
    assert done.stdout.endswith("written: new.yaml\nnext: alignctl dpo new.yaml\n")
    assert left() == {"new.yaml"}
    text = Path("new.yaml").read_text(encoding="utf-8")
    assert "# Run: alignctl dpo new.yaml\n" in text and "  # the tokenizer's own\n" in text
    recipe = load(Path("new.yaml"), method="dpo").recipe
    assert recipe.data.eval_fraction == 0.2 and recipe.data.max_length == 64
    assert recipe.lora is not None and recipe.quantization is None
    assert here("check", "new.yaml").returncode == 0


@pytest.mark.usefixtures("rows")
def test_a_recipe_in_another_folder_finds_the_rows(here: Run, model_folder: Path) -> None:
    Path("recipes").mkdir()
    options = ("--method", "orpo", "--model", str(model_folder), "--data", "rows.jsonl", "--gpu-memory", "8GiB")
    done = here("init", *options, "--output", "recipes/new.yaml")
    assert done.returncode == 0, done.stderr
    assert "\nplan: 0.5 GiB at the peak, which fits 8 GiB; the run takes about " in done.stdout
    text = Path("recipes/new.yaml").read_text(encoding="utf-8")
    assert "train: [{path: ../rows.jsonl}]" in text
    assert Path(load(Path("recipes/new.yaml")).recipe.data.train[0].path) == Path("rows.jsonl").resolve()


@pytest.mark.usefixtures("rows")
def test_without_the_model_the_recipe_says_what_was_guessed(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = here("init", "--method", "dpo", "--model", "nobody/nothing-7b", "--data", "rows.jsonl", "--gpu-memory", "24")
    assert done.returncode == 0, done.stderr
    assert "note: the model cannot be looked at" in done.stdout and "note: the rows are not checked" in done.stdout
    assert (
        "note: not planned: model.name_or_path: nobody/nothing-7b is neither a" in done.stdout
        and "plan: " not in done.stdout
    )
    text = Path("nothing-7b-dpo.yaml").read_text(encoding="utf-8")
    assert "7B parameters, by its name" in text and "guessed from their characters" in text
    assert load(Path("nothing-7b-dpo.yaml")).recipe.quantization is not None


def test_missing_options_are_named_at_once(here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("init", "--model", "x")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "alignctl: --method: is missing — give one of sft, dpo, orpo",
        "alignctl: --data: is missing — give a file, a folder or a hub name",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "ppo"), "--method: is 'ppo' — one of sft, dpo, orpo"),
        (("--adapter", "dora"), "--adapter: is 'dora' — one of auto, qlora, lora, full"),
        (("--gpu-memory", "much"), "--gpu-memory: 'much' is no amount of memory — write it as 24GiB"),
        (("--output", "rows.jsonl"), "rows.jsonl: exists already — --output FILE with another name"),
        (("--output", "nowhere/r.yaml"), "nowhere/r.yaml: its folder does not exist"),
        (("--from", "c.yaml"), "--model and --data: and --from contradict each other"),
    ],
)
@pytest.mark.usefixtures("rows")
def test_bad_options(here: Run, options: tuple[str, ...], said: str) -> None:
    given = () if "--method" in options else ("--method", "dpo")
    done = here("init", *given, "--model", "m", "--data", "rows.jsonl", *options)
    assert done.returncode == 2 and said in done.stderr and left() == set()


@pytest.mark.usefixtures("rows")
def test_rows_that_cannot_be_read_leave_nothing(here: Run, model_folder: Path) -> None:
    Path("bad.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    done = here("init", "--method", "dpo", "--model", str(model_folder), "--data", "bad.jsonl", "--output", "new.yaml")
    assert done.returncode == 3 and "bad.jsonl:1: columns are `a`" in done.stderr and left() == {"bad.jsonl"}


@pytest.mark.usefixtures("rows")
def test_a_signal_while_the_recipe_is_checked_leaves_nothing(
    here: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(recipe: str, *more: object, **options: object) -> None:
        assert Path(recipe).is_file()
        raise Interrupted(signal.SIGINT, Problem("run", "stopped by SIGINT"))

    monkeypatch.setattr(check, "command", stop)
    done = here("init", "--method", "dpo", "--model", str(model_folder), "--data", "rows.jsonl", "--output", "new.yaml")
    assert done.returncode == 130 and left() == set()


def test_rows_that_the_check_refuses_leave_the_recipe_to_mend(
    here: Run, model_folder: Path, data_set: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"Is it {i}?"} for i in range(30)]
    data_set([row | {"rejected": row["chosen"]} if i % 3 == 0 else row for i, row in enumerate(rows)])
    done = here("init", "--method", "dpo", "--model", str(model_folder), "--data", "rows.jsonl", "--output", "new.yaml")
    assert done.returncode == 3 and "raise data.max_dropped" in done.stderr
    assert "written: new.yaml, but it does not pass `alignctl check` yet" in done.stdout
    assert left() == {"new.yaml", "r.yaml"} and load(Path("new.yaml")).recipe.method == "dpo"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--from", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("--from", "rows.jsonl", "--dialect", "swift"), "--dialect: is 'swift' — one of handbook, trl, axolotl"),
    ],
)
@pytest.mark.usefixtures("rows")
def test_bad_options_of_from(here: Run, options: tuple[str, ...], said: str) -> None:
    done = here("init", *options)
    assert done.returncode == 2 and said in done.stderr and left() == set()


def test_a_recipe_of_another_tool(here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(TRL, encoding="utf-8")
    done = here("init", "--from", "config.yaml")
    assert done.returncode == 0, done.stderr
    assert "✓ model_name_or_path → model.name_or_path: a/b\n" in done.stdout
    assert "– hub_model_id: not carried over: a run uploads nothing\n" in done.stdout
    assert done.stdout.endswith("written: config-dpo.yaml (from trl)\nnext: alignctl check config-dpo.yaml\n")
    assert load(Path("config-dpo.yaml"), method="dpo").recipe.training.learning_rate == 1e-6
    again = here("init", "--from", "config.yaml")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_a_template_in_another_tools_recipe_gets_a_file(
    here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    Path("config.yaml").write_text(TRL + f"chat_template: {json.dumps(template)}\n", encoding="utf-8")
    assert here("init", "--from", "config.yaml", "--output", "r.yaml").returncode == 0
    assert Path("r.jinja").read_text(encoding="utf-8") == template
    assert Path(load(Path("r.yaml")).recipe.model.chat_template) == Path("r.jinja").resolve()


def spawn(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """`alignctl init` at a terminal, which is the returned descriptor."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb", "COLUMNS": "200"}
    command = [sys.executable, "-m", "alignctl", "init"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    return process, ours


def read_until(descriptor: int, words: str, seconds: float = 60) -> str:
    said, until = b"", time.monotonic() + seconds
    while words not in said.decode(errors="replace") and time.monotonic() < until:
        with contextlib.suppress(OSError):
            said += os.read(descriptor, 4096)
    return said.decode(errors="replace")


@pytest.mark.usefixtures("rows")
def test_questions_at_a_terminal(tmp_path: Path, model_folder: Path) -> None:
    process, terminal = spawn(tmp_path)
    answers = {"Method": "", "Model": str(model_folder), "Training rows": "rows.jsonl", "GPU memory": "", "Recipe": ""}
    for question, answer in answers.items():
        assert question in read_until(terminal, question)
        os.write(terminal, f"{answer}\n".encode())
    said = read_until(terminal, "next: alignctl dpo model-dpo.yaml", 120)
    assert process.wait(60) == 0, said
    os.close(terminal)
    assert load(tmp_path / "model-dpo.yaml").recipe.method == "dpo"


@pytest.mark.usefixtures("rows")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process, terminal = spawn(tmp_path)
    assert "Method" in read_until(terminal, "Method")
    process.send_signal(signal.SIGINT)
    said = read_until(terminal, "stopped by SIGINT")
    assert process.wait(60) == 130 and "Traceback" not in said
    os.close(terminal)
    assert left() == set()
