"""What is known of the rows, the model and the machine that a recipe is written for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from alignctl.plan.data import Lengths

# Longer names first: `1.5b` is not `5b`.
_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_UNIT = {"b": 1e9, "m": 1e6}
BYTES = 2  # of a weight in bfloat16
GIB = 2**30


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    method: str
    model: str
    data: str
    split: str = "train"
    eval_data: str | None = None
    eval_split: str = "test"
    adapter: str = "auto"
    template: str | None = None


@dataclass(frozen=True)
class Rows:
    """The rows: how many, their shape, and the tokens of prompt and longer answer of some of them, sorted.

    `counted` is false where the tokenizer could not be loaded and tokens are guessed from characters; `answer` is the
    side that SFT trains on in a preference set; `lengths` is what a plan asks of counted rows.
    """

    count: int
    shape: str
    tokens: tuple[int, ...]
    counted: bool = True
    answer: str | None = None
    lengths: Lengths | None = None

    def percentile(self, share: float) -> int:
        """Tokens that `share` of the rows do not exceed."""
        return self.tokens[min(len(self.tokens) - 1, int(share * len(self.tokens)))]

    def over(self, limit: int) -> float:
        """The share of rows with more than `limit` tokens."""
        return sum(tokens > limit for tokens in self.tokens) / len(self.tokens)


@dataclass(frozen=True)
class Model:
    """The model: None is what nobody knows. `context` is tokens, `template` whether the tokenizer has one."""

    parameters: int | None = None
    counted: bool = True
    context: int | None = None
    template: bool | None = None
    knows_chatml: bool = False
    kind: str | None = None
    commit: str | None = None

    @property
    def gib(self) -> float | None:
        """Its weights in bfloat16."""
        return None if self.parameters is None else self.parameters * BYTES / GIB

    def size(self) -> str:
        """Its parameters in words."""
        if self.parameters is None:
            return "of unknown size"
        unit, by = ("B", 1e9) if self.parameters >= 1e9 else ("M", 1e6)
        return f"{self.parameters / by:.3g}{unit} parameters{'' if self.counted else ', by its name'}"


@dataclass(frozen=True)
class Memory:
    """What there is to train in: a GPU's memory, or the machine's where there is none."""

    gib: float
    what: str
    gpu: bool

    @property
    def bytes(self) -> int:
        return round(self.gib * GIB)

    def size(self) -> str:
        """It in words."""
        return f"{round(self.gib, 1):g} GiB"


def by_name(name: str) -> int | None:
    """Parameters that a model's name speaks of: `Mistral-7B-v0.1`."""
    found = _SIZE.search(name.rsplit("/", 1)[-1])
    return round(float(found[1]) * _UNIT[found[2].lower()]) if found else None
