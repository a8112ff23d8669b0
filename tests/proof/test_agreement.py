"""How two models' predictions are compared: which tokens, and the numbers, derived by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignctl.proof import agreement
from alignctl.proof.agreement import Row, Rowset


def test_the_answer_of_a_pair_is_predicted_from_the_prompt_on() -> None:
    ids = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
    assert agreement._row(ids) == Row([1, 2, 3, 4], [2, 3])


def test_the_trained_turns_of_a_conversation_are_predicted() -> None:
    ids = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, -100, -100, 6]}
    assert agreement._row(ids) == Row([1, 2, 3, 4, 5], [1, 4])


def test_plain_text_has_no_prediction_of_its_first_token() -> None:
    assert agreement._row({"input_ids": [7, 8, 9], "labels": [7, 8, 9]}) == Row([7, 8], [0, 1])


def test_a_long_answer_is_compared_at_its_start() -> None:
    row = agreement._row({"prompt_ids": [1], "chosen_ids": list(range(100)), "rejected_ids": [6]})
    assert len(row.positions) == 64 and len(row.ids) == 64 and row.positions[-1] == 63


def test_divergence_and_agreement_are_means_over_tokens(tmp_path: Path) -> None:
    """Two tokens: p = (3/4, 1/4) and q = (1/2, 1/2) at one, p = q at the other; the base is (1/4, 3/4).

    KL(p ‖ q) = 3/4·ln(3/2) + 1/4·ln(1/2); KL(p ‖ base) = 3/4·ln 3 + 1/4·ln(1/3) = 1/2·ln 3.
    """
    p, base = ([0.75, 0.25], [0.75, 0.25]), ([0.25, 0.75], [0.25, 0.75])
    q = ([0.4999999, 0.5000001], [0.75, 0.25])
    save_file({"tuned": torch.tensor(p).log(), "base": torch.tensor(base).log()}, tmp_path / "0.safetensors")
    model: Any = Answering(torch.tensor(q).log())
    found = agreement.compare(model, Rowset([Row([1, 2], [0, 1])], "rows"), tmp_path)
    assert found.kl == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-6)
    assert found.base_kl == pytest.approx(0.5 * math.log(3), rel=1e-6)
    assert (found.top1, found.tokens, found.rows) == (0.5, 2, 1)


class Answering(torch.nn.Module):
    """A model that gives these logits to whatever it is asked."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **given: Any) -> Any:
        return SimpleNamespace(logits=self.logits[None])
