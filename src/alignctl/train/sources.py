"""Rows from files and from the hub, each with the place that it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alignctl.errors import DataError, MachineError, Problem
from alignctl.recipe.schema import Source

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class RawRow:
    """A row as it was found, and where: `file.jsonl:17` or `hub/name[test] row 17` (rows count from 1)."""

    place: str
    values: dict[str, Any]


def is_file(path: str) -> bool:
    """Whether a source names a local file rather than a hub data set."""
    return path.endswith(SUFFIXES) or path.startswith((".", "/", "~")) or Path(path).exists()


def read(source: Source) -> list[RawRow]:
    """The rows of `source`, at most `source.take`.

    Raises:
        DataError: the file is missing, empty or malformed (with the line).
        MachineError: the hub cannot be reached.
    """
    rows = list(islice(_file_rows(source) if is_file(source.path) else _hub_rows(source), source.take))
    if not rows:
        raise DataError(Problem(source.path, "has no rows", "give a file with at least one row"))
    return rows


def _file_rows(source: Source) -> Iterator[RawRow]:
    path = Path(source.path).expanduser()
    if not path.is_file():
        raise DataError(Problem(source.path, "no such file", "a path is looked for beside the recipe and here"))
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(Problem(source.path, f"unknown kind of file {path.suffix!r}", f"one of {', '.join(SUFFIXES)}"))
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(Problem(str(path), f"is not UTF-8 (byte {error.start})", "convert it to UTF-8")) from error
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read: {error.strerror or error}", "mend the file")) from error


def _jsonl(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield RawRow(f"{path.name}:{number}", _object(_parse(line, path, number), f"{path}:{number}"))


def _json(path: Path) -> Iterator[RawRow]:
    rows = _parse(path.read_text(encoding="utf-8-sig"), path, 1)
    if not isinstance(rows, list):
        raise DataError(Problem(str(path), "is not a JSON array of rows", "one object a line belongs in a .jsonl file"))
    for number, row in enumerate(rows, 1):
        yield RawRow(f"{path.name} row {number}", _object(row, f"{path} row {number}"))


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = "is empty" if not text.strip() else f"not JSON: {error.msg} (column {error.colno})"
        raise DataError(Problem(f"{path}:{line + error.lineno - 1}", what, "mend or remove the row")) from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(Problem(where, f"a row must be an object with named columns, found {row!r:.40}", "mend the row"))
    return row


def _csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        Problem(where, f"has not the header's {len(reader.fieldnames or [])} columns", "mend the row")
                    )
                yield RawRow(f"{path.name}:{reader.line_num}", dict(row))
        except csv.Error as error:
            raise DataError(Problem(f"{path}:{reader.line_num}", f"not CSV: {error}", "mend the row")) from error


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path.name} row {number}", row)
    except pyarrow.ArrowInvalid as error:
        raise DataError(Problem(str(path), f"not Parquet: {error}", "write the file again")) from error


def _hub_rows(source: Source) -> Iterator[RawRow]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=False
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _unreachable(source, error) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(Problem(source.path, str(error).splitlines()[0], "set `split` and `name`")) from error
    except (OSError, RuntimeError) as error:
        raise _unreachable(source, error) from error
    for number, row in enumerate(rows, 1):
        yield RawRow(f"{source.path}[{source.split}] row {number}", row)


def _unreachable(source: Source, error: Exception) -> MachineError:
    what = f"the hub has no such data set, or cannot be reached ({type(error).__name__})"
    return MachineError(Problem(source.path, what, "check the name and the network, or give a local file"))
