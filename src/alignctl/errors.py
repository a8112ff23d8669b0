"""What alignctl raises. Every error carries its exit code; `cli.app.main` is the only place that prints one.

AlignctlError
├── RecipeError       2   the recipe or the command line
├── DataError         3   the rows
├── MachineError      4   memory, GPU, disk, a missing package, no network
├── DivergedError     5   training diverged, or a gate stopped it
└── VerifyError       6   the saved result is not what was trained

Interrupted       128+n   a signal; no Exception, so that no library's `except Exception` swallows it
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, what it is, and the way out."""

    where: str
    what: str
    way_out: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" — {self.way_out}" if self.way_out else "")


class AlignctlError(Exception):
    """One or several problems that end the command with `exit_code`."""

    exit_code = 1

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class RecipeError(AlignctlError):
    exit_code = 2


class DataError(AlignctlError):
    exit_code = 3


class MachineError(AlignctlError):
    exit_code = 4


class DivergedError(AlignctlError):
    exit_code = 5


class VerifyError(AlignctlError):
    exit_code = 6


class Interrupted(BaseException):
    """Stopped by signal `signum`; the exit code is 128 + `signum`."""

    def __init__(self, signum: int, *problems: Problem) -> None:
        self.problems = problems
        self.exit_code = 128 + signum
        super().__init__("\n".join(map(str, problems)))
