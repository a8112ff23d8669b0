"""Scores of rows under the model in a trainer."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch

from alignctl.train import heldout
from alignctl.train.preflight import Built

Make = Callable[..., Built]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_likelihoods_are_those_of_plain_logits(make: Make, method: str, packed: bool) -> None:
    built = make(method, training={"packed": packed})
    found = heldout.likelihoods(built.trainer, built.rows)
    assert found.shape == (2, 6) and built.trainer.model.training
    for i in range(6):
        row = built.rows.encoded(i)
        for side, column in enumerate(("chosen_ids", "rejected_ids")):
            ids = torch.tensor([row["prompt_ids"] + row[column]])
            with torch.no_grad():
                logps = built.trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            answer = ids[0, len(row["prompt_ids"]) :]
            expected = logps[-len(answer) :].gather(1, answer[:, None]).mean().item()
            assert found[side, i] == pytest.approx(expected, abs=1e-4)


def test_likelihoods_are_those_of_a_score(make: Make) -> None:
    built = make()
    scores = heldout.score(built.trainer, built.recipe, built.rows).scores
    expected = [scores.chosen_logps_per_token, scores.rejected_logps_per_token]
    numpy.testing.assert_allclose(heldout.likelihoods(built.trainer, built.rows), expected, rtol=1e-5)
