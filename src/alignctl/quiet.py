"""Keep what the libraries say out of the user's sight and in the run folder's log."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from alignctl import secrets

_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a service of the hub to write to a model's repository
    "PYTHONSAFEPATH": "1",  # processes that are started import nothing from the current folder
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


@contextlib.contextmanager
def libraries(log: Path) -> Iterator[TextIO]:
    """Send this process's stdout and stderr to `log`; yields a stream that still reaches the user's stdout.

    The file descriptors themselves are turned, so that output of compiled code and of child processes goes there too.
    At the end the secrets in it are hidden.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    encoding = sys.stdout.encoding
    with log.open("ab") as file, os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace") as user:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield user
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in enumerate(kept, 1):
                os.dup2(original, descriptor)
                os.close(original)
            secrets.clean(log)
