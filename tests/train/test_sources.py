"""Rows from files and from the hub: their values, their places, and what is said of a file that is broken."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.load import OfflineModeIsEnabled, httpx

from alignctl.errors import DataError, MachineError
from alignctl.recipe.schema import Source
from alignctl.train import sources
from alignctl.train.sources import RawRow

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"prompt": "Name a fruit.", "chosen": "Pear.", "rejected": "Brick."},
    {"prompt": "Grüße auf Thai?", "chosen": "สวัสดี 🙂", "rejected": ""},
    {"prompt": 'Say "a, b"\nin two lines.', "chosen": 'It is\n"a, b".', "rejected": "\\n\t;"},
]
NESTED: Rows = [
    {"messages": [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Pear."}], "score": 1},
    {"messages": [{"role": "user", "content": "Name a tool."}], "score": None},
]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def read(path: Path, **source: Any) -> list[RawRow]:
    return sources.read(Source(path=str(path), **source))


def fault(path: Path, content: str | bytes, **source: Any) -> str:
    """What is said of a file with this content, without the folder."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as error:
        read(path, **source)
    assert error.value.exit_code == 3
    return str(error.value).removeprefix(f"{path.parent}/")


@pytest.mark.parametrize("suffix", WRITERS)
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    assert [row.values for row in read(path)] == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_lists_and_nulls_survive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, NESTED)
    assert [row.values for row in read(path)] == NESTED


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        (".jsonl", ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]),
        (".json", ["rows.json row 1", "rows.json row 2", "rows.json row 3"]),
        (".parquet", ["rows.parquet row 1", "rows.parquet row 2", "rows.parquet row 3"]),
    ],
)
def test_places_count_from_1(tmp_path: Path, suffix: str, places: list[str]) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    assert [row.place for row in read(path)] == places


def test_parquet_rows_are_counted_through_batches(tmp_path: Path) -> None:
    """They come 65,536 at a time."""
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(1, 65_540))}), path, row_group_size=1000)
    rows = read(path)
    assert len(rows) == 65_539
    assert rows[-1] == RawRow("rows.parquet row 65539", {"n": 65_539})


@pytest.mark.parametrize("suffix", WRITERS)
def test_take_is_the_first_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    assert [row.values for row in read(path, take=2)] == ROWS[:2]
    assert len(read(path, take=9)) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", '{"a": 1}\nbroken\n'), ("rows.csv", "a,b\n1,2\nshort\n")],
)
def test_take_stops_before_a_broken_row(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert len(read(path, take=1)) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.values for row in read(path)] == ROWS


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n   \n\n{"a": 2}\r\n\n', encoding="utf-8")
    assert read(path) == [RawRow("rows.jsonl:2", {"a": 1}), RawRow("rows.jsonl:5", {"a": 2})]


def test_a_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": "\u2028x"}', encoding="utf-8")
    assert read(path) == [RawRow("rows.jsonl:1", {"a": 1}), RawRow("rows.jsonl:2", {"a": "\u2028x"})]


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert [row.values for row in sources.read(Source(path="~/rows.jsonl"))] == ROWS


JSON_FAULTS: dict[str, tuple[str, str, str]] = {
    "word": ("rows.jsonl", '{"a": 1}\n\nnope\n', "rows.jsonl:3: not JSON: Expecting value (column 1) — "),
    "inside": (
        "rows.jsonl",
        '{"a": 1, b: 2}\n',
        "rows.jsonl:1: not JSON: Expecting property name enclosed in double quotes (column 10) — ",
    ),
    "two": ("rows.jsonl", '{"a": 1}\n{"a": 2} {"a": 3}\n', "rows.jsonl:2: not JSON: Extra data (column 10) — "),
    "list": (
        "rows.jsonl",
        '{"a": 1}\n[1, 2]\n',
        "rows.jsonl:2: a row must be an object with named columns, found [1, ",
    ),
    "text": ("rows.jsonl", '"a"\n', "rows.jsonl:1: a row must be an object with named columns, found 'a' — "),
    "null": ("rows.jsonl", "null\n", "rows.jsonl:1: a row must be an object with named columns, found None — "),
    "inside many lines": (
        "rows.json",
        '[\n  {"a": 1},\n  {\n    "a":\n  }\n]\n',
        "rows.json:5: not JSON: Expecting value (column 3) — ",
    ),
    "no end": ("rows.json", '[\n{"a": 1}', "rows.json:2: not JSON: Expecting ',' delimiter (column 9) — "),
    "number among rows": (
        "rows.json",
        '[{"a": 1}, 2]',
        "rows.json row 2: a row must be an object with named columns, found 2 — ",
    ),
    "one object": ("rows.json", '{"a": 1}', "rows.json: is not a JSON array of rows — one object a line belongs in a "),
}


