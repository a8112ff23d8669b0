"""Files of rows that are broken: JSON, CSV, rows beyond the limit, what is cut off or damaged."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from written import (
    PACKERS,
    ROWS,
    TEXTS,
    WRITERS,
    Rows,
    fault,
    read,
    refusal,
    values,
    write_arrow,
    write_parquet,
    write_table,
    written,
)

from alignctl.errors import DataError
from alignctl.train import files
from alignctl.train.files import RawRow

# JSON

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
        "rows.jsonl:2: a row must be an object with named columns, found [1, 2] — a JSON array belongs in a .json file",
    ),
    "array over lines": (
        "rows.jsonl",
        '[\n{"a": 1}\n]\n',
        "rows.jsonl:1: not JSON: Expecting value (column 2) — a JSON array belongs in a .json file",
    ),
    "text": ("rows.jsonl", '"a"\n', "rows.jsonl:1: a row must be an object with named columns, found 'a' — "),
    "null": ("rows.jsonl", "null\n", "rows.jsonl:1: a row must be an object with named columns, found None — "),
    "inside many lines": (
        "rows.json",
        '[\n  {"a": 1},\n  {\n    "a":\n  }\n]\n',
        "rows.json:5: not JSON: Expecting value (column 3) — ",
    ),
    "no end": ("rows.json", '[\n{"a": 1}', "rows.json:2: not JSON: Expecting ',' delimiter (column 9) — "),
    "no end in a row": ("rows.json", '[\n{"a": 1', "rows.json:2: not JSON: Expecting ',' delimiter (column 8) — "),
    "comma at the end": ("rows.json", '[{"a": 1},]', "rows.json:1: not JSON: Expecting value (column 11) — "),
    "no comma": ("rows.json", '[{"a": 1}\n{"a": 2}]', "rows.json:2: not JSON: Expecting ',' delimiter (column 1) — "),
    "more behind": ("rows.json", '[{"a": 1}]\n[]', "rows.json:2: not JSON: Extra data (column 1) — "),
    "number among rows": (
        "rows.json",
        '[{"a": 1}, 2]',
        "rows.json row 2: a row must be an object with named columns, found 2 — ",
    ),
    "one object": ("rows.json", '{"a": 1}', "rows.json: is not a JSON array of rows — one object a line belongs in a "),
    "object of columns": (
        "rows.json",
        '\n{"a": [1, 2]}',
        "rows.json: is not a JSON array of rows — one object a line ",
    ),
    "JSON lines": ("rows.json", '{"a": 1}\n{"a": 2}\n', "rows.json: is not a JSON array of rows — one object a line "),
    "key twice": (
        "rows.jsonl",
        '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n',
        "rows.jsonl:2: the key 'a' stands twice in one object — ",
    ),
    "nested key twice": (
        "rows.jsonl.gz",
        '{"a": [{"role": 1, "role": 1}]}\n',
        "rows.jsonl.gz:1: the key 'role' stands twice in one object — ",
    ),
    "key twice in an array": (
        "rows.json",
        '[{"a": 1},\n\n{"b": {"c": 1,\n"c": 2}}]',
        "rows.json:3: the key 'c' stands twice in one object — ",
    ),
    "endless number": ("rows.jsonl", '{"a": 1' + "0" * 5000 + "}", "rows.jsonl:1: Exceeds the limit (4300 digits)"),
    "endless nesting": ("rows.json", '[\n{"a": ' + "[" * 100_000, "rows.json:2: maximum recursion depth exceeded"),
}


@pytest.mark.parametrize(("name", "content", "message"), JSON_FAULTS.values(), ids=JSON_FAULTS.keys())
def test_broken_json_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    assert fault(tmp_path / name, content).startswith(message)


@pytest.mark.parametrize("broken", ['{"a": 1', '{"a":', '{"a"', '{"a": [1,'])
def test_a_line_that_is_cut_off_is_named_itself(tmp_path: Path, broken: str) -> None:
    said = fault(tmp_path / "rows.jsonl", f'{{"a": 1}}\n{broken}\n{{"a": 3}}\n')
    assert said.startswith("rows.jsonl:2: not JSON: ")


PIECES: Rows = [{"é\\\"'": 'x"\\\n🙂'}, {"b": [True, None, -1.5e-7, float("-inf")]}, {}, {"c": {"d": [[], {}]}}]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_may_be_cut_anywhere_by_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    path = written(tmp_path / "rows.json", json.dumps(PIECES, ensure_ascii=False, indent=indent) + "\n ")
    for chunk in range(1, 40):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        assert values(path) == PIECES


@pytest.mark.parametrize("chunk", [1, 7, 20, 1000])
def test_a_fault_has_its_column_however_the_array_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    said = fault(tmp_path / "rows.json", '[{"a": 1},\n {"a": "two"}, {"a" 3}]' + " " * 50)
    assert said.startswith("rows.json:2: not JSON: Expecting ':' delimiter (column 21) — ")


# CSV

CSV_FAULTS: dict[str, tuple[str, str]] = {
    "short": ("a,b\n1,2\n3\n", "rows.csv:3: has not the header's 2 columns — mend the row"),
    "long": ("a,b\n1,2,3\n", "rows.csv:2: has not the header's 2 columns — mend the row"),
    "short after a blank line": ("a,b\n\n1,2\n\n3\n", "rows.csv:5: has not the header's 2 columns — mend the row"),
    "short over lines": ('a,b\n1,2\n"3\n4"\n', "rows.csv:3: has not the header's 2 columns — mend the row"),
    "column twice": ("a,b,a\n1,2,3\n", "rows.csv:1: the header has the column 'a' twice — "),
    "column without a name": ("\na,,c\n1,2,3\n", "rows.csv:2: column 2 of the header has no name — "),
    "columns without a name": ("a,,\n1,2,3\n", "rows.csv:1: the header has the column '' twice — "),
    "text after a quote": ('a,b\n1,2\n"x" y,2\n', "rows.csv:3: not CSV: ',' expected after '\"'"),
    "open quote": ('a,b\n1,2\n"x,2\n3,4\n5,6\n', "rows.csv:3: not CSV: unexpected end of data"),
    "open quote, closed by the next": ('a,b\n"1,2\n3,"4"\n', "rows.csv:2: not CSV: ',' expected after '\"'"),
}


@pytest.mark.parametrize(("content", "message"), CSV_FAULTS.values(), ids=CSV_FAULTS.keys())
def test_broken_csv_names_its_line(tmp_path: Path, content: str, message: str) -> None:
    assert fault(tmp_path / "rows.csv", content).startswith(message)


def test_csv_rows_may_run_over_lines(tmp_path: Path) -> None:
    content = b'a,b\r\n1,2\r\n"one\r\ntwo, ""three""",4\r\n\r\n5,6\r\n'
    first, second, third = read(written(tmp_path / "rows.csv", content))
    assert second.values == {"a": 'one\r\ntwo, "three"', "b": "4"}
    assert (first.place, second.place, third.place) == ("rows.csv:2", "rows.csv:3", "rows.csv:6")


