"""Rows out of one local file, one after the other, each with the place that it came from."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignctl.errors import DataError, Problem

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
MAX_ROW = 32 * 2**20

_TABLES = (".parquet", ".arrow")
_PACKED = (".gz", ".zst")
_CHUNK = 2**18
_BATCH = 1000
_WIDE = (  # UTF-32 first: its little-endian mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_ARRAY = "a JSON array belongs in a .json file"
_LINES = "one object a line belongs in a .jsonl file"
_LONG = "shorten or remove it; is a quote left open?"
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class RawRow:
    """A row as it was found, and where: `pairs.jsonl:17`, the line where it begins, or `pairs.parquet row 17`."""

    place: str
    values: dict[str, Any]


def is_supported(path: Path) -> bool:
    """Whether the name of a file says that rows can be read from it."""
    return _kind(path) in KINDS


def rows(path: Path) -> Iterator[RawRow]:
    """The rows of a file, read and checked as they are asked for; none of an empty file.

    Raises:
        DataError: the file cannot be read or is malformed, with the line or the row.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _table, ".arrow": _table}
    reader = readers.get(_kind(path))
    if reader is None:
        raise unknown_kind(path)
    try:
        yield from reader(path)
    except OSError as error:
        what = f"cannot be read: {error.strerror or first_line(error)}"
        raise DataError(Problem(str(path), what, "mend the file")) from error


def unknown_kind(path: Path) -> DataError:
    """What is said of a file whose name is of no known kind."""
    packed = " and ".join(_PACKED)
    way_out = f"one of {', '.join(KINDS)}; all but {' and '.join(_TABLES)} also with {packed} behind"
    return DataError(Problem(str(path), f"unknown kind of file {path.suffix!r}", way_out))


def first_line(error: BaseException) -> str:
    """The first line of what a library says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _kind(path: Path) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`; a table has its own compression, so `.parquet.gz` is no kind."""
    inner = Path(path.stem).suffix
    return inner if path.suffix in _PACKED and inner not in _TABLES else path.suffix


