"""Sources: what a path, a glob, a folder or a hub name stands for, its rows, and what tells it from another."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.load import OfflineModeIsEnabled, httpx

from alignctl.errors import DataError, MachineError
from alignctl.recipe.schema import Source
from alignctl.train import sources
from alignctl.train.files import RawRow

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Pear."}], "score": 1},
    {"messages": [{"role": "user", "content": "Name a tool."}], "score": None},
    {"messages": [], "score": 3},
]


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    sources._loaded.cache_clear()
    yield
    sources._loaded.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(*paths: str) -> None:
    """Files with one row, their own path."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"a": str(path)}).encode()
        path.write_bytes(gzip.compress(line) if path.suffix == ".gz" else line)


def read(path: Path | str, **options: Any) -> list[RawRow]:
    return list(sources.read(Source(path=str(path), **options)))


def names(path: Path | str, split: str = "train") -> list[str]:
    return [str(file) for file in sources.files(Source(path=str(path), split=split))]


def identity(path: Path | str, **options: Any) -> str:
    return sources.identity(Source(path=str(path), **options))


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        read(path, **options)
    assert error.value.exit_code == 3
    return str(error.value)


# What is local


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("rows.jsonl", True),
        ("data/rows.parquet", True),
        ("data/rows.arrow", True),
        ("rows.tsv.gz", True),
        ("rows.json.zst", True),
        ("data/*.jsonl", True),
        ("data/**", True),
        ("rows/", True),
        ("./rows", True),
        ("../rows", True),
        ("/rows", True),
        ("~/rows", True),
        ("someone/some-rows", False),
        ("someone/some.rows", False),
        ("rows", False),
    ],
)
def test_what_is_local(folder: Path, path: str, expected: bool) -> None:
    assert sources.is_local(path) is expected


@pytest.mark.parametrize("path", ["rows", "data"])
def test_what_exists_is_local(folder: Path, path: str) -> None:
    (folder / "rows").touch()
    (folder / "data").mkdir()
    assert sources.is_local(path)


# One file


def test_a_tilde_is_the_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    fill("rows.jsonl")
    assert read("~/rows.jsonl") == read("~/*.jsonl") == [RawRow("rows.jsonl:1", {"a": "rows.jsonl"})]


def test_take_is_the_first_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\nbroken\n', encoding="utf-8")
    assert [row.values["a"] for row in read("rows.jsonl", take=2)] == [1, 2]
    assert refusal("rows.jsonl", take=3).startswith("rows.jsonl:3: not JSON")
    (folder / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    assert len(read("rows.jsonl", take=9)) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n \n"),
        ("rows.json", ""),
        ("rows.json", "[]"),
        ("rows.csv", ""),
        ("rows.csv", "a,b\n"),
        ("rows.tsv.gz", ""),
        ("rows.jsonl.zst", ""),
        ("rows.parquet", ""),
        ("rows.arrow", ""),
    ],
)
def test_an_empty_file_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    assert refusal(name) == f"{name}: has no rows — give a file with at least one row"


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "~/missing.txt", "/nowhere/rows.csv", "missing/"])
def test_a_missing_file_is_named(folder: Path, path: str) -> None:
    assert refusal(path).startswith(f"{path}: no such file — ")


def test_the_home_of_nobody_is_named(folder: Path) -> None:
    assert refusal("~no-such-user/rows.jsonl").startswith("~no-such-user/rows.jsonl: cannot be read: ")


def test_a_file_of_an_unknown_kind_is_named(folder: Path) -> None:
    fill("rows.txt")
    assert refusal("./rows.txt").startswith("rows.txt: unknown kind of file '.txt' — one of .jsonl, .json, .csv, .tsv,")


def test_a_file_may_have_the_name_of_a_glob(folder: Path) -> None:
    fill("rows[1].jsonl", "rows1.jsonl")
    assert names("rows[1].jsonl") == ["rows[1].jsonl"]
    assert names("rows[1]*.jsonl") == ["rows1.jsonl"]