@pytest.mark.parametrize(("name", "content", "message"), JSON_FAULTS.values(), ids=JSON_FAULTS.keys())
def test_broken_json_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    assert fault(tmp_path / name, content).startswith(message)


@pytest.mark.parametrize("broken", ['{"a": 1', '{"a":', '{"a"', '{"a": [1,'])
def test_a_line_that_is_cut_off_is_named_itself(tmp_path: Path, broken: str) -> None:
    said = fault(tmp_path / "rows.jsonl", f'{{"a": 1}}\n{broken}\n{{"a": 3}}\n')
    assert said.startswith("rows.jsonl:2: not JSON: ")


def test_an_object_a_line_in_a_json_file_is_sent_to_jsonl(tmp_path: Path) -> None:
    assert ".jsonl" in fault(tmp_path / "rows.json", '{"a": 1}\n{"a": 2}\n')


CSV_FAULTS: dict[str, tuple[str, str]] = {
    "short": ("a,b\n1,2\n3\n", "rows.csv:3: has not the header's 2 columns — mend the row"),
    "long": ("a,b\n1,2,3\n", "rows.csv:2: has not the header's 2 columns — mend the row"),
    "short after a blank line": ("a,b\n\n1,2\n\n3\n", "rows.csv:5: has not the header's 2 columns — mend the row"),
}


@pytest.mark.parametrize(("content", "message"), CSV_FAULTS.values(), ids=CSV_FAULTS.keys())
def test_csv_rows_of_another_width_are_named(tmp_path: Path, content: str, message: str) -> None:
    assert fault(tmp_path / "rows.csv", content) == message


@pytest.mark.parametrize(
    ("broken", "message"),
    [('"x" y,2\n', "not CSV: ',' expected after '\"'"), ('"x,2\n', "not CSV: unexpected end of data")],
    ids=["text after a quote", "open quote"],
)
def test_broken_csv_names_its_line(tmp_path: Path, broken: str, message: str) -> None:
    assert fault(tmp_path / "rows.csv", f"a,b\n1,2\n{broken}").startswith(f"rows.csv:3: {message}")


def test_csv_rows_may_run_over_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\r\n1,2\r\n"one\r\ntwo, ""three""",4\r\n5,6\r\n')
    first, second, third = read(path)
    assert second.values == {"a": 'one\r\ntwo, "three"', "b": "4"}
    assert first.place == "rows.csv:2"
    assert second.place in ("rows.csv:3", "rows.csv:4")
    assert third.place == "rows.csv:5"


def test_csv_fields_may_be_large(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"a,b\n{'x' * 200_000},2\n", encoding="utf-8")
    assert len(read(path)[0].values["a"]) == 200_000


EMPTY: dict[str, tuple[str, str | bytes, str]] = {
    "jsonl": ("rows.jsonl", "", "rows.jsonl: has no rows — give a file with at least one row"),
    "blank jsonl": ("rows.jsonl", "\n \n", "rows.jsonl: has no rows — give a file with at least one row"),
    "json": ("rows.json", "", "rows.json:1: is empty — "),
    "empty array": ("rows.json", "[]", "rows.json: has no rows — give a file with at least one row"),
    "csv": ("rows.csv", "", "rows.csv: has no rows — give a file with at least one row"),
    "header": ("rows.csv", "a,b\n", "rows.csv: has no rows — give a file with at least one row"),
    "parquet": ("rows.parquet", b"", "rows.parquet: not Parquet: Parquet file size is 0 bytes"),
}


