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
        raise DataError(Problem(f"{path}:{_undecodable_line(path)}", "is not UTF-8", "convert it to UTF-8")) from error
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read: {error.strerror or error}", "mend the file")) from error


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError:
                return number
    return 1


def _jsonl(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield RawRow(f"{path.name}:{number}", _object(_parse(line.strip(), path, number), f"{path}:{number}"))


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
        lines = path.suffix == ".json" and error.msg == "Extra data"
        way_out = "one object a line belongs in a .jsonl file" if lines else "mend or remove the row"
        raise DataError(Problem(f"{path}:{line + error.lineno - 1}", what, way_out)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(f"{path}:{line}", f"not JSON: {error}", "mend or remove the row")) from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            Problem(where, f"a row must be an object with named columns, found {row!r:.40}", "mend the row")
        )
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
            raise DataError(Problem(f"{path}:{reader.line_num + 1}", f"not CSV: {error}", "mend the row")) from error


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
        raise DataError(Problem(str(path), f"not Parquet: {_first_line(error)}", "write the file again")) from error


def _hub_rows(source: Source) -> Iterator[RawRow]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=False
        )
    except Exception as error:
        raise _hub_error(source, error) from error
    for number, row in enumerate(rows, 1):
        yield RawRow(f"{source.path}[{source.split}] row {number}", row)


def _hub_error(source: Source, error: Exception) -> Exception:
    """What `load_dataset` raised, as ours; a bug stays what it is."""
    import datasets

    name = type(error).__name__
    absent = isinstance(error, datasets.exceptions.DatasetNotFoundError)
    cause = error.__cause__
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and cause is not None:
        kind = MachineError if isinstance(cause, OSError) else DataError
        return kind(Problem(source.path, f"cannot be read: {_first_line(cause)}", "see its cause"))
    if isinstance(error, ValueError | RuntimeError | datasets.exceptions.DatasetsError) and not absent:
        return DataError(Problem(source.path, _first_line(error), "set `split`, `name` and `revision`"))
    if absent or isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        what = f"the hub has no such data set, or cannot be reached ({name})"
        return MachineError(Problem(source.path, what, "check the name and the network, or give a local file"))
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
