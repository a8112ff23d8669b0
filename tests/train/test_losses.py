"""ORPO's terms against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignctl.train.losses import log1mexp, masked_mean, orpo_loss


def test_orpo_by_hand() -> None:
    """One pair. Chosen: two tokens of probability 1/2, so p = 1/2 and odds = 1. Rejected: one token of probability
    1/4, so odds = 1/3. The odds ratio is 3, and -log sigmoid(ln 3) = -ln(3/4). The likelihood term runs over a prompt
    token of probability 1/8 and the two answer tokens: -(ln 1/8 + 2 ln 1/2) / 3 = 5/3 ln 2.
    """
    logps = torch.tensor([[1 / 8, 1 / 2, 1 / 2], [1, 1 / 4, 1]]).log()
    answers = torch.tensor([[False, True, True], [False, True, False]])
    nll_mask = torch.tensor([[True, True, True]])
    terms = orpo_loss(logps, answers, nll_mask, beta=0.5)
    assert terms.log_odds.item() == pytest.approx(math.log(3), abs=1e-6)
    assert terms.odds_ratio.item() == pytest.approx(-0.5 * math.log(3 / 4), abs=1e-6)
    assert terms.nll.item() == pytest.approx(5 / 3 * math.log(2), abs=1e-6)


def test_orpo_without_the_prompt() -> None:
    logps = torch.tensor([[1 / 8, 1 / 2, 1 / 2], [1, 1 / 4, 1]]).log()
    answers = torch.tensor([[False, True, True], [False, True, False]])
    assert orpo_loss(logps, answers, answers[:1], 0.5).nll.item() == pytest.approx(math.log(2), abs=1e-6)


def test_orpo_metrics_have_trls_names() -> None:
    logps = torch.tensor([[1 / 2], [1 / 4]]).log()
    mask = torch.ones(2, 1, dtype=torch.bool)
    metrics = orpo_loss(logps, mask, mask[:1], 0.1).metrics(0.1)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.1 * math.log(1 / 2))
    assert metrics["rewards/accuracies"].item() == 1.0
    assert metrics["log_odds_ratio"].item() == pytest.approx(math.log(3 / 4), abs=1e-6)


@pytest.mark.parametrize("x", [-1e-6, -0.1, -math.log(2), -1.0, -50.0])
def test_log1mexp_is_exact_on_both_sides(x: float) -> None:
    exact = math.log(-math.expm1(x))
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(exact, rel=1e-9)


def test_masked_mean() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])
    assert masked_mean(values, mask).tolist() == [1.5]
