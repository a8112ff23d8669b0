"""What a run measured of its start before its first step: the reference's scores, where the same rows are evaluated."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy
import torch
from transformers import PreTrainedModel

from alignctl import rundir
from alignctl.proof import likelihood
from alignctl.proof.likelihood import Line, Scored
from alignctl.proof.trained import Trained

# The same rows in the same batch come out alike, but for what a GPU's kernels do in another order.
_TOLERANCE = 1e-3


def read(trained: Trained, lines: Sequence[tuple[Line, ...]]) -> Scored | None:
    """The scores of the held-out `lines` under what training started from; None where the run has none of them."""
    values = rundir.read_json(trained.run / "logs" / "before.json").get("scores", {})
    names = ("chosen_logps_per_token", "rejected_logps_per_token")
    found = [-numpy.array(values["nll"])] if "nll" in values else [numpy.array(values.get(name, [])) for name in names]
    counts = likelihood.counts(lines)
    if [len(side) for side in found] != [len(side) for side in counts] or not all(numpy.isfinite(found).flat):
        return None
    return Scored(numpy.stack(found) * counts, counts)


def agrees(
    known: Scored,
    model: PreTrainedModel,
    lines: Sequence[tuple[Line, ...]],
    pad: int,
    precision: torch.dtype,
    batch_size: int,
) -> bool:
    """Whether one batch of the lines, any, is scored by `model` as is `known`."""
    part = random.SystemRandom().choice(list(likelihood.batches(lines, batch_size)))
    again = likelihood.score(model, [lines[i] for i in part], pad, precision, batch_size)
    return numpy.allclose(again.per_token, known.per_token[:, part], rtol=_TOLERANCE, atol=_TOLERANCE)
