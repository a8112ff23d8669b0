"""Every place where alignctl reaches behind TRL's public surface. TRL 1.16.

Each item says why it is needed and when it can go.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from alignctl.train.head import Scaling, token_statistics
from alignctl.train.losses import orpo_loss

Batch = dict[str, Any]


def pair_collator(pad_token_id: int) -> DataCollatorForPreference:
    """Pads encoded pairs to `[2B, L]`: chosen rows first, rejected rows after."""
    return DataCollatorForPreference(pad_token_id=pad_token_id)


def loss_and_logps(trainer: Trainer, batch: Batch) -> tuple[Tensor, Tensor]:
    """The trainer's own loss of one batch, and the `[N, L-1]` token log-probabilities that it came from.

    Log-probabilities are 0 where nothing is supervised. `_metrics` and `_total_train_tokens` are put back because
    `compute_loss` adds to what the next log line says; to go when TRL can compute a loss without logging it.
    """
    outputs: list[Any] = []
    hook = trainer.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    kept, tokens = copy.deepcopy(getattr(trainer, "_metrics", None)), getattr(trainer, "_total_train_tokens", None)
    try:
        if isinstance(trainer, IdsORPOTrainer):
            loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="eval")
        else:
            loss = trainer.compute_loss(trainer.model, dict(batch))
    finally:
        hook.remove()
        if kept is not None:
            trainer._metrics, trainer._total_train_tokens = kept, tokens
    return loss, outputs[0].log_probs


@contextlib.contextmanager
def given_reference(trainer: Trainer) -> Iterator[None]:
    """Inside, a DPO trainer takes the reference's log-probabilities from the batch, of whole answers."""
    before = trainer.precompute_ref_logps, trainer.ld_alpha
    trainer.precompute_ref_logps, trainer.ld_alpha = True, None
    try:
        yield
    finally:
        trainer.precompute_ref_logps, trainer.ld_alpha = before


def install_sampler(trainer: Trainer, sampler: Sampler[int]) -> None:
    """Let `trainer` take its training rows in the order of `sampler`.

    transformers' Trainer chooses among samplers of its own and takes no other; its `batch_rebalance` makes passes of
    unlike row counts, and a mean over such passes weighs rows unlike. To go when a sampler can be given.
    """
    trainer._get_train_sampler = lambda train_dataset=None: sampler


def end_at_the_last_step(trainer: Trainer) -> None:
    """Let a run that is resumed at its last step end there.

    transformers' Trainer looks whether it is done after a step alone, and takes one more where that step lies within
    an epoch. To go when it looks before.
    """
    run_epoch = trainer._run_epoch

    def bounded(**given: Any) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(**given)

    trainer._run_epoch = bounded


def install_head(model: Any) -> None:
    """Let `model(…, labels=…, fused_lm_head=True)` project supervised positions only, on every device.

    TRL's own fused head (`trl.trainer.utils.add_fused_lm_head`) does so on Triton devices alone; on a CPU it projects
    prompts and padding too. To go when it is compact everywhere. Models with a router's loss keep TRL's.
    """
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    if "fused_lm_head" not in owner.forward.__code__.co_varnames:
        add_fused_lm_head(owner, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    config = owner.config.get_text_config().to_dict()
    if "output_router_logits" in config:
        return
    scaling = _scaling(config)
    trl_forward = owner.forward

    @functools.wraps(type(owner).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return trl_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        head, mask = self.get_output_embeddings(), labels[:, 1:] != -100
        found = token_statistics(hidden[mask], head.weight, head.bias, labels[:, 1:][mask], scaling)
        logps, entropy, mean_logits, is_top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)
        loss = -logps.sum() / mask.sum().clamp(min=1)
        return FusedCausalLMOutput(
            loss=loss, log_probs=logps, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=mask
        )

    owner.forward = types.MethodType(forward, owner)


def _scaling(config: dict[str, Any]) -> Scaling:
    """What a model of `config` does to its logits; the keys are those that TRL's fused head knows."""
    scale = next((config[key] for key in _MULTIPLIERS if config.get(key) is not None), None)
    if scale is None and config.get("logits_scaling") is not None:
        divides = config["model_type"] != "hyperclovax"
        scale = 1 / config["logits_scaling"] if divides else config["logits_scaling"]
    return Scaling(1.0 if scale is None else scale, config.get("final_logit_softcapping"))


_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


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
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
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