# Several files


def test_rows_of_several_files_come_one_after_the_other(folder: Path) -> None:
    fill("b.jsonl", "a.jsonl.gz", "c.txt")
    (folder / "aa.csv").touch()
    rows = [RawRow("a.jsonl.gz:1", {"a": "a.jsonl.gz"}), RawRow("b.jsonl:1", {"a": "b.jsonl"})]
    assert read(folder) == read(folder / "*") == rows
    assert read(folder, take=1) == rows[:1]


def test_files_are_opened_one_after_the_other(folder: Path) -> None:
    fill("a.jsonl", "b.jsonl")
    rows = sources.read(Source(path="*.jsonl"))
    assert next(rows).place == "a.jsonl:1"
    (folder / "b.jsonl").write_text("broken", encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl:1: not JSON"):
        next(rows)


def test_a_glob_takes_files_with_rows(folder: Path) -> None:
    fill("data/b.jsonl", "data/a.jsonl", "data/c.json", "data/.d.jsonl", "data/e/f.jsonl", "data/e/test.jsonl")
    fill("data/notes.txt", "data/state.json")
    assert names("data/*.jsonl") == ["data/a.jsonl", "data/b.jsonl"]
    assert names("data/*") == ["data/a.jsonl", "data/b.jsonl", "data/c.json"]
    assert names("data/[bc].*") == ["data/b.jsonl", "data/c.json"]
    assert names("data/**/*.jsonl") == ["data/a.jsonl", "data/b.jsonl", "data/e/f.jsonl", "data/e/test.jsonl"]
    assert names(folder / "data" / "e" / "?.jsonl") == [str(folder / "data" / "e" / "f.jsonl")]


def test_a_folder_takes_all_files_below_it(folder: Path) -> None:
    fill("data/b.jsonl", "data/a/c.csv", "data/z.parquet", "data/d.tsv.gz", "data/.hidden/e.jsonl", "data/.f.jsonl")
    fill("data/README.md", "data/dataset_info.json", "data/state.json", "data/dataset_dict.json", "data/cache-1.arrow")
    assert names("data") == names("data/") == ["data/a/c.csv", "data/b.jsonl", "data/d.tsv.gz", "data/z.parquet"]


@pytest.mark.parametrize("path", ["nothing", "nothing/*.jsonl", "nothing/**", "*.txt", "*"])
def test_a_folder_or_glob_without_files_is_named(folder: Path, path: str) -> None:
    fill("nothing/notes.txt", "notes.txt", "nothing/.hidden.jsonl")
    assert refusal(path).startswith(f"{path}: no file with rows is there — known kinds: .jsonl, .json, ")


SPLITS: dict[str, tuple[list[str], str, list[str]]] = {
    "files": (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
    "held-out file": (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
    "shards": (["train-2-of-2.csv", "train-1-of-2.csv", "dev.csv"], "train", ["train-1-of-2.csv", "train-2-of-2.csv"]),
    "sub-folders": (["eval/a.jsonl", "train/b.jsonl", "train/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
    "one split only": (["train.jsonl"], "train", ["train.jsonl"]),
    "inside a name": (["my-Train_v2.jsonl", "my-Val.jsonl.gz"], "val", ["my-Val.jsonl.gz"]),
    "after a language": (["de_train.csv", "en_train.csv", "en_dev.csv"], "train", ["de_train.csv", "en_train.csv"]),
    "other files": (["train.jsonl", "extra.jsonl"], "train", ["train.jsonl"]),
    "no split's word": (["latest.csv", "training.csv"], "train", ["latest.csv", "training.csv"]),
    "exactly": (["train_prefs-0.jsonl", "train_sft-0.jsonl", "test_sft-0.jsonl"], "train_sft", ["train_sft-0.jsonl"]),
    "exactly before nearly": (["train/a.jsonl", "train_sft/a.jsonl"], "train", ["train/a.jsonl"]),
    "nearly": (["train_prefs.jsonl", "test_prefs.jsonl"], "train", ["train_prefs.jsonl"]),
    "a name of one's own": (["prefs.jsonl", "train.jsonl"], "prefs", ["prefs.jsonl"]),
}


@pytest.mark.parametrize(("found", "split", "expected"), SPLITS.values(), ids=SPLITS.keys())
def test_a_folder_gives_the_files_of_the_split(folder: Path, found: list[str], split: str, expected: list[str]) -> None:
    fill(*(f"data/{name}" for name in found))
    assert names("data", split) == [f"data/{name}" for name in expected]


def test_the_folder_s_own_name_is_no_split(folder: Path) -> None:
    fill("test/a.jsonl")
    assert names("test", "train") == ["test/a.jsonl"]


@pytest.mark.parametrize(
    ("found", "split", "message"),
    [
        (["train.jsonl", "test.jsonl"], "validation", "data: has no split 'validation': it has test, train — "),
        (
            ["train_prefs/a.csv", "test_prefs/a.csv"],
            "eval",
            "data: has no split 'eval': it has test_prefs, train_prefs",
        ),
        (["test.jsonl", "a.jsonl"], "train", "data: has no split 'train': it has test — "),
        (
            ["train_sft.csv", "train_gen.csv"],
            "train",
            "data: has several splits 'train': it has train_gen, train_sft — ",
        ),
    ],
)
def test_a_split_that_is_not_there_lists_the_others(folder: Path, found: list[str], split: str, message: str) -> None:
    fill(*(f"data/{name}" for name in found))
    assert refusal("data", split=split).startswith(message)


def test_what_datasets_saves_is_read(folder: Path) -> None:
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))
    saved.save_to_disk("saved", num_shards={"train": 3, "test": 1})
    assert [row.values for row in read("saved")] == ROWS
    assert [row.values for row in read("saved", split="test")] == ROWS[:1]
    assert [row.place for row in read("saved")][2] == "data-00002-of-00003.arrow row 1"
    saved["train"].save_to_disk("alone")
    assert [row.values for row in read("alone")] == ROWS


# Identity


def test_the_identity_follows_names_and_bytes(folder: Path) -> None:
    fill("data/a.jsonl", "data/b.jsonl")
    first = identity("data")
    assert first == identity("data") == identity("data/*.jsonl", take=1)
    assert len(first) == 64
    (folder / "data" / "b.jsonl").rename(folder / "data" / "c.jsonl")
    renamed = identity("data")
    (folder / "data" / "c.jsonl").write_text("{}", encoding="utf-8")
    assert len({first, renamed, identity("data"), identity("data/a.jsonl")}) == 4


def test_the_identity_follows_the_split(folder: Path) -> None:
    fill("data/train.jsonl", "data/test.jsonl")
    assert identity("data", split="train") == identity("data/train.jsonl") != identity("data", split="test")


def test_the_identity_of_a_large_file_is_quick(folder: Path) -> None:
    with (folder / "rows.jsonl").open("wb") as file:
        file.truncate(100_000_000)
    begin = time.perf_counter()
    identity("rows.jsonl")
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("path", ["missing.jsonl", "*.jsonl", "rows.txt", "data"])
def test_nothing_has_no_identity(folder: Path, path: str) -> None:
    fill("rows.txt", "data/notes.txt")
    with pytest.raises(DataError):
        identity(f"./{path}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_locked_file_has_no_identity(folder: Path) -> None:
    fill("rows.jsonl")
    (folder / "rows.jsonl").chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        identity("rows.jsonl")


def test_the_module_is_light() -> None:
    code = "import sys, alignctl.train.sources; print(*sorted({'torch', 'datasets', 'pyarrow'} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


# The hub


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the library raise `error`, whatever it is asked for."""

    def load_dataset(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def read_hub() -> list[RawRow]:
    return read("someone/some-rows", split="train")


UNREACHABLE: list[Exception] = [
    ConnectionError("Couldn't reach 'someone/some-rows' on the Hub (LocalEntryNotFoundError)"),
    datasets.exceptions.DatasetNotFoundError("Dataset 'someone/some-rows' doesn't exist on the Hub"),
    OfflineModeIsEnabled("Offline mode is enabled."),
    TimeoutError("timed out"),
    FileNotFoundError("Couldn't find any data file"),
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("timed out"),
]


@pytest.mark.parametrize("error", UNREACHABLE, ids=lambda error: type(error).__name__)
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raising(monkeypatch, error)
    with pytest.raises(MachineError) as raised:
        read_hub()
    assert raised.value.exit_code == 4
    assert str(raised.value) == (
        "someone/some-rows: the hub has no such data set, or cannot be reached "
        f"({type(error).__name__}) — check the name and the network, or give a local file"
    )


def test_a_data_set_that_needs_a_script_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RuntimeError("Dataset scripts are no longer supported, but found some-rows.py"))
    with pytest.raises((DataError, MachineError), match="scripts are no longer supported"):
        read_hub()


def test_a_data_set_that_cannot_be_built_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    error = datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = OSError(28, "No space left on device")
    raising(monkeypatch, error)
    with pytest.raises((DataError, MachineError), match="No space left on device"):
        read_hub()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Unknown split \"train\". Should be one of ['test'].\nand more"),
        datasets.exceptions.DataFilesNotFoundError("Unknown split, no (supported) data files found"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_split_that_the_hub_has_not(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raising(monkeypatch, error)
    with pytest.raises(DataError) as raised:
        read_hub()
    first = str(error).splitlines()[0]
    assert str(raised.value) == f"someone/some-rows: {first} — set `split`, `name` and `revision`"


def test_hub_rows_come_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.Dataset:
        asked.update(options, path=path, name=name)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="someone/some-rows", name="small", split="test", revision="abc", take=1)
    assert list(sources.read(source)) == [RawRow("someone/some-rows[test] row 1", ROWS[0])]
    assert asked == {
        "path": "someone/some-rows",
        "name": "small",
        "split": "test",
        "revision": "abc",
        "streaming": False,
    }


class Counted:
    """A library that counts how often it is asked, and hands out a fingerprint of its own."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.fingerprint = "one"

    def __call__(self, *arguments: Any, split: str, revision: str | None, streaming: bool) -> datasets.Dataset:
        self.asked.append((*arguments, split, revision))
        return datasets.Dataset(datasets.Dataset.from_list(ROWS).data, fingerprint=self.fingerprint)


def test_a_hub_data_set_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Counted()
    monkeypatch.setattr(datasets, "load_dataset", library)
    for take in (None, 1):
        identity("someone/some-rows", take=take)
        read("someone/some-rows", take=take)
    assert library.asked == [("someone/some-rows", None, "train", None)]
    read("someone/some-rows", split="test")
    assert len(library.asked) == 2


def test_the_identity_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Counted()
    monkeypatch.setattr(datasets, "load_dataset", library)
    options: list[dict[str, Any]] = [{}, {"name": "small"}, {"split": "test"}, {"revision": "abc"}]
    found = {identity("someone/some-rows", **each) for each in options} | {identity("someone/others")}
    assert len(found) == 5
    library.fingerprint = "two"
    assert identity("someone/some-rows") in found
    sources._loaded.cache_clear()
    assert identity("someone/some-rows") not in found


def test_the_hub_is_asked_again_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ConnectionError("down"))
    with pytest.raises(MachineError):
        identity("someone/some-rows")
    monkeypatch.setattr(datasets, "load_dataset", Counted())
    assert len(read_hub()) == 3


def test_a_hub_data_set_without_rows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([]))
    assert refusal("someone/some-rows").startswith("someone/some-rows: has no rows — ")