def _twice(names: Iterable[str]) -> str | None:
    """The first name that stands twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _object(row: Any, where: str, way_out: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(Problem(where, f"a row must be an object with named columns, found {row!r:.40}", way_out))
    return row


class _Text:
    """The text of a file, decompressed and decoded as it is read, and the number of the line that comes next."""

    def __init__(self, path: Path, file: io.BufferedReader | gzip.GzipFile) -> None:
        self.path = path
        self.line = 1
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._begin, self._room = 1, MAX_ROW
        self._skip_mark()

    def begin_row(self) -> int:
        """The number of the line that comes next, where a new row begins."""
        self._begin, self._room = self.line, MAX_ROW
        return self.line

    def readline(self) -> str:
        """The next line with its end, or "" behind the last one.

        Raises:
            DataError: it is not UTF-8, or the row is longer than `MAX_ROW`, or the file is damaged.
        """
        piece = self._pull(self._file.readline, self._room + 1)
        self._room -= len(piece)
        if self._room < 0:
            array = _kind(self.path) == ".jsonl" and piece.lstrip().startswith(b"[")
            raise _too_long(self.path, self._begin, _ARRAY if array else _LONG)
        return self._decoded(piece, final=True)

    def read(self, size: int) -> str:
        """The text of the next `size` bytes, or "" behind the last one.

        Raises:
            DataError: it is not UTF-8, or the file is damaged.
        """
        piece = self._pull(self._file.read, size)
        return self._decoded(piece, final=len(piece) < size)

    def _skip_mark(self) -> None:
        head = self._pull(self._file.peek, 4)
        wide = next((name for mark, name in _WIDE if head.startswith(mark)), None)
        if wide:
            raise DataError(Problem(str(self.path), f"is {wide}, expected UTF-8", "convert it to UTF-8"))
        if head.startswith(codecs.BOM_UTF8):
            self._file.read(len(codecs.BOM_UTF8))

    def _pull(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            early = isinstance(error, EOFError) or str(error).startswith("Truncated")
            what = "ends early" if early else f"is damaged: {first_line(error)}"
            reached = f" (after line {self.line - 1})" if self.line > 1 else ""
            way_out = "copy or compress it again"
            raise DataError(Problem(str(self.path), f"the compressed file {what}{reached}", way_out)) from error

    def _decoded(self, piece: bytes, final: bool) -> str:
        try:
            text = self._decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            line = self.line + error.object.count(b"\n", 0, error.start)
            raise DataError(Problem(f"{self.path}:{line}", "is not UTF-8", "convert it to UTF-8")) from error
        if "\0" in text:
            line = self.line + text.count("\n", 0, text.index("\0"))
            way_out = "mend the line; if the file is UTF-16, convert it to UTF-8"
            raise DataError(Problem(f"{self.path}:{line}", "holds a NUL byte", way_out))
        self.line += piece.count(b"\n")
        return text


@contextmanager
def _opened(path: Path) -> Iterator[_Text]:
    with _bytes(path) as file:
        yield _Text(path, file)


def _bytes(path: Path) -> io.BufferedReader | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.GzipFile(path)
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(path.open("rb"), "zstd"))
    return path.open("rb")


def _too_long(path: Path, line: int, way_out: str) -> DataError:
    what = f"the row is longer than {MAX_ROW:,} bytes, the most that it may have"
    return DataError(Problem(f"{path}:{line}", what, way_out))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the key {_twice(key for key, _ in pairs)!r} stands twice in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _jsonl(path: Path) -> Iterator[RawRow]:
    with _opened(path) as text:
        number = text.begin_row()
        while line := text.readline():
            if line.strip():
                yield RawRow(f"{path.name}:{number}", _parsed(line, f"{path}:{number}"))
            number = text.begin_row()


def _parsed(line: str, where: str) -> dict[str, Any]:
    way_out = _ARRAY if line.lstrip().startswith("[") else "mend or remove the row"
    try:
        row = _DECODER.decode(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(Problem(where, f"not JSON: {error.msg} (column {error.colno})", way_out)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(where, first_line(error), way_out)) from error
    return _object(row, where, way_out)


def _json(path: Path) -> Iterator[RawRow]:
    with _opened(path) as text:
        window = _Window(text)
        begin = window.peek()
        if begin not in ("", "["):
            raise DataError(Problem(str(path), "is not a JSON array of rows", _LINES))
        for number, row in enumerate(window.items() if begin else (), 1):
            yield RawRow(f"{path.name} row {number}", _object(row, f"{path} row {number}", "mend or remove the row"))


class _Window:
    """The part of a JSON text that is being read. It slides along, and grows only while a row does not fit in."""

    def __init__(self, text: _Text) -> None:
        self._text = text
        self._seen, self._at = "", 0
        self._line, self._column = 1, 0

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            self._at = _BLANK.match(self._seen, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._seen):
                return self._seen[self._at]
            if not self._more():
                return ""

    def items(self) -> Iterator[Any]:
        """The items of the array that begins here, up to the end of the text.

        Raises:
            DataError: it is no array, or is followed by anything, or an item is longer than `MAX_ROW`.
        """
        self._at += 1
        mark = self._mark() if self.peek() == "]" else ","
        while mark == ",":
            self.peek()
            yield self._item()
            mark = self._mark()
        if self.peek():
            raise self._fault(json.JSONDecodeError("Extra data", self._seen, self._at))

    def _mark(self) -> str:
        mark = self.peek()
        if mark not in (",", "]"):
            raise self._fault(json.JSONDecodeError("Expecting ',' delimiter", self._seen, self._at))
        self._at += 1
        return mark

    def _item(self) -> Any:
        while True:
            try:
                item, end = _DECODER.raw_decode(self._seen, self._at)
            except json.JSONDecodeError as error:
                if not (self._is_cut_off(error) and self._more()):
                    raise self._fault(error) from error
            except (ValueError, RecursionError) as error:
                line = self._line + self._seen.count("\n", 0, self._at)
                raise DataError(Problem(f"{self._text.path}:{line}", first_line(error), "mend the row")) from error
            else:
                self._limit(end - self._at)
                self._at = end
                return item

    def _limit(self, length: int) -> None:
        if length > MAX_ROW:
            line = self._line + self._seen.count("\n", 0, self._at)
            raise _too_long(self._text.path, line, _LONG)

    def _is_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether more text may mend it: a string has no end yet, or the fault is a word or number at the end."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._seen) - len("-Infinity")

    def _more(self) -> bool:
        """Forget what lies behind and read as much as is still held, so that no row is parsed often."""
        held = len(self._seen) - self._at
        self._limit(held)
        piece = self._text.read(max(_CHUNK, held))
        if piece:
            newline = self._seen.rfind("\n", 0, self._at)
            self._line += self._seen.count("\n", 0, self._at)
            self._column = self._at - newline - 1 if newline >= 0 else self._column + self._at
            self._seen, self._at = self._seen[self._at :] + piece, 0
        return bool(piece)

    def _fault(self, error: json.JSONDecodeError) -> DataError:
        where = f"{self._text.path}:{self._line + error.lineno - 1}"
        column = error.colno + (self._column if error.lineno == 1 else 0)
        return DataError(Problem(where, f"not JSON: {error.msg} (column {column})", "mend or remove the row"))


def _csv(path: Path) -> Iterator[RawRow]:
    records = _records(path)
    line, header = next(records, (1, []))
    if (name := _twice(header)) is not None:
        raise DataError(Problem(f"{path}:{line}", f"the header has the column {name!r} twice", "rename one"))
    if "" in header:
        what = f"column {header.index('') + 1} of the header has no name"
        raise DataError(Problem(f"{path}:{line}", what, "name it, or take the column away"))
    for line, values in records:
        if len(values) != len(header):
            raise DataError(Problem(f"{path}:{line}", f"has not the header's {len(header)} columns", "mend the row"))
        yield RawRow(f"{path.name}:{line}", dict(zip(header, values, strict=True)))


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of the header and of each row, with the line where it begins; blank lines are left out."""
    csv.field_size_limit(MAX_ROW)
    with _opened(path) as text:
        delimiter = "\t" if _kind(path) == ".tsv" else ","
        line = text.begin_row()
        try:
            for values in csv.reader(iter(text.readline, ""), delimiter=delimiter, strict=True):
                if values:
                    yield line, values
                line = text.begin_row()
        except csv.Error as error:
            way_out = "mend the row; is a quote left open?"
            raise DataError(Problem(f"{path}:{line}", f"not CSV: {error}", way_out)) from error


