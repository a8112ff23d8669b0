"""Every place where alignctl reaches behind TRL's public surface. TRL 1.16.

Each item says why it is needed and when it can go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer, SFTTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from alignctl.train.losses import orpo_loss

Batch = dict[str, Any]


def pair_collator(pad_token_id: int) -> DataCollatorForPreference:
    """Pads encoded pairs to `[2B, L]`: chosen rows first, rejected rows after."""
    return DataCollatorForPreference(pad_token_id=pad_token_id)


def token_logps(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the tokens whose label is not -100: `[N, L] -> [N, L-1]`, 0 elsewhere.

    Uses the fused head that TRL puts on a trainer's model (`trl.trainer.utils.add_fused_lm_head`), so that only
    supervised positions are projected. To go when alignctl has a head of its own.
    """
    out = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True)
    logps: Tensor = out.log_probs
    return logps


class IdsSFTTrainer(SFTTrainer):
    """SFTTrainer that leaves the model card to alignctl."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


class IdsDPOTrainer(DPOTrainer):
    """DPOTrainer over rows that are token ids already.

    `_prepare_dataset` is overridden because TRL 1.16 always tokenizes, and tokenizes wrongly what alignctl's own rules
    get right: https://github.com/huggingface/trl/issues/2054, https://github.com/huggingface/trl/pull/6472. To go when
    DPOConfig has what SFTConfig has, `dataset_kwargs={"skip_prepare_dataset": True}`.
    """

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


class IdsORPOTrainer(ORPOTrainer):
    """ORPOTrainer over rows that are token ids already, with the loss over chunked token log-probabilities.

    TRL's own builds the `[2B, L, V]` logits and turns every weight into NaN on an empty answer:
    https://github.com/huggingface/trl/issues/6548. It lives in `trl.experimental`, which may drop it. To go when ORPO
    has a stable trainer with the fused head.
    """

    def __init__(self, *args: Any, nll_on_prompt: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nll_on_prompt = nll_on_prompt
        self.use_dpo_data_collator = True  # our collator gives what prediction_step needs; without this it warns
        add_fused_lm_head(self._backbone_owner(), outputs=("log_probs", "mean_logits"))

    def _backbone_owner(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def tokenize_row(self, feature: Batch, model: Any = None) -> Batch:
        """The row as it is: it holds ids."""
        return feature

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The batches of one update, and how many tokens their likelihood term runs over.

        The mean over tokens is taken over the whole update, so that 4 x 1 and 1 x 4 rows give the same gradient; TRL's
        ORPO takes it over each forward pass.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self._nll_mask(batch).sum() for batch in samples]
        return samples, torch.stack(counts).sum().to(device) if counts else None

    def _nll_mask(self, batch: Batch) -> Tensor:
        """Positions of the chosen rows whose token is in the likelihood term: `[B, L-1]`."""
        rows = batch["input_ids"].shape[0] // 2
        mask = batch["attention_mask"] if self.nll_on_prompt else batch["completion_mask"]
        chosen: Tensor = mask[:rows, 1:].bool()
        return chosen

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """ORPO's loss of one forward pass; the Trainer divides it by the passes of the update."""
        loss, metrics = self._loss(model, inputs, num_items_in_batch)
        self.store_metrics(metrics, train_eval="train")
        return (loss, metrics) if return_outputs else loss

    def get_batch_loss_metrics(self, model: Any, batch: Batch, train_eval: str = "train") -> tuple[Tensor, Batch]:
        """Loss and metrics of one batch on its own, for evaluation."""
        loss, metrics = self._loss(model, batch, None)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + key: value for key, value in metrics.items()}

    def _loss(self, model: Any, batch: Batch, update_tokens: Tensor | None) -> tuple[Tensor, Batch]:
        rows = batch["input_ids"].shape[0] // 2
        answers = batch["completion_mask"][:, 1:].bool()
        supervised = answers.clone()
        supervised[:rows] |= self._nll_mask(batch)
        labels = batch["input_ids"].clone()
        labels[:, 1:] = labels[:, 1:].masked_fill(~supervised, -100)
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, use_cache=False,
            fused_lm_head=True,
        )
        nll_mask = self._nll_mask(batch)
        terms = orpo_loss(out.log_probs, answers, nll_mask, self.beta)
        nll = terms.nll
        if update_tokens is not None:
            share = nll_mask.sum() / update_tokens * self.current_gradient_accumulation_steps
            nll = nll * share
        metrics = {key: value.detach().float().mean().item() for key, value in terms.metrics(self.beta).items()}
        for side, part in (("chosen", slice(0, rows)), ("rejected", slice(rows, None))):
            logits = out.mean_logits[part][answers[part]]
            metrics[f"logits/{side}"] = logits.detach().float().mean().item()
        return nll + terms.odds_ratio.mean(), metrics
