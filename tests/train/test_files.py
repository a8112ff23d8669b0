"""Files of rows: kinds, places, text, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from written import NESTED, PACKERS, ROWS, TEXTS, WRITERS, Rows, fault, read, refusal, values, write_table, written

from alignctl.errors import DataError
from alignctl.train import files
from alignctl.train.files import RawRow


@pytest.mark.parametrize("suffix", WRITERS)
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    assert values(path) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_lists_and_nulls_survive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, NESTED)
    assert values(path) == NESTED


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", TEXTS)
def test_a_compressed_file_reads_like_its_inside(tmp_path: Path, suffix: str, packed: str) -> None:
    inside = tmp_path / f"rows{suffix}"
    WRITERS[suffix](inside, ROWS)
    path = written(tmp_path / f"rows{suffix}{packed}", inside.read_bytes())
    assert values(path) == ROWS
    assert read(path)[0].place == read(inside)[0].place.replace(inside.name, path.name)


@pytest.mark.parametrize(
    ("name", "supported"),
    [(f"rows{kind}", True) for kind in files.KINDS]
    + [(f"rows{kind}{packed}", True) for kind in TEXTS for packed in (".gz", ".zst")]
    + [(name, False) for name in ("rows", "rows.txt", "rows.JSONL", "rows.gz", "rows.parquet.gz", "rows.arrow.zst")],
)
def test_the_kinds(name: str, supported: bool) -> None:
    assert files.is_supported(Path(name)) is supported


@pytest.mark.parametrize("name", ["rows.txt", "rows.JSONL", "rows", "rows.parquet.gz"])
def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    said = fault(tmp_path / name, '{"a": 1}\n')
    assert said.startswith(f"{name}: unknown kind of file {Path(name).suffix!r} — one of .jsonl, .json, .csv, .tsv, ")


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        (".jsonl", ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]),
        (".json", ["rows.json row 1", "rows.json row 2", "rows.json row 3"]),
        (".csv", ["rows.csv:2", "rows.csv:3", "rows.csv:4"]),
        (".parquet", ["rows.parquet row 1", "rows.parquet row 2", "rows.parquet row 3"]),
        (".arrow", ["rows.arrow row 1", "rows.arrow row 2", "rows.arrow row 3"]),
    ],
)
def test_places_count_from_1(tmp_path: Path, suffix: str, places: list[str]) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    assert [row.place for row in read(path)] == places


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_of_a_table_are_counted_through_batches(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    table = pyarrow.table({"n": list(range(1, 3_540))})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    else:
        write_table(path, table)
    assert read(path) == [RawRow(f"{path.name} row {n}", {"n": n}) for n in range(1, 3_540)]


def test_arrow_files_are_read_like_streams(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(NESTED)
    write_table(tmp_path / "rows.arrow", table, pyarrow.ipc.new_file)
    assert values(tmp_path / "rows.arrow") == NESTED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"a": 1}\nbroken\n'),
        ("rows.json", '[{"a": 1}, broken]'),
        ("rows.csv", "a,b\n1,2\nshort\n"),
    ],
)
def test_nothing_is_read_ahead_of_what_is_asked_for(tmp_path: Path, name: str, content: str) -> None:
    rows = files.rows(written(tmp_path / name, content))
    assert next(rows).values["a"] in (1, "1")
    with pytest.raises(DataError):
        next(rows)


# Text: marks, line ends, encodings


@pytest.mark.parametrize("suffix", [*TEXTS, ".jsonl.gz", ".csv.zst"])
def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / f"plain.{suffix.split('.')[1]}"
    WRITERS[plain.suffix](plain, ROWS)
    assert values(written(tmp_path / f"rows{suffix}", b"\xef\xbb\xbf" + plain.read_bytes())) == ROWS


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '\n{"a": 1}\n   \n\n{"a": 2}\r\n\r\n\n')
    assert read(path) == [RawRow("rows.jsonl:2", {"a": 1}), RawRow("rows.jsonl:5", {"a": 2})]


def test_a_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": "\u2028x"}')
    assert read(path) == [RawRow("rows.jsonl:1", {"a": 1}), RawRow("rows.jsonl:2", {"a": "\u2028x"})]


@pytest.mark.parametrize("suffix", TEXTS)
def test_lines_may_end_as_on_windows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS[:2])
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert values(path) == ROWS[:2]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("good", [1, 40_000], ids=["early", "late"])
def test_broken_utf_8_names_its_line(tmp_path: Path, suffix: str, packed: str, good: int) -> None:
    plain = tmp_path / f"plain{suffix}"
    WRITERS[suffix](plain, [{"a": "one"}] * good + [{"a": "two@"}, {"a": "three"}])
    content = plain.read_bytes().replace(b"@", b"\xff")
    line = content[: content.index(0xFF)].count(b"\n") + 1
    assert line > good
    name = f"rows{suffix}{packed}"
    assert fault(tmp_path / name, content) == f"{name}:{line}: is not UTF-8 — convert it to UTF-8"


def test_a_letter_that_is_cut_off_at_the_end_is_noticed(tmp_path: Path) -> None:
    assert (
        fault(tmp_path / "rows.json", b'[\n{"a": 1}\n]\n\xe0\xb8') == "rows.json:4: is not UTF-8 — convert it to UTF-8"
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.tsv.zst"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_wide_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    said = fault(tmp_path / name, '{"a": 1}\n'.encode(encoding))
    assert said == f"{name}: is {encoding}, expected UTF-8 — convert it to UTF-8"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"a": "x"}\n{"a": "y\0"}\n'),
        ("rows.json", '[{"a": "x"},\n{"a": "y\0"}]\n'),
        ("rows.csv", "a\ny\0\n"),
        ("rows.tsv.gz", "a\ny\0\n"),
    ],
)
def test_a_nul_byte_names_its_line(tmp_path: Path, name: str, content: str) -> None:
    assert fault(tmp_path / name, content).startswith(f"{name}:2: holds a NUL byte — ")


# Files that are empty, or cannot be opened

NOTHING = [
    "rows.jsonl",
    "rows.json",
    "rows.csv",
    "rows.tsv",
    "rows.parquet",
    "rows.arrow",
    "rows.jsonl.gz",
    "rows.json.zst",
]


@pytest.mark.parametrize("name", NOTHING)
def test_a_file_of_no_bytes_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert read(tmp_path / name) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "\n \r\n"),
        ("rows.jsonl", b"\xef\xbb\xbf"),
        ("rows.json", " \n"),
        ("rows.json", " [\n] \n"),
        ("rows.csv", "\n\n"),
        ("rows.csv", "a,b\n"),
        ("rows.tsv", "a\tb"),
        ("rows.jsonl.gz", ""),
        ("rows.csv.zst", "a,b\n"),
    ],
)
def test_a_file_without_rows_has_no_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert read(written(tmp_path / name, content)) == []


def test_a_table_without_rows_has_no_rows(tmp_path: Path) -> None:
    table = pyarrow.table({"a": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    write_table(tmp_path / "rows.arrow", table)
    assert read(tmp_path / "rows.parquet") == read(tmp_path / "rows.arrow") == []


@pytest.mark.parametrize("name", NOTHING)
def test_a_folder_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert refusal(tmp_path / name).startswith(f"{name}: cannot be read: ")


@pytest.mark.parametrize("name", NOTHING)
def test_a_file_that_is_gone_cannot_be_read(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name).startswith(f"{name}: cannot be read: No such file or directory")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_disk_that_fails_is_no_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")
    assert refusal(tmp_path / "rows.jsonl") == "rows.jsonl: cannot be read: Input/output error — mend the file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", NOTHING)
def test_a_file_that_is_locked_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / name).chmod(0)
    assert refusal(tmp_path / name).startswith(f"{name}: cannot be read: Permission denied")


# Memory


def large(path: Path, count: int) -> int:
    """A file with `count` rows; a table in one batch, a JSON array in one line. How large it is, or its inside."""
    rows: Rows = [
        {"prompt": f"What is {n}?", "chosen": f"{n} " * 80, "rejected": f"{n + 1} " * 20} for n in range(count)
    ]
    kind = Path(path.stem).suffix or path.suffix
    inside = path.with_name(f"inside{kind}")
    if kind == ".json":
        inside.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, inside, compression="none", use_dictionary=False)
    else:
        WRITERS[kind](inside, rows)
    path.write_bytes(PACKERS.get(path.suffix, bytes)(inside.read_bytes()))
    return inside.stat().st_size


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".json.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    count = 40_000
    size = large(path, count)
    before, arrow, seen = pyarrow.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for seen, _ in enumerate(files.rows(path), 1):
        if seen % 500 == 0:
            arrow = max(arrow, pyarrow.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count
    assert peak + arrow < size / 4


def test_one_long_array_takes_time_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is larger than what is read at once is parsed a few times, not once for each piece of it."""
    monkeypatch.setattr(files, "_CHUNK", 64)
    parsed = 0
    decode = files._DECODER.raw_decode

    class Counting:
        def raw_decode(self, text: str, at: int) -> Any:
            nonlocal parsed
            parsed += len(text) - at
            return decode(text, at)

    monkeypatch.setattr(files, "_DECODER", Counting())
    content = json.dumps([{"a": "x" * 100_000}])
    assert len(read(written(tmp_path / "rows.json", content))) == 1
    assert parsed < 4 * len(content)


def test_the_module_is_light() -> None:
    code = "import sys, alignctl.train.files; print(*sorted({'torch', 'datasets', 'pyarrow'} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
