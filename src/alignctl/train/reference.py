"""The reference's log-probabilities of every training pair, computed once and kept on disk for runs to come."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import PreTrainedModel, Trainer

from alignctl.train import cache, heldout, pypi
from alignctl.train import model as models
from alignctl.train.data import Rows

_CHECKED = 4
# Of a sum over an answer's tokens; rounding differs with the rows that share a batch.
_TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (2e-2, 1.0), torch.float16: (1e-2, 0.5)}
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def precompute(trainer: Trainer, rows: Rows, precision: torch.dtype) -> tuple[Any, str]:
    """`rows` as a dataset with their reference log-probabilities, and where those came from.

    The key holds the reference's weights, the rows' ids, the precision and the code that computes, and nothing of the
    loss: runs that differ in beta, loss or learning rate share an entry. Four random rows are computed again on a hit.
    """
    entry = pypi.cache_folder() / "references" / _key(trainer, rows, precision)
    known = _read(entry / "logps.npy", len(rows))
    hit = known is not None and _agrees(trainer, rows, known, precision)
    if known is None or not hit:
        known = numpy.array(heldout.reference(trainer, rows), dtype=numpy.float32)
        with cache.written(entry) as folder:
            numpy.save(folder / "logps.npy", known)
    cache.use(entry)
    dataset = rows.dataset(dict(zip(COLUMNS, known, strict=True)))
    return dataset, f"{'hit' if hit else 'miss'} {entry.name[:12]}"


def _key(trainer: Trainer, rows: Rows, precision: torch.dtype) -> str:
    here = Path(__file__).parent
    code = [(here / f"{name}.py").read_bytes() for name in ("packing", "attention", "head", "reference", "trl_seam")]
    parts = {
        "weights": _weights(trainer.ref_model or trainer.model),
        "rows": rows.fingerprint,
        "precision": str(precision),
        "code": hashlib.sha256(b"".join(code)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _weights(model: PreTrainedModel) -> str:
    """The fingerprint of what the reference is made of: everything but the adapter that is trained."""
    return models.fingerprint(model, without=".default.")


def _read(file: Path, count: int) -> numpy.ndarray | None:
    """`[2, count]` log-probabilities, or None when they are not there whole."""
    try:
        found: numpy.ndarray = numpy.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (2, count) and numpy.isfinite(found).all() else None


def _agrees(trainer: Trainer, rows: Rows, known: numpy.ndarray, precision: torch.dtype) -> bool:
    picked = sorted(random.SystemRandom().sample(range(len(rows)), min(_CHECKED, len(rows))))
    again = numpy.array(heldout.reference(trainer, rows.some(picked)))
    relative, absolute = _TOLERANCE[precision]
    return bool(numpy.allclose(again, known[:, picked], rtol=relative, atol=absolute))