def test_csv_fields_may_be_large(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", f"a,b\n{'x' * 200_000},2\n")
    assert len(read(path)[0].values["a"]) == 200_000


def test_a_tsv_has_commas_in_its_fields(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.tsv", 'a\tb\n1, 2\t"3\t4"\n')
    assert read(path) == [RawRow("rows.tsv:2", {"a": "1, 2", "b": "3\t4"})]
    assert fault(path, "a\tb\n1\n") == "rows.tsv:2: has not the header's 2 columns — mend the row"


# Rows beyond the limit

LONG = "the row is longer than 1,000 bytes, the most that it may have"
LONG_FAULTS: dict[str, tuple[str, str, str]] = {
    "line": ("rows.jsonl", '{"a": 1}\n{"a": "' + "x" * 1000 + '"}', f"rows.jsonl:2: {LONG} — shorten"),
    "array": ("rows.jsonl.gz", "[" + "1," * 1000, f"rows.jsonl.gz:1: {LONG} — a JSON array belongs in a .json file"),
    "item": ("rows.json", '[{"a": 1},\n{"a": "' + "x" * 9000 + '"}]', f"rows.json:2: {LONG} — shorten"),
    "item by little": ("rows.json", '[\n{"a": "' + "x" * 1000 + '"}]', f"rows.json:2: {LONG} — shorten"),
    "field": ("rows.csv", "a\n1\n" + "x" * 1001, f"rows.csv:3: {LONG} — shorten"),
    "open quote": ("rows.csv", 'a,b\n1,2\n3,"4\n' + "5,6\n" * 300, f"rows.csv:3: {LONG} — shorten"),
    "many fields": ("rows.tsv", "a\n1\n" + "x\t" * 1000, f"rows.tsv:3: {LONG} — shorten"),
}


@pytest.mark.parametrize(("name", "content", "message"), LONG_FAULTS.values(), ids=LONG_FAULTS.keys())
def test_a_row_beyond_the_limit_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, message: str
) -> None:
    monkeypatch.setattr(files, "MAX_ROW", 1000)
    monkeypatch.setattr(files, "_CHUNK", 100)
    assert fault(tmp_path / name, content).startswith(message)


@pytest.mark.parametrize("suffix", TEXTS)
def test_the_limit_is_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(files, "MAX_ROW", 100)
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [{"a": "x" * 80}] * 30)
    assert len(read(path)) == 30


