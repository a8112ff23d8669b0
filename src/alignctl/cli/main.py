"""The one place that prints an error and exits."""

from __future__ import annotations

import signal
import sys
import traceback
from types import FrameType

from alignctl.errors import AlignctlError, Interrupted, Problem


def main() -> None:
    """Run the command line; the exit codes are those of `alignctl.errors`."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        from alignctl.cli.app import app

        app()
    except (AlignctlError, Interrupted) as error:
        _report(*error.problems)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 (a bug of ours must not look like a wall of text)
        what = str(error).strip() or "no message"
        _report(Problem(type(error).__name__, what, "a bug; run again with --debug and report it"))
        sys.exit(1)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number, Problem("run", f"stopped by {signal.Signals(number).name}"))


def _report(*problems: Problem) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    for problem in problems:
        print(f"alignctl: {problem}", file=sys.stderr)
