"""The one place that prints an error and exits."""

from __future__ import annotations

import sys
import traceback

from alignctl.cli import signals
from alignctl.errors import AlignctlError, Interrupted, MachineError, Problem
from alignctl.terminal import harmless


def main() -> None:
    """Run the command line; the exit codes are those of `alignctl.errors`."""
    signals.catch()
    try:
        from alignctl.cli.app import app

        app()
    except (Exception, Interrupted) as error:  # noqa: BLE001 (the last door: every error leaves through it)
        sys.exit(_report(signals.behind(error)))


def _report(error: BaseException) -> int:
    """Print `error` and return its exit code; what is not ours is a bug, and must not look like a wall of text."""
    if "--debug" in sys.argv:
        print(harmless("".join(traceback.format_exception(error))), file=sys.stderr)
    if isinstance(error, AlignctlError | Interrupted):
        problems, code = error.problems, error.exit_code
    elif missing := _missing(error):
        problems, code = (missing,), MachineError.exit_code
    else:
        what = str(error).strip() or "no message"
        problems = (Problem(type(error).__name__, what, "a bug; run again with --debug and report it"),)
        code = 1
    for problem in problems:
        print(f"alignctl: {harmless(str(problem))}", file=sys.stderr)
    return code


def _missing(error: BaseException) -> Problem | None:
    """The package behind an import error, when the installation lacks it."""
    if not isinstance(error, ImportError):
        return None
    from alignctl.train import needs

    return needs.behind(error)
