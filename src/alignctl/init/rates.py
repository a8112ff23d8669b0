"""Learning rates and betas by method, adapter and size, each with where it is from (docs/init.md)."""

from __future__ import annotations

from dataclasses import dataclass

HANDBOOK = "https://github.com/huggingface/alignment-handbook"


@dataclass(frozen=True)
class Rate:
    """A published or derived learning rate, and the beta that goes with it."""

    learning_rate: float
    why: str
    beta: float | None = None
    why_beta: str = ""


_SFT_ADAPTER = Rate(2e-4, "zephyr-7b-beta's SFT with QLoRA")
_SFT_SMALL = Rate(3e-4, "SmolLM2's small SFT recipe, its careful value")
_SFT_LARGE = Rate(2e-5, "zephyr-7b-beta's SFT of all weights")
_DPO_ADAPTER_SMALL = Rate(
    1e-4, "small models with adapters learned between 5e-5 and 2e-4 in DPO", 0.1, "the paper's and TRL's"
)
_DPO_ADAPTER_MIDDLE = Rate(
    2e-5, "ten times what all weights take, the usual step to adapters", 0.1, "the paper's and TRL's"
)
_DPO_ADAPTER_LARGE = Rate(
    1e-5,
    "between 5e-6 (zephyr-7b-beta's DPO with QLoRA) and 2e-5",
    0.1,
    "the paper's; 0.01 was best for zephyr-7b-beta",
)
_DPO_SMALL = Rate(1e-6, "SmolLM2's DPO of all weights", 0.5, "SmolLM2's DPO")
_DPO_LARGE = Rate(5e-7, "zephyr-7b-beta's DPO of all weights", 0.01, "zephyr-7b-beta's DPO, where 0.01 beat 0.1")
_ORPO_ADAPTER_SMALL = Rate(
    5e-5,
    "ORPO's authors: with adapters and little data 5e-5 or more",
    0.5,
    "ORPO's authors: 0.5 to 1.0 for small models",
)
_ORPO_ADAPTER_LARGE = Rate(
    2e-5, "the upper end of what ORPO's authors give (5e-6 to 2e-5)", 0.1, "ORPO's authors: 0.05 to 0.1 for 7B"
)
_ORPO_SMALL = Rate(
    1e-5, "within what ORPO's authors give (5e-6 to 2e-5)", 0.5, "ORPO's authors: 0.5 to 1.0 for small models"
)
_ORPO_LARGE = Rate(5e-6, "mistral-capybara's ORPO of all weights", 0.05, "mistral-capybara's ORPO")

# (method, adapter?): (up to so many parameters, rate), the first that fits.
RATES: dict[tuple[str, bool], tuple[tuple[float, Rate], ...]] = {
    ("sft", True): ((float("inf"), _SFT_ADAPTER),),
    ("sft", False): ((0.5e9, _SFT_SMALL), (float("inf"), _SFT_LARGE)),
    ("dpo", True): ((2e9, _DPO_ADAPTER_SMALL), (5e9, _DPO_ADAPTER_MIDDLE), (float("inf"), _DPO_ADAPTER_LARGE)),
    ("dpo", False): ((2e9, _DPO_SMALL), (float("inf"), _DPO_LARGE)),
    ("orpo", True): ((3.5e9, _ORPO_ADAPTER_SMALL), (float("inf"), _ORPO_ADAPTER_LARGE)),
    ("orpo", False): ((3.5e9, _ORPO_SMALL), (float("inf"), _ORPO_LARGE)),
}


def rate(method: str, *, adapter: bool, parameters: int | None) -> Rate:
    """The row for a model; one of unknown size counts as a large one, which takes the smaller steps."""
    size = float("inf") if parameters is None else parameters
    return next(rate for limit, rate in RATES[method, adapter] if size <= limit)
