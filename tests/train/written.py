"""Files of rows to read: how each kind is written, and what is said of one that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignctl.errors import DataError
from alignctl.train import files
from alignctl.train.files import RawRow

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
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_table(path: Path, table: pyarrow.Table, new: Callable[..., Any] = pyarrow.ipc.new_stream) -> None:
    with path.open("wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)


def write_arrow(path: Path, rows: Rows) -> None:
    write_table(path, pyarrow.Table.from_pylist(rows))


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".tsv": write_csv,
    ".parquet": write_parquet,
    ".arrow": write_arrow,
}
TEXTS = [".jsonl", ".json", ".csv", ".tsv"]


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content).to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def read(path: Path) -> list[RawRow]:
    return list(files.rows(path))


def written(path: Path, content: str | bytes) -> Path:
    """The file with this content; a name that ends in .gz or .zst has it compressed."""
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(PACKERS.get(path.suffix, bytes)(raw))
    return path


def fault(path: Path, content: str | bytes) -> str:
    """What is said of a file with this content, without the folder."""
    return refusal(written(path, content))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read(path)
    assert error.value.exit_code == 3
    return str(error.value).removeprefix(f"{path.parent}/")


def values(path: Path) -> Rows:
    return [row.values for row in read(path)]
