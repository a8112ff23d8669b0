"""Which rows a run is evaluated on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignctl.errors import DataError
from alignctl.proof import rows, trained


@pytest.fixture(autouse=True)
def cache(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNCTL_CACHE", str(workshop / "cache"))


def test_a_run_is_evaluated_on_what_it_held_out(finished: Callable[..., Path], workshop: Path) -> None:
    run = trained.opened(finished("dpo"))
    asked = rows.read(run, None)
    assert (asked.name, asked.path, len(asked.rows), asked.pairs) == ("held-out", str(workshop / "test.jsonl"), 8, True)
    assert asked.described()["fingerprint"] == run.run.record["data"]["eval"]["fingerprint"]
    chosen, rejected = asked.lines()[0]
    shown = [run.encoder.tokenizer.decode(line.ids) for line in (chosen, rejected)]
    assert "river 100 lamp" in shown[0] and "Say 100" in shown[0] and "twice" in shown[1]
    assert run.encoder.tokenizer.decode([i for i in chosen.labels if i != -100]).startswith("river 100 lamp")


def test_a_held_out_share_is_found_again(finished: Callable[..., Path]) -> None:
    run = trained.opened(finished("dpo", data={"eval": None, "eval_fraction": 0.25}))
    asked = rows.read(run, None)
    assert len(asked.rows) == 6
    assert asked.rows.fingerprint == run.run.record["data"]["eval"]["fingerprint"]


def test_a_run_that_held_nothing_out_asks_for_rows(finished: Callable[..., Path], workshop: Path) -> None:
    run = trained.opened(finished("dpo", data={"eval": None}))
    with pytest.raises(DataError, match="--data FILE"):
        rows.read(run, None)
    asked = rows.read(run, str(workshop / "other.jsonl"))
    assert (len(asked.rows), asked.overlap) == (8, 0)


def test_rows_that_were_trained_on_are_counted(finished: Callable[..., Path], workshop: Path) -> None:
    asked = rows.read(trained.opened(finished("dpo")), str(workshop / "train.jsonl"))
    assert asked.overlap == 24


def test_overlap_is_not_known_where_the_training_rows_are_gone(
    finished: Callable[..., Path], workshop: Path, tmp_path: Path
) -> None:
    found = trained.opened(finished("dpo"))
    source = found.recipe.data.train[0].model_copy(update={"path": str(tmp_path / "gone.jsonl")})
    moved = found.recipe.model_copy(update={"data": found.recipe.data.model_copy(update={"train": [source]})})
    asked = rows.read(trained.Trained(found.run, moved, found.machine), str(workshop / "other.jsonl"))
    assert asked.overlap is None


def test_held_out_rows_that_have_changed_are_refused(finished: Callable[..., Path], tmp_path: Path) -> None:
    run = trained.opened(finished("dpo"))
    lines = (run.run.path.parents[1] / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    assert run.recipe.data.eval is not None
    source = run.recipe.data.eval[0].model_copy(update={"path": str(tmp_path / "test.jsonl")})
    data = run.recipe.data.model_copy(update={"eval": [source]})
    with pytest.raises(DataError, match="not what the run held out"):
        rows.read(trained.Trained(run.run, run.recipe.model_copy(update={"data": data}), run.machine), None)


def test_an_sft_run_reads_pairs_as_pairs_and_conversations_as_rows(
    finished: Callable[..., Path], workshop: Path, tmp_path: Path
) -> None:
    run = trained.opened(finished("sft"))
    assert not rows.read(run, None).pairs
    assert rows.read(run, str(workshop / "other.jsonl")).pairs
    talk = [{"role": "user", "content": "Say tea."}, {"role": "assistant", "content": "tea"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n", encoding="utf-8")
    asked = rows.read(run, str(tmp_path / "talks.jsonl"))
    assert not asked.pairs and [len(line) for line in asked.lines()] == [1]


def test_a_prompt_is_asked_once(finished: Callable[..., Path], workshop: Path, tmp_path: Path) -> None:
    lines = (workshop / "other.jsonl").read_text(encoding="utf-8").splitlines()
    twice = [json.dumps(json.loads(line) | {"rejected": "no"}) for line in lines[:2]]
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines[:2], *twice, lines[2]]) + "\n", encoding="utf-8")
    asked = rows.read(trained.opened(finished("dpo")), str(tmp_path / "twice.jsonl"))
    assert asked.described() | {"fingerprint": ""} == {
        "path": str(tmp_path / "twice.jsonl"),
        "rows": 5,
        "prompts": 3,
        "fingerprint": "",
    }
    assert [number for number, _ in asked.questions(10)] == [0, 1, 4]
    assert [number for number, _ in asked.questions(2)] == [0, 1]


def test_files_of_one_name_in_two_folders_are_two_evaluations(
    finished: Callable[..., Path], workshop: Path, tmp_path: Path
) -> None:
    shutil.copy(workshop / "other.jsonl", tmp_path / "other.jsonl")
    run = trained.opened(finished("dpo"))
    names = {rows.read(run, str(folder / "other.jsonl")).name for folder in (workshop, tmp_path)}
    assert len(names) == 2 and all(name.startswith("other-") for name in names)


def test_an_empty_file_holds_nothing_to_evaluate_on(finished: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError):
        rows.read(trained.opened(finished("dpo")), str(tmp_path / "none.jsonl"))
