"""Encoded rows on disk, so that the same rows are tokenized once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

import alignctl.formats
from alignctl.errors import MachineError, Problem
from alignctl.train import pypi
from alignctl.train.tokens import Encoder

_DAYS = 30
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def folder() -> Path:
    """Where encoded rows are kept."""
    return pypi.cache_folder() / "tokens"


def key(encoder: Encoder, **parts: object) -> str:
    """SHA-256 over `parts` and over everything that turns rows into ids: tokenizer, template, libraries, our code."""
    known = {
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "template": str(encoder.tokenizer.chat_template),
        "found": [encoder.stop_ids, encoder.has_system, encoder.adds_bos],
        "libraries": [importlib.metadata.version(name) for name in _LIBRARIES],
        "code": _code(),
    }
    return hashlib.sha256(json.dumps({**known, **parts}, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary, the merges and the special tokens."""
    core = _core(tokenizer) if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab()))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{core}\n{special}".encode()).hexdigest()


def _core(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fast tokenizer as text, without how it would pad and cut: that is changed by use, and not used here."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: part for name, part in core.items() if name not in ("padding", "truncation")})


def _code() -> str:
    """SHA-256 over the source of what reads, renders and tokenizes rows."""
    here = [Path(__file__).with_name(f"{name}.py") for name in ("files", "sources", "tokens", "encode")]
    files = [*Path(alignctl.formats.__file__).parent.glob("*.py"), *here]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


@contextlib.contextmanager
def written(entry: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `entry` when the block ends well; entries out of use are removed.

    Raises:
        MachineError: the cache cannot be written.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _prune(entry.parent)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=entry.parent, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
            shutil.rmtree(entry, ignore_errors=True)
            _move(Path(scratch), entry)
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise MachineError(Problem(str(entry.parent), what, "free space, or set ALIGNCTL_CACHE")) from error


def _move(scratch: Path, entry: Path) -> None:
    try:
        scratch.rename(entry)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another run was faster, with the same rows
            raise


def use(entry: Path) -> None:
    """Note that `entry` was used today."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def _prune(parent: Path) -> None:
    oldest = time.time() - _DAYS * 24 * 3600
    for entry in parent.iterdir():
        with contextlib.suppress(OSError):  # another run may be renaming or removing it
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry)
