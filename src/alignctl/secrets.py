"""Values that must not be written down: secrets of the environment, and what a recipe reads from it.

Where one would stand, `${oc.env:NAME}` takes its place, which a recipe and an override read as the same value again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

_TELLING = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSWORD", re.IGNORECASE)
# Shorter values, and numbers, stand where they are meant by chance.
_SHORTEST = 8
_NUMBER = re.compile(r"[-+.,_\d]+([eE][-+]?\d+)?")
# What is known by its look: the password in a URL, and a token of the hub.
_LOOKS = (
    (re.compile(r"(?<=://)[^\s/@:'\"]*:(?!\$\{oc\.env:)[^\s/@'\"]+(?=@)"), "***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "hf_***"),
)
_HIDDEN = re.compile(r"\$\{oc\.env:\w+\}|\*\*\*")
_TEXTS = (".json", ".jsonl", ".log", ".md")
# Words of a language: none of them is a secret, and a changed one would break the model.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
# A pickle of the Trainer's settings in every checkpoint, which nothing reads.
_SETTINGS = "training_args.bin"
_read: set[str] = set()


def note(name: str) -> None:
    """A recipe reads the environment variable `name`: its value is a secret too."""
    _read.add(name)


def hide(text: str) -> str:
    """`text` without the secrets."""
    names = _forms()
    if names:
        found = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        text = found.sub(lambda form: f"${{oc.env:{names[form[0]]}}}", text)
    for look, instead in _LOOKS:
        text = look.sub(instead, text)
    return text


def _forms() -> dict[str, str]:
    """Every spelling of every secret, and the name of its variable: as it is, in JSON and in a URL."""
    out: dict[str, str] = {}
    for name, value in os.environ.items():
        secret = value.strip()
        if name not in _read and not _TELLING.search(name):
            continue
        if len(secret) >= _SHORTEST and not _NUMBER.fullmatch(secret):
            spelled = (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
            out |= dict.fromkeys((*spelled, quote(secret), quote(secret, safe="")), name)
    return out


def is_hidden(text: str) -> bool:
    """Whether `hide` has put something in the place of a secret in `text`."""
    return _HIDDEN.search(text) is not None


def hidden(value: Any) -> Any:
    """`value`, as JSON knows values, with `hide` over every text in it but the keys."""
    if isinstance(value, dict):
        return {key: hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(item) for item in value]
    return hide(value) if isinstance(value, str) else value


@contextlib.contextmanager
def kept_out(run: Path) -> Iterator[None]:
    """Take the secrets out of the files of a run when the block inside ends, however it ends.

    Checkpoints are left as they are: they know what was written, and `sweep` was there before.
    """
    try:
        yield
    finally:
        for path in run.iterdir() if run.is_dir() else ():
            if path.name != "checkpoints":
                sweep(path)


def sweep(path: Path) -> None:
    """Take the secrets out of a file, or out of those of a folder."""
    for each in (path, *sorted(path.rglob("*"))):
        if each.suffix in _TEXTS or each.name == _SETTINGS:
            clean(each)


def found(path: Path) -> bool:
    """Whether a secret stands in a file of text; a vocabulary is not looked at."""
    if path.suffix not in _TEXTS or path.name in _VOCABULARIES:
        return False
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    return hide(text) != text


def clean(path: Path) -> None:
    """Take the secrets out of one file; a vocabulary is left alone."""
    if path.is_symlink() or not path.is_file() or path.name in _VOCABULARIES:
        return
    with contextlib.suppress(OSError):  # on a full disk the error that came before is the one to tell
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        without = hide(text)
        if without == text:
            return
        if path.name == _SETTINGS:
            path.unlink()
            return
        if path.suffix == ".json":
            with contextlib.suppress(ValueError):  # what is no JSON is cleaned as text
                without = json.dumps(hidden(json.loads(text)), indent=2, ensure_ascii=False) + "\n"
        beside = path.with_name(path.name + ".writing")
        beside.write_bytes(without.encode("utf-8", "surrogateescape"))
        beside.replace(path)
