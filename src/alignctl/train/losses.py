"""Losses as pure functions of token log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LN2 = 0.6931471805599453


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation on either side of -ln 2."""
    return torch.where(x < -_LN2, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last axis where `mask` holds: `[N, T], [N, T] -> [N]`."""
    return (values * mask).sum(-1) / mask.sum(-1)


@dataclass(frozen=True)
class OrpoTerms:
    """What ORPO's loss is made of; everything but `nll` is one number a pair, `[B]`."""

    nll: Tensor
    odds_ratio: Tensor
    log_odds: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor

    def metrics(self, beta: float) -> dict[str, Tensor]:
        """TRL's names for what it logs."""
        chosen, rejected = beta * self.chosen_logps, beta * self.rejected_logps
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": self.chosen_logps,
            "logps/rejected": self.rejected_logps,
            "nll_loss": self.nll,
            "log_odds_ratio": F.logsigmoid(self.log_odds),
            "log_odds_chosen": self.log_odds,
        }


def orpo_loss(logps: Tensor, answers: Tensor, nll_mask: Tensor, beta: float) -> OrpoTerms:
    """The terms of ORPO (https://arxiv.org/abs/2403.07691); the loss is `nll + odds_ratio.mean()`.

    Args:
        logps: `[2B, T]` token log-probabilities, chosen rows first; 0 where nothing was scored.
        answers: `[2B, T]` bool, the tokens of the answers.
        nll_mask: `[B, T]` bool, the tokens of the chosen rows in the likelihood term.
        beta: weight of the odds-ratio term, λ in the paper.

    With p = the geometric mean of an answer's token probabilities (eq. 3) and odds = p / (1 - p) (eq. 4),
    `odds_ratio = -beta * log sigmoid(log(odds(chosen) / odds(rejected)))` (eq. 7), `[B]`;
    `nll` is the mean of `-logps` over `nll_mask`, a scalar.
    """
    means = masked_mean(logps.float(), answers)
    chosen, rejected = means.chunk(2)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    rows = nll_mask.shape[0]
    nll = -(logps[:rows].float() * nll_mask).sum() / nll_mask.sum()
    return OrpoTerms(nll, -beta * F.logsigmoid(log_odds), log_odds, chosen, rejected)
