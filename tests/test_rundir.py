"""The run folder: nothing half-written, nothing of others removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from alignctl import rundir
from alignctl.errors import AlignctlError, MachineError, RecipeError
from alignctl.rundir import RunDir


def names(folder: Path) -> list[str]:
    """What is in a folder, without the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def made(path: Path, *parts: str, **record: object) -> RunDir:
    """A run folder with `parts` of what training makes."""
    run = RunDir(path)
    run.create({"command": "alignctl dpo r.yaml"}, overwrite=False)
    for part in parts:
        if part.endswith(".jsonl"):
            (path / part).write_text("{}\n", encoding="utf-8")
        else:
            (path / part).mkdir()
            (path / part / "weights").write_text("old\n", encoding="utf-8")
    run.update(**record)
    run.release()
    return run


def refusal(path: Path, *, overwrite: bool, file: str = "", error: type[AlignctlError] = RecipeError) -> str:
    """What is said when the folder is refused, for itself or for the `file` in it; the place is left out."""
    with pytest.raises(error) as caught:
        RunDir(path).create({}, overwrite=overwrite)
    (problem,) = caught.value.problems
    assert problem.where == str(path / file)
    return str(problem).removeprefix(f"{path / file}: ")


# --- writing and reading


def test_write_text_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    rundir.write_text(path, "long old text, zwölf\n")
    rundir.write_text(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    assert names(tmp_path) == ["a.txt"]


def test_write_json_is_readable_text(tmp_path: Path) -> None:
    rundir.write_json(tmp_path / "a.json", {"b": "ü", "a": [1, None]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == ('{\n  "b": "ü",\n  "a": [\n    1,\n    null\n  ]\n}\n')
    assert rundir.read_json(tmp_path / "a.json") == {"b": "ü", "a": [1, None]}


def test_write_jsonl_is_a_line_a_row(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo"}, {"text": "ü", "n": 5e-7}]
    rundir.write_jsonl(tmp_path / "a.jsonl", rows)
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8").count("\n") == 2
    assert rundir.read_jsonl(tmp_path / "a.jsonl") == rows
    rundir.write_jsonl(tmp_path / "a.jsonl", [])
    assert rundir.read_jsonl(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_row_may_hold_any_character(character: str, tmp_path: Path) -> None:
    rows = [{"text": f"a{character}b"}]
    rundir.write_jsonl(tmp_path / "a.jsonl", rows)
    assert rundir.read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("value", [{"a": 1, "b": object()}, {"a": {1, 2}}, {"a": Path()}])
def test_what_cannot_be_serialised_leaves_the_old_file(value: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rundir.write_json(path, {"old": True})
    with pytest.raises(TypeError):
        rundir.write_json(path, value)
    with pytest.raises(TypeError):
        rundir.write_jsonl(path, [{"a": 1}, value])
    assert rundir.read_json(path) == {"old": True}
    assert names(tmp_path) == ["a.json"]


def full_disk(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    rundir.write_json(path, {"old": True})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        rundir.write_json(path, {"new": True})
    assert rundir.read_json(path) == {"old": True}


def test_a_full_disk_leaves_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        rundir.write_json(tmp_path / "a.json", {"new": True})
    assert names(tmp_path) == []


def test_text_that_cannot_be_encoded_leaves_nothing_beside(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        rundir.write_json(tmp_path / "a.json", {"text": "half a pair \ud83d"})
    assert names(tmp_path) == []


def test_a_file_that_is_not_there_reads_as_nothing(tmp_path: Path) -> None:
    assert rundir.read_json(tmp_path / "gone.json") == {}
    assert rundir.read_jsonl(tmp_path / "gone.jsonl") == []
    assert rundir.read_json(tmp_path) == {}


def test_now_is_utc_to_the_second() -> None:
    moment = datetime.fromisoformat(rundir.now())
    assert moment.utcoffset() == timedelta(0)
    assert moment.microsecond == 0


# --- create


@pytest.mark.parametrize("empty", [False, True])
def test_create_a_folder(empty: bool, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "demo"
    if empty:
        path.mkdir(parents=True)
    run = RunDir(path)
    run.create({"command": "alignctl dpo demo"}, overwrite=False)
    assert names(path) == ["logs", "run.json"]
    assert list(run.record) == ["status", "started", "command"]
    assert (run.record["status"], run.record["command"]) == ("running", "alignctl dpo demo")
    assert RunDir(path).record == run.record == json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert not run.trained


@pytest.mark.parametrize("part", ["metrics.jsonl", "model", "checkpoints"])
@pytest.mark.parametrize(("status", "said"), [("finished", "finished"), ("failed", "failed"), ("running", "killed")])
def test_a_run_that_trained_is_refused(part: str, status: str, said: str, tmp_path: Path) -> None:
    run = made(tmp_path / "run", part, status=status)
    assert run.trained
    assert refusal(run.path, overwrite=False) == (
        f"holds a run already (status: {said}) — --output DIR to keep both, --overwrite to replace it"
    )
    assert names(run.path) == sorted(["logs", "run.json", part])
    assert RunDir(run.path).record == run.record


@pytest.mark.parametrize(
    ("status", "way_out"),
    [("finished", ""), ("failed", "--resume to go on with it, "), ("running", "--resume to go on")],
)
def test_a_run_with_a_checkpoint_can_go_on_unless_it_is_finished(status: str, way_out: str, tmp_path: Path) -> None:
    run = made(tmp_path / "run", status=status)
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    said = refusal(run.path, overwrite=False)
    assert way_out in said and ("--resume" in said) == bool(way_out)


def test_a_run_that_trained_is_replaced_when_asked(tmp_path: Path) -> None:
    old = made(tmp_path / "run", "metrics.jsonl", "model", "checkpoints", status="finished", loss=0.5)
    run = RunDir(old.path)
    run.create({"command": "again"}, overwrite=True)
    assert names(run.path) == ["logs", "run.json"]
    assert list(run.record) == ["status", "started", "command"]
    assert rundir.read_json(run / "run.json")["status"] == "running"


def test_a_run_that_never_trained_is_replaced(tmp_path: Path) -> None:
    old = made(tmp_path / "run", status="failed", error="no rows")
    (old / "logs" / "libraries.log").write_text("old\n", encoding="utf-8")
    run = RunDir(old.path)
    run.create({"command": "again"}, overwrite=False)
    assert names(run / "logs") == []
    assert "error" not in run.record
    assert run.record["status"] == "running"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_refused(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine\n", encoding="utf-8")
    (tmp_path / "model").mkdir()
    assert refusal(tmp_path, overwrite=overwrite) == "exists and is not a run folder — give --output another folder"
    assert names(tmp_path) == ["model", "notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_run_json_of_another_tool_makes_no_run_folder(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"tool": "other"}\n', encoding="utf-8")
    (tmp_path / "thesis.tex").write_text("mine\n", encoding="utf-8")
    assert refusal(tmp_path, overwrite=overwrite) == "exists and is not a run folder — give --output another folder"
    assert names(tmp_path) == ["run.json", "thesis.tex"]


@pytest.mark.parametrize(("text", "what"), [("{", "Expecting property name"), ("[]", "not an object — ")])
def test_a_broken_run_json_is_refused(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    said = refusal(tmp_path, overwrite=False, file="run.json")
    assert said.startswith(f"cannot be read: {what}")
    assert said.endswith(" — give --output another folder")
    assert names(tmp_path) == ["metrics.jsonl", "run.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_run_folder(overwrite: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine\n", encoding="utf-8")
    assert refusal(path, overwrite=overwrite) == "exists and is not a run folder — give --output another folder"
    assert path.read_text(encoding="utf-8") == "mine\n"


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine\n", encoding="utf-8")
    path = tmp_path / "file" / "run"
    assert refusal(path, overwrite=False) == "cannot be written: Not a directory — give --output another folder"


def test_a_parent_without_permission_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    expected = "cannot be written: Permission denied — give --output another folder"
    assert refusal(tmp_path / "run", overwrite=False) == expected


def test_a_link_to_a_run_is_a_run(tmp_path: Path) -> None:
    made(tmp_path / "scratch", "model", status="finished")
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "scratch")
    assert refusal(link, overwrite=False).startswith("holds a run already")
    RunDir(link).create({"command": "again"}, overwrite=True)
    assert names(tmp_path / "scratch") == ["logs", "run.json"]
    assert link.is_symlink() and RunDir(tmp_path / "scratch").record["command"] == "again"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_the_machines(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    said = refusal(tmp_path / "run", overwrite=False, error=MachineError)
    assert said == "the disk is full — free space, then run again"
    assert not RunDir(tmp_path / "run").is_claimed()


@pytest.mark.parametrize("stop", ["run.json", "checkpoints.writing", "model", "metrics.jsonl"])
def test_a_run_that_was_killed_while_it_replaced_another_is_not_taken_for_it(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped anywhere in what `--overwrite` does, the old checkpoints never stand under the new record."""

    class Killed(BaseException):
        pass

    def kill(function: Callable[..., Any], path: Path, *given: Any) -> Any:
        if path.name == stop:
            raise Killed
        return function(path, *given)

    old = made(tmp_path / "run", "metrics.jsonl", "model", status="failed", command="old")
    (old / "checkpoints" / "step-3").mkdir(parents=True)
    for name in ("write_json", "remove"):
        function = rundir.__dict__[name]
        monkeypatch.setattr(rundir, name, lambda *given, function=function: kill(function, *given))
    with pytest.raises(Killed):
        RunDir(old.path).create({"command": "new"}, overwrite=True)
    monkeypatch.undo()
    left = RunDir(old.path)
    assert (left.record["command"] == "new") == (stop != "run.json")
    assert left.checkpoints() == []
    RunDir(old.path).create({"command": "newest"}, overwrite=True)
    assert names(old.path) == ["logs", "run.json"]


# --- one process at a time


HOLDS = """import sys, time
from pathlib import Path
from alignctl.rundir import RunDir
run = RunDir(Path(sys.argv[1]))
run.create({"command": "other"}, overwrite=True)
if len(sys.argv) > 2:
    import os
    if os.fork() == 0:
        time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""
WRITTEN = "is being written by another run — wait until it has ended, or give --output another folder"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that writes the folder `run`, and so does no other; with `fork` it has a child."""
    started = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDS, str(tmp_path / "run"), *options]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        assert started[-1].stdout is not None and started[-1].stdout.readline().startswith("held")
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_being_written_is_refused(
    overwrite: bool, tmp_path: Path, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    holder()
    assert refusal(tmp_path / "run", overwrite=overwrite) == WRITTEN
    run = RunDir(tmp_path / "run")
    assert run.is_claimed() and run.status == "running"
    with pytest.raises(RecipeError, match="is being written by another run"):
        run.claim()
    assert run.record["command"] == "other"


@pytest.mark.parametrize("options", [(), ("fork",)], ids=["alone", "with a child"])
def test_a_killed_process_lets_go_at_once(
    options: tuple[str, ...], tmp_path: Path, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    process = holder(*options)
    process.kill()
    process.wait()
    run = RunDir(tmp_path / "run")
    assert not run.is_claimed() and run.status == "killed"
    run.claim()
    assert run.record["status"] == "killed"


def test_a_folder_that_was_let_go_is_free(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create({"command": "first"}, overwrite=False)
    assert run.status == "running" and RunDir(run.path).status == "running"
    assert refusal(run.path, overwrite=True) == WRITTEN
    run.update(status="finished")
    run.release()
    assert not RunDir(run.path).is_claimed()


def test_what_was_written_since_the_record_was_read_counts(tmp_path: Path) -> None:
    """Two processes start at once, and the first is done before the second has the lock."""
    late = RunDir(tmp_path / "run")
    made(tmp_path / "run", "model", status="finished")
    with pytest.raises(RecipeError, match="holds a run already"):
        late.create({"command": "late"}, overwrite=False)
    assert (tmp_path / "run" / "model" / "weights").exists()


def test_one_who_only_looks_does_not_keep_a_run_from_its_folder(tmp_path: Path) -> None:
    run = made(tmp_path / "run", status="finished")
    looking = (run / ".lock").open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert not RunDir(run.path).is_claimed()
    threading.Timer(0.03, looking.close).start()
    RunDir(run.path).claim()


# --- a run that goes on


def test_going_on_takes_back_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "model", status="failed", why="a gate", ended="now", gates={"resume": {}})
    for step in (1, 2, 3, 4):
        run.append_metrics({"step": step})
    for name in ("step-2", ".writing/checkpoint-4", ".writing/step-1"):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "model.writing").mkdir()
    for name in ("run.json.writing", "report.html", "logs/after.json", "logs/before.json", "logs/live.json.writing"):
        (run / name).write_text("{}", encoding="utf-8")
    again = RunDir(run.path)
    again.claim()
    again.go_on(run / "checkpoints" / "step-2")
    assert names(run.path) == ["checkpoints", "logs", "metrics.jsonl", "run.json"]
    assert names(run / "logs") == ["before.json"] and names(run / "checkpoints") == ["step-2"]
    assert [row["step"] for row in again.metrics()] == [1, 2]
    record = rundir.read_json(run / "run.json")
    assert record["status"] == "running" and record["resumed_from"] == "step-2" and "gates" in record
    assert not {"why", "ended"} & record.keys()


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\x00" * 40, b'{"text": "\xc3', b"\n"])
def test_a_torn_line_of_metrics_does_not_count(torn: bytes, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    run.append_metrics({"step": 1})
    run.append_metrics({"step": 2})
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    run.cut_metrics(2)
    run.append_metrics({"step": 3})
    assert (run / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_update_changes_the_file_and_keeps_the_rest(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    run.update(status="finished", loss=0.5)
    again = RunDir(run.path)
    assert again.record == run.record
    assert (again.record["status"], again.record["loss"]) == ("finished", 0.5)
    assert again.record["command"] == "alignctl dpo r.yaml"
    assert names(run.path) == ["logs", "run.json"]


def test_an_update_that_cannot_be_serialised_leaves_the_file(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    with pytest.raises(TypeError):
        run.update(loss=object())
    assert "loss" not in RunDir(run.path).record
    assert names(run.path) == ["logs", "run.json"]


def test_metrics_are_added_line_by_line(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    run.append_metrics({"step": 1, "loss": 0.5})
    assert run.trained
    run.append_metrics({"step": 2, "loss": 5e-7})
    assert (run / "metrics.jsonl").read_text(encoding="utf-8") == (
        '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 5e-07}\n'
    )


# --- checkpoints


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100, 9, 20, 1000):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    found = RunDir(tmp_path).checkpoints()
    assert found == [tmp_path / "checkpoints" / f"step-{step}" for step in (9, 20, 100, 1000)]


@pytest.mark.parametrize(
    "unfinished", [".writing/checkpoint-7", "step-7.writing", "step-", "step-7-old", "step--7", "checkpoint-7", "7"]
)
def test_an_unfinished_checkpoint_is_not_listed(unfinished: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-5").mkdir(parents=True)
    (tmp_path / "checkpoints" / unfinished).mkdir(parents=True)
    assert RunDir(tmp_path).checkpoints() == [tmp_path / "checkpoints" / "step-5"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert RunDir(tmp_path).checkpoints() == []
    (tmp_path / "checkpoints").mkdir()
    assert RunDir(tmp_path).checkpoints() == []


def test_a_changed_file_of_a_checkpoint_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    for name in ("weights", "reference/weights", "alignctl.json"):
        (tmp_path / name).write_bytes(b"1")
    one = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert rundir.digests(tmp_path) == {"weights": one, "reference/weights": one}
    (tmp_path / "weights").write_bytes(b"2")
    (tmp_path / "alignctl.json").write_bytes(b"2")
    found = rundir.digests(tmp_path)
    assert found["reference/weights"] == one != found["weights"]


def test_remove_takes_files_links_and_folders(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name in ("link", "folder", "file", "gone"):
        rundir.remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
