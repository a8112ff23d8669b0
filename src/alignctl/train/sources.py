"""What a recipe calls a source: its local files or its hub data set, their rows, and what tells it from another."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from alignctl.errors import DataError, MachineError, Problem
from alignctl.recipe.schema import Source
from alignctl.train.files import KINDS, RawRow, first_line, is_supported, rows, unknown_kind

_BOOKKEEPING = re.compile(r"dataset_info\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])(_[a-z]+(?![a-z0-9]))*", re.I)


def is_local(path: str) -> bool:
    """Whether a source names a local file, a glob or a folder rather than a hub data set."""
    local = path.startswith((".", "/", "~")) or path.endswith("/") or glob.has_magic(path)
    return local or is_supported(Path(path)) or Path(path).exists()


def files(source: Source) -> list[Path]:
    """The files that a local source stands for, sorted; of a folder with several splits, those of `source.split`.

    Raises:
        DataError: there is none, or it is of an unknown kind.
    """
    try:
        return _found(source)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~someone` has no home
        raise DataError(Problem(source.path, f"cannot be read: {first_line(error)}", "mend the path")) from error


def read(source: Source) -> Iterator[RawRow]:
    """The rows of `source` as they are asked for, at most `source.take`.

    Raises:
        DataError: there is no row, or a file is missing or malformed (with the line).
        MachineError: the hub cannot be reached.
    """
    found = islice(_file_rows(source) if is_local(source.path) else _hub_rows(source), source.take)
    first = next(found, None)
    if first is None:
        raise DataError(Problem(source.path, "has no rows", "give a file with at least one row"))
    yield first
    yield from found


def identity(source: Source) -> str:
    """A digest that changes with the rows: of the files' names and bytes, or of the hub data set's fingerprint.

    Raises:
        DataError: a file is missing or cannot be read.
        MachineError: the hub cannot be reached.
    """
    if is_local(source.path):
        parts: list[Any] = [(file.name, _digest(file)) for file in files(source)]
    else:
        parts = [source.path, source.name, source.split, source.revision, _hub(source)._fingerprint]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read: {error.strerror}", "mend the file")) from error


def _found(source: Source) -> list[Path]:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _of_split(path, _of_folder(path), source)
    if path.is_file():
        if not is_supported(path):
            raise unknown_kind(path)
        return [path]
    if not glob.has_magic(source.path):
        raise DataError(Problem(source.path, "no such file", "a path is looked for beside the recipe and here"))
    found = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    return _some(sorted(filter(_has_rows, found)), source)


def _file_rows(source: Source) -> Iterator[RawRow]:
    return chain.from_iterable(map(rows, files(source)))


def _has_rows(path: Path) -> bool:
    return is_supported(path) and path.is_file() and not _BOOKKEEPING.fullmatch(path.name)


def _some(found: list[Path], source: Source) -> list[Path]:
    if not found:
        raise DataError(Problem(source.path, "no file with rows is there", f"known kinds: {', '.join(KINDS)}"))
    return found


def _of_folder(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if _has_rows(path))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _of_split(folder: Path, found: list[Path], source: Source) -> list[Path]:
    """Those of `source.split`, when the names of the files or sub-folders tell splits from each other."""
    names = {path: str(path.relative_to(folder)) for path in _some(found, source)}
    splits = {path: match[0].lower() for path, name in names.items() if (match := _SPLIT.search(name))}
    if not splits:
        return found
    exact = [path for path in found if splits.get(path) == source.split.lower()]
    word = re.compile(rf"(?<![a-z]){re.escape(source.split)}(?![a-z])", re.IGNORECASE)
    near = [path for path in found if word.search(names[path])]
    if not exact and len({splits.get(path) for path in near}) != 1:
        what = f"has {'several splits' if near else 'no split'} {source.split!r}: it has "
        what += ", ".join(sorted(set(splits.values())))
        raise DataError(Problem(source.path, what, "name one of them in `split`, or give a glob"))
    return exact or near


def _hub(source: Source) -> Any:
    try:
        return _loaded(source.path, source.name, source.split, source.revision)
    except Exception as error:
        raise _hub_error(source, error) from error


@lru_cache
def _loaded(path: str, name: str | None, split: str, revision: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(path, name, split=split, revision=revision, streaming=False)


def _hub_rows(source: Source) -> Iterator[RawRow]:
    for number, row in enumerate(_hub(source), 1):
        yield RawRow(f"{source.path}[{source.split}] row {number}", row)


def _hub_error(source: Source, error: Exception) -> Exception:
    """What `load_dataset` raised, as ours; a bug stays what it is."""
    import datasets

    name = type(error).__name__
    absent = isinstance(error, datasets.exceptions.DatasetNotFoundError)
    cause = error.__cause__
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and cause is not None:
        kind = MachineError if isinstance(cause, OSError) else DataError
        return kind(Problem(source.path, f"cannot be read: {first_line(cause)}", "see its cause"))
    if isinstance(error, ValueError | RuntimeError | datasets.exceptions.DatasetsError) and not absent:
        return DataError(Problem(source.path, first_line(error), "set `split`, `name` and `revision`"))
    if absent or isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        what = f"the hub has no such data set, or cannot be reached ({name})"
        return MachineError(Problem(source.path, what, "check the name and the network, or give a local file"))
    return error
