"""Gates: questions that a run answers on its way, each under a name that stays (docs/gates.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

from alignctl.errors import AlignctlError, DivergedError, Problem
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir

Verdict = Literal["passed", "warned", "stopped", "off"]
Value = float | str | None


@dataclass(frozen=True)
class Result:
    """A gate's answer: `value` is what was found, `limit` what it was held against."""

    verdict: Verdict
    said: str
    value: Value = None
    limit: Value = None
    step: int | None = None


class Gates:
    """The gates of one run: which are on, and what they found, which stands in run.json."""

    def __init__(self, recipe: Recipe, run: RunDir, say: Callable[[str], None]) -> None:
        self._on: dict[str, bool] = recipe.gates.model_dump()
        self._run, self._say = run, say
        earlier = {name: Result(**found) for name, found in run.record.get("gates", {}).items()}
        self.results = {name: found for name, found in earlier.items() if found.verdict in ("passed", "warned")}
        self.results |= {name: Result("off", "switched off in the recipe") for name, on in self._on.items() if not on}

    def on(self, name: str) -> bool:
        """Whether gate `name` is on."""
        return self._on[name]

    def passed(
        self, name: str, said: str, *, value: Value = None, limit: Value = None, step: int | None = None
    ) -> None:
        """Gate `name` found nothing wrong; an earlier warning of it stands."""
        if name not in self.results or self.results[name].verdict != "warned":
            self._note(name, Result("passed", said, value, limit, step))

    def warned(
        self, name: str, said: str, way_out: str, *, value: Value = None, limit: Value = None, step: int | None = None
    ) -> None:
        """Gate `name` found what may be wrong: said aloud once, and the run goes on."""
        first = name not in self.results or self.results[name].verdict != "warned"
        self._note(name, Result("warned", said, value, limit, step))
        if first:
            self._say(f"warning: {Problem(f'gate.{name}', said, way_out)}")

    def stopped(
        self,
        name: str,
        said: str,
        way_out: str,
        *,
        value: Value = None,
        limit: Value = None,
        step: int | None = None,
        error: type[AlignctlError] = DivergedError,
    ) -> NoReturn:
        """Gate `name` found what is wrong: the run ends.

        Raises:
            AlignctlError: of the kind `error`.
        """
        self._note(name, Result("stopped", said, value, limit, step))
        raise error(Problem(f"gate.{name}", said, way_out))

    def _note(self, name: str, result: Result) -> None:
        found = self.results | {name: result}
        self.results = {each: found[each] for each in self._on if each in found}
        self._run.update(gates={name: _as_json(result) for name, result in self.results.items()})


def _as_json(result: Result) -> dict[str, Any]:
    """The fields; what is no number as text, for JSON has no word for it."""
    values = asdict(result)
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