def test_a_line_of_50_mb_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n[' + b"1," * 25_000_000)
    tracemalloc.start()
    said = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said.startswith("rows.jsonl:2: the row is longer than 33,554,432 bytes, the most that it may have — ")
    assert peak < 2.5 * files.MAX_ROW


# Compressed files and tables that are cut off or damaged

LINES = "".join(json.dumps({"a": n}) + "\n" for n in range(1, 100_001))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_compressed_file_that_ends_early_says_how_far_it_goes(tmp_path: Path, packed: str, kept: float) -> None:
    path = tmp_path / f"rows.jsonl{packed}"
    whole = PACKERS[packed](LINES.encode())
    path.write_bytes(whole[: int(kept * len(whole))])
    rows: list[RawRow] = []
    with pytest.raises(DataError) as error:
        rows.extend(files.rows(path))  # keeps those before the fault
    reached = f" (after line {len(rows)})" if rows else ""
    assert str(error.value) == f"{path}: the compressed file ends early{reached} — copy or compress it again"
    assert len(rows) > 10_000 or kept == 0.01


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_compressed_file_that_lacks_its_last_byte_is_noticed(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"rows.csv{packed}"
    path.write_bytes(PACKERS[packed](b"a\n1\n")[:-1])
    assert "the compressed file ends early" in refusal(path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.zst"])
def test_what_is_not_compressed_is_called_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"a": 1}\n')
    assert refusal(tmp_path / name).startswith(f"{name}: the compressed file is damaged: ")


def test_damage_inside_a_gzip_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = bytearray(gzip.compress(LINES.encode()))
    whole[-8] ^= 0xFF  # the checksum
    path.write_bytes(whole)
    said = refusal(path)
    assert said.startswith("rows.jsonl.gz: the compressed file is damaged: CRC check failed")
    assert "(after line 100000)" in said


def test_a_cut_off_parquet_file_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, ROWS)
    assert fault(path, path.read_bytes()[:-9]).startswith("rows.parquet: not Parquet: ")


def test_damaged_parquet_pages_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{"a": "pear" * 20}] * 50)
    whole = path.read_bytes()
    assert fault(path, whole[:10] + b"\xff" * 40 + whole[50:]).startswith("rows.parquet: cannot be read: ")


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file], ids=["stream", "file"])
@pytest.mark.parametrize("cut", [8, 60, 700, 4000])
def test_a_cut_off_arrow_file_is_called_so(tmp_path: Path, new: Callable[..., Any], cut: int) -> None:
    """A stream that lacks its last 8 bytes, the end mark, ends between two batches."""
    path = tmp_path / "rows.arrow"
    write_table(path, pyarrow.Table.from_pylist([{"a": "pear" * 200}] * 50), new)
    said = fault(path, path.read_bytes()[:-cut])
    assert said.startswith(("rows.arrow: not Arrow: ", "rows.arrow: cannot be read: "))


def test_what_is_no_arrow_file_is_called_so(tmp_path: Path) -> None:
    assert fault(tmp_path / "rows.arrow", "a,b\n1,2\n").startswith("rows.arrow: ")
    assert fault(tmp_path / "rows.arrow", b"ARROW1\0\0" + b"x" * 100).startswith("rows.arrow: not Arrow: ")


def test_broken_utf_8_in_a_table_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    write_arrow(path, [{"a": "pear@"}])
    said = fault(path, path.read_bytes().replace(b"@", b"\xff"))
    assert said.startswith("rows.arrow: not Arrow: ")
    assert "UTF8" in said


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_that_a_table_has_twice_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    table = pyarrow.table([[1], [2], [3]], names=["a", "b", "a"])
    pyarrow.parquet.write_table(table, path) if suffix == ".parquet" else write_table(path, table)
    assert refusal(path) == f"{path.name}: has the column 'a' twice — rename one"


def test_a_field_that_a_struct_has_twice_is_noticed(tmp_path: Path) -> None:
    twice = pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["r", "r"])
    write_table(tmp_path / "rows.arrow", pyarrow.table({"a": twice}))
    assert refusal(tmp_path / "rows.arrow").startswith("rows.arrow: not Arrow: ")
