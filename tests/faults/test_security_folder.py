"""Nothing is written elsewhere, and what is no run is left alone."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from alignctl import quiet

Train = Callable[..., Any]


def complaints(err: str) -> list[str]:
    """What the command itself says on stderr."""
    return [line for line in err.splitlines() if line.startswith("alignctl: ")]


# 6: where a run writes.


def test_no_model_of_the_hub_is_asked_to_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without safetensors, transformers asks a service to open a pull request in the model's repository."""
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    with quiet.libraries(tmp_path / "libraries.log"):
        assert transformers.utils.import_utils.is_env_variable_true("DISABLE_SAFETENSORS_CONVERSION")
    assert '"DISABLE_SAFETENSORS_CONVERSION"' in inspect.getsource(transformers.modeling_utils)


# 8: the folder of a run.


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_run_is_left_alone(train: Train, tmp_path: Path, kind: str, option: list[str]) -> None:
    mine = tmp_path / "mine"
    if kind == "file":
        mine.write_text("mine", encoding="utf-8")
    else:
        mine.mkdir()
        (mine / "notes.txt").write_text("mine", encoding="utf-8")
    if kind == "link":
        (tmp_path / "link").symlink_to(mine)
    before = {path: path.read_bytes() for path in (mine, *mine.rglob("*")) if path.is_file()}
    ran = train("dpo", None, *option, folder="link" if kind == "link" else "mine")
    assert ran.code == 2 and len(complaints(ran.err)) == 1
    assert {path: path.read_bytes() for path in (mine, *mine.rglob("*")) if path.is_file()} == before


def test_links_in_a_run_folder_are_not_followed(train: Train, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine", encoding="utf-8")
    run = train().folder
    linked = ["model", "logs", "checkpoints", "checkpoints.writing", "model.writing", "stand-in"]
    files = ["recipe.yaml", "ledger.json", "metrics.jsonl", "summary.json", "run.json.writing", "ledger.json.writing"]
    for name in (*linked, *files):
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine / "notes.txt" if name in files else mine)
    ran = train("dpo", None, "--overwrite")
    assert ran.code == 0, ran.err
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    assert (mine / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not any(path.is_symlink() for path in ran.folder.rglob("*"))


def test_a_lock_that_is_a_link_is_not_followed(train: Train, tmp_path: Path) -> None:
    run = train().folder
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "elsewhere")
    ran = train("dpo", None, "--overwrite")
    assert ran.code == 2 and not (tmp_path / "elsewhere").exists()