def _table(path: Path) -> Iterator[RawRow]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(f"{path.name} row {number}", row)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reached = f" (after row {number})" if number else ""
        what = f"not {path.suffix[1:].capitalize()}: {first_line(error)}{reached}"
        raise DataError(Problem(str(path), what, "write the file again")) from error


def _batches(path: Path) -> Iterator[Any]:
    """The rows of a table, checked and a thousand at a time, however large the file's own batches are."""
    with path.open("rb") as file:
        if not file.read(1):
            return
    for batch in _parquet(path) if path.suffix == ".parquet" else _arrow(path):
        if (name := _twice(batch.schema.names)) is not None:
            raise DataError(Problem(str(path), f"has the column {name!r} twice", "rename one"))
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            part.validate(full=True)
            yield part


def _parquet(path: Path) -> Iterator[Any]:
    """The batches of a Parquet file; its row groups may be large, so none is read ahead or whole."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK) as file:
        yield from file.iter_batches(_BATCH)


def _arrow(path: Path) -> Iterator[Any]:
    """The batches of an Arrow file or, as `datasets` saves it, an Arrow stream."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            yield from map(reader.get_batch, range(reader.num_record_batches))
            return
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)
        file.seek(file.size() - len(_END_OF_STREAM))
        if file.read() != _END_OF_STREAM:
            raise DataError(Problem(str(path), "not Arrow: the stream ends early", "write the file again"))
