"""The command line in this process."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from alignctl.cli.main import main


def invoke(*arguments: str) -> int:
    """Run the command line in this process, where the libraries are imported already; returns the exit code."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["alignctl", *arguments])
        try:
            main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0
