"""Signals outside of training: the command stops at once."""

from __future__ import annotations

import signal
from types import FrameType

from alignctl.errors import Interrupted, Problem

_received: list[Interrupted] = []


def catch() -> None:
    """Let SIGINT and SIGTERM raise `Interrupted`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(Interrupted(number, Problem("run", f"stopped by {signal.Signals(number).name}")))
    raise _received[-1]


def check() -> None:
    """Stop now for a signal that a library swallowed while it was imported."""
    if _received:
        raise _received[-1]


def behind(error: BaseException) -> BaseException:
    """The signal that `error` comes from: lazy imports make an ImportError of whatever stops them."""
    return _received[-1] if _received and not isinstance(error, Interrupted) else error
