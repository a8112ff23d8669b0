"""How much likelier answers have become in training: what the gate `drift` and the report both ask."""

from __future__ import annotations

# Nats a token; chosen answers that have become unlikelier by more are on their way out (docs/gates.md).
LIMIT = -0.3


def of_dpo(reward: float, beta: float, tokens: float) -> float:
    """Change of an answer's log-probability against the reference, in nats a token.

    DPO's reward is `beta * (logp - reference logp)` of the whole answer; `tokens` is the mean length of such answers.
    """
    return reward / beta / tokens