@pytest.mark.parametrize(("name", "content", "message"), EMPTY.values(), ids=EMPTY.keys())
def test_an_empty_file_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    assert fault(tmp_path / name, content).startswith(message)


def test_a_parquet_file_without_rows_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), path)
    assert fault(path, path.read_bytes()) == "rows.parquet: has no rows — give a file with at least one row"


def test_a_cut_off_parquet_file_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, ROWS)
    assert fault(path, path.read_bytes()[:-9]).startswith("rows.parquet: not Parquet: ")


def test_damaged_parquet_pages_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{"a": "pear" * 20}] * 50)
    whole = path.read_bytes()
    assert fault(path, whole[:10] + b"\xff" * 40 + whole[50:]).startswith("rows.parquet: cannot be read: ")


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "~/missing.txt", "/nowhere/rows.csv"])
def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file") as error:
        sources.read(Source(path=path))
    assert error.value.problems[0].where == path


@pytest.mark.parametrize("name", ["rows.txt", "rows.JSONL", "rows"])
def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    said = fault(tmp_path / name, '{"a": 1}\n')
    assert said == f"{name}: unknown kind of file {Path(name).suffix!r} — one of .jsonl, .json, .csv, .parquet"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("good", [1, 4000], ids=["early", "late"])
def test_broken_utf_8_names_its_line(tmp_path: Path, suffix: str, good: int) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [{"a": "one"}] * good + [{"a": "two@"}, {"a": "three"}])
    content = path.read_bytes().replace(b"@", b"\xff")
    line = content[: content.index(0xFF)].count(b"\n") + 1
    assert line > good
    assert fault(path, content) == f"rows{suffix}:{line}: is not UTF-8 — convert it to UTF-8"


def test_utf_16_is_no_utf_8(tmp_path: Path) -> None:
    content = '{"a": 1}\n'.encode("utf-16")
    assert fault(tmp_path / "rows.jsonl", content) == "rows.jsonl:1: is not UTF-8 — convert it to UTF-8"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("rows.jsonl", True),
        ("data/rows.parquet", True),
        ("./rows", True),
        ("/rows", True),
        ("~/rows", True),
        ("someone/some-rows", False),
        ("rows", False),
    ],
)
def test_what_counts_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: bool) -> None:
    monkeypatch.chdir(tmp_path)
    assert sources.is_file(path) is expected


def test_an_existing_path_counts_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").touch()
    assert sources.is_file("rows")


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the library raise `error`, whatever it is asked for."""

    def load_dataset(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


HUB = Source(path="someone/some-rows", split="train")
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
        sources.read(HUB)
    assert raised.value.exit_code == 4
    assert str(raised.value) == (
        "someone/some-rows: the hub has no such data set, or cannot be reached "
        f"({type(error).__name__}) — check the name and the network, or give a local file"
    )


def test_a_data_set_that_needs_a_script_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RuntimeError("Dataset scripts are no longer supported, but found some-rows.py"))
    with pytest.raises((DataError, MachineError), match="scripts are no longer supported"):
        sources.read(HUB)


def test_a_data_set_that_cannot_be_built_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    error = datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = OSError(28, "No space left on device")
    raising(monkeypatch, error)
    with pytest.raises((DataError, MachineError), match="No space left on device"):
        sources.read(HUB)


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
        sources.read(HUB)
    first = str(error).splitlines()[0]
    assert str(raised.value) == f"someone/some-rows: {first} — set `split`, `name` and `revision`"


def test_hub_rows_come_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.Dataset:
        asked.update(options, path=path, name=name)
        return datasets.Dataset.from_list(NESTED)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="someone/some-rows", name="small", split="test", revision="abc", take=1)
    assert sources.read(source) == [RawRow("someone/some-rows[test] row 1", NESTED[0])]
    assert asked == {
        "path": "someone/some-rows",
        "name": "small",
        "split": "test",
        "revision": "abc",
        "streaming": False,
    }
