"""How far a model's predictions are from another's, on the answers that a run held out."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from alignctl.errors import AlignctlError, MachineError
from alignctl.proof.trained import Trained
from alignctl.rundir import read_json
from alignctl.train import data
from alignctl.train.data import Rows

PROMPTS = 32
# Of each answer: a vocabulary of 150,000 makes 0.6 MB of each of them.
TOKENS = 64


@dataclass(frozen=True)
class Row:
    """Token ids, and the positions whose next token is of the answer."""

    ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Rowset:
    """Rows to compare on, and what they are in words."""

    rows: list[Row]
    what: str


@dataclass(frozen=True)
class Agreement:
    """Two models beside each other: mean KL divergence in nats a token, and share of tokens with the same best guess.

    `base_kl` is the same divergence of the first one from the base: what training changed.
    """

    kl: float
    top1: float
    base_kl: float
    tokens: int
    rows: int


def rows(trained: Trained) -> Rowset:
    """Up to 32 held-out rows of a run; training rows where none are held out or they are not there any more."""
    try:
        train, held_out = data.read(trained.recipe, trained.encoder)
    except MachineError:
        raise
    except AlignctlError:
        live = read_json(trained.run / "logs" / "live.json")["ids"]
        found = [Row(ids, list(range(len(ids) - 1))) for ids in live if len(ids) > 1]
        return Rowset(found, "training rows of logs/live.json (the run's data cannot be read any more)")
    if held_out is not None and len(held_out):
        return Rowset(_rows(held_out), "held-out rows")
    return Rowset(_rows(train), "training rows (none are held out)")


def _rows(given: Rows) -> list[Row]:
    return [_row(given.encoded(i)) for i in range(min(PROMPTS, len(given)))]


def _row(ids: dict[str, list[int]]) -> Row:
    """The preferred answer behind its prompt, or a conversation, up to the last position that is compared."""
    if "input_ids" in ids:
        sequence, answer = ids["input_ids"], [i for i, label in enumerate(ids["labels"]) if i and label != -100]
    else:
        sequence = ids["prompt_ids"] + ids["chosen_ids"]
        answer = list(range(len(ids["prompt_ids"]), len(sequence)))
    positions = [i - 1 for i in answer[:TOKENS]]
    return Row(sequence[: positions[-1] + 1], positions)


def note(trained: Trained, rowset: Rowset, folder: Path) -> None:
    """Write what the trained model and its base predict for every row to `folder`; no model is held afterwards."""
    models = trained.load()
    for i, row in enumerate(rowset.rows):
        tuned = predictions(models.tuned, row, trained.precision)
        with models.base() as base:
            found = {"tuned": tuned, "base": predictions(base, row, trained.precision)}
        save_file(found, folder / f"{i}.safetensors")
    del models
    release()


def release() -> None:
    """Give the memory of models that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def predictions(model: PreTrainedModel, row: Row, compute: torch.dtype | None = None) -> Tensor:
    """`[n, V]` log-probabilities of the next token at the row's positions; `compute` is what training computed in."""
    mixed = compute not in (None, torch.float32)
    ids = torch.tensor([row.ids], device=model.device)
    with torch.autocast(model.device.type, dtype=compute, enabled=mixed):
        logits = model(input_ids=ids, use_cache=False).logits[0, row.positions]
    return logits.float().log_softmax(-1).cpu()


def compare(model: PreTrainedModel, rowset: Rowset, folder: Path) -> Agreement:
    """`model` beside the trained one, whose predictions `note` wrote to `folder`.

    KL(trained ‖ model) = Σ_v p(v) · (log p(v) − log q(v)), its mean over the tokens of all rows.
    """
    parts = [_compared(model, row, folder / f"{i}.safetensors") for i, row in enumerate(rowset.rows)]
    kl, base_kl, same = (torch.cat(column).mean().item() for column in zip(*parts, strict=True))
    return Agreement(kl, same, base_kl, sum(len(row.positions) for row in rowset.rows), len(rowset.rows))


def _compared(model: PreTrainedModel, row: Row, file: Path) -> tuple[Tensor, Tensor, Tensor]:
    noted, found = load_file(file), predictions(model, row)
    tuned = noted["tuned"]
    return _kl(tuned, found), _kl(tuned, noted["base"]), (tuned.argmax(-1) == found.argmax(-1)).double()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) at every position of `[n, V]` log-probabilities: `[n]`, in float64."""
    log_p, log_q = log_p.double().log_softmax(-1), log_q.double().log_softmax(-1)  # sums of 1 to float64's rounding
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_kl(first: list[Tensor], second: list[Tensor]) -> float:
    """The mean KL(p ‖ q) over the positions of all rows of log-probabilities."""
    return torch.cat([_kl(p, q) for p, q in zip(first, second, strict=True)]).mean().item()
