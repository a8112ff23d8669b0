"""Our trainers against TRL's own on the same ids, and the recipe's values on their way into the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from alignctl.errors import RecipeError
from alignctl.recipe.schema import Recipe
from alignctl.train import fit, machine, standin, translate, trl_seam
from alignctl.train.parts import Parts
from alignctl.train.tokenizer import load_encoder
from alignctl.train.tokens import Encoder

ROWS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 1], "rejected_ids": [11, 12, 13, 14, 15, 1]},
    {"prompt_ids": [5, 20], "chosen_ids": [21, 22, 23, 24, 1], "rejected_ids": [25, 1]},
    {"prompt_ids": [30, 31, 32, 33, 34], "chosen_ids": [35, 1], "rejected_ids": [36, 37, 38, 1]},
    {"prompt_ids": [40, 41, 42], "chosen_ids": [43, 44, 45, 1], "rejected_ids": [43, 46, 1]},
]
SFT_ROWS = [
    {
        "input_ids": row["prompt_ids"] + row["chosen_ids"],
        "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
    }
    for row in ROWS
]


def make_recipe(method: str, folder: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": [{"path": "unused.jsonl"}]},
        "training": {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 1},
        method: {},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.model_validate({k: v for k, v in values.items() if v is not None})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama on disk, as a smoke run would make it."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = make_recipe("dpo", Path("HuggingFaceTB/SmolLM2-135M-Instruct"))
    standin.stand_in(recipe, folder)
    return folder / "model"


def build(recipe: Recipe, run: Path) -> Trainer:
    rows = Dataset.from_list(SFT_ROWS if recipe.method == "sft" else ROWS)
    where = machine.Machine("cpu", "test", True)
    encoder: Encoder = load_encoder(recipe)
    precision = where.precision(recipe.model.dtype)
    return fit.BUILD[recipe.method](recipe, Parts(where, precision, encoder, rows, rows, run))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def same_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give `target` the adapters of `source`, moved off zero so that every gradient counts."""
    torch.manual_seed(3)
    theirs = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
            theirs[name].data = parameter.data.clone()


def compare(ours: torch.Tensor, theirs: torch.Tensor, our_model: Any, their_model: Any) -> None:
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    mine, others = gradients(our_model), gradients(their_model)
    assert mine.keys() == others.keys() and len(mine) == 28
    for name, gradient in mine.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-5)


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}


@pytest.mark.parametrize(
    "dpo",
    [
        {"beta": 0.3},
        {"beta": 0.2, "loss_type": "ipo"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"ld_alpha": 0.5},
    ],
    ids=["sigmoid", "ipo", "sigmoid+sft", "robust", "ld"],
)
def test_dpo_equals_trl(tiny: Path, tmp_path: Path, dpo: dict[str, Any]) -> None:
    ours = build(make_recipe("dpo", tiny, dpo=dpo), tmp_path)
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    theirs = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), **CPU, **dpo),
        train_dataset=text,
        processing_class=ours.processing_class,
        peft_config=LORA,
    )
    same_weights(ours.model, theirs.model)
    batch = ours.data_collator(ROWS)
    ours_loss, their_loss = ours.compute_loss(ours.model, dict(batch)), theirs.compute_loss(theirs.model, dict(batch))
    for name, values in theirs._metrics["train"].items():
        assert ours._metrics["train"][name] == pytest.approx(values, abs=1e-4), name
    compare(ours_loss, their_loss, ours.model, theirs.model)


@pytest.mark.parametrize(
    "name", ["google/gemma-2-2b", "ibm-granite/granite-3", "Mixtral-8x7B", "Qwen/Qwen3-4B", "phi-2"]
)
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_other_architectures_score_as_their_full_logits_do(tmp_path: Path, name: str, method: str) -> None:
    """Logits that are capped, scaled or routed, and a head with a bias."""
    standin.stand_in(make_recipe("dpo", Path(name)), tmp_path / "tiny")
    trainer = build(make_recipe(method, tmp_path / "tiny" / "model"), tmp_path / "run")
    batch = trainer.data_collator(ROWS)
    _, logps = trl_seam.loss_and_logps(trainer, dict(batch))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    every = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    answers = batch["completion_mask"][:, 1:].bool()
    torch.testing.assert_close(logps[answers], every[answers], rtol=1e-4, atol=1e-4)
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    assert any(gradient.abs().max() > 0 for gradient in gradients(trainer.model).values())


def orpo_batch(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A padded pair batch in the form that TRL's ORPO collator gives."""
    out: dict[str, Any] = {}
    for side, part in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
        out[f"{side}_input_ids"] = batch["input_ids"][part]
        out[f"{side}_attention_mask"] = batch["attention_mask"][part]
        out[f"{side}_labels"] = batch["input_ids"][part].masked_fill(batch["completion_mask"][part] == 0, -100)
    return out


def test_orpo_equals_trl(tiny: Path, tmp_path: Path) -> None:
    ours = build(make_recipe("orpo", tiny, orpo={"beta": 0.4}), tmp_path)
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    theirs = ORPOTrainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), LORA),
        args=ORPOConfig(output_dir=str(tmp_path / "trl"), beta=0.4, remove_unused_columns=False, **CPU),
        train_dataset=text,
        processing_class=ours.processing_class,
    )
    same_weights(ours.model, theirs.model)
    batch = ours.data_collator(ROWS)
    our_loss, our_metrics = ours.get_batch_loss_metrics(ours.model, dict(batch), "train")
    their_loss, their_metrics = theirs.get_batch_loss_metrics(theirs.model, orpo_batch(batch), "train")
    for name in ("rewards/chosen", "rewards/margins", "logps/rejected", "nll_loss", "log_odds_ratio"):
        assert our_metrics[name] == pytest.approx(their_metrics[name], abs=1e-5), name
    compare(our_loss, their_loss, ours.model, theirs.model)


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_one_by_four_is_four_by_one(tiny: Path, tmp_path: Path, method: str) -> None:
    after = []
    for size, passes in ((4, 1), (1, 4)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
        trainer = build(make_recipe(method, tiny, training=training), tmp_path / f"{size}")
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        after.append({n: p.detach() - before[n] for n, p in trainer.model.named_parameters() if p.requires_grad})
    moved = [name for name, change in after[0].items() if change.abs().max() > 0]
    assert len(moved) == 14  # from its start only lora_B has a gradient
    for name, change in after[0].items():
        torch.testing.assert_close(change, after[1][name], rtol=1e-4, atol=1e-6)


def test_recipe_arrives_in_the_trainer(tiny: Path, tmp_path: Path) -> None:
    training = {
        "learning_rate": 3e-6,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.25,
        "weight_decay": 0.03,
        "max_grad_norm": 0.7,
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,
        "num_train_epochs": 2.5,
        "max_steps": None,
        "logging_steps": 7,
        "save_steps": 11,
        "eval_steps": 5,
        "seed": 9,
        "optim": "adafactor",
        "gradient_checkpointing": True,
    }
    dpo = {"beta": 0.7, "loss_type": ["hinge", "sft"], "loss_weights": [0.9, 0.1], "ld_alpha": 0.4}
    trainer = build(
        make_recipe("dpo", tiny, training=training, dpo=dpo, trl={"adam_beta2": 0.97}, data={"max_length": 99}),
        tmp_path,
    )
    args = trainer.args
    assert (trainer.beta, trainer.loss_types, trainer.loss_weights, trainer.ld_alpha) == (
        0.7,
        ["hinge", "sft"],
        [0.9, 0.1],
        0.4,
    )
    for name in set(training) - {"warmup_ratio", "max_steps", "gradient_checkpointing"}:
        assert getattr(args, name) == training[name], name
    assert (args.warmup_steps, args.max_steps, args.adam_beta2, args.max_length) == (0.25, -1, 0.97, 99)
    assert args.gradient_checkpointing and args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert trainer.model.peft_config["default"].r == 4


def test_trl_values_of_another_type_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        build(make_recipe("dpo", tiny, trl={"adam_beta1": "wrong", "dataloader_num_workers": 1.5}), tmp_path)
    assert [problem.where for problem in error.value.problems] == ["trl.adam_beta1", "trl.dataloader_num_workers"]


@pytest.mark.parametrize(
    ("lora", "said"), [({"target_modules": ["nope"]}, "not found"), ({"target_modules": ["lm_head"]}, "`lm_head`")]
)
def test_targets_that_cannot_be_trained_are_refused(
    tiny: Path, tmp_path: Path, lora: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said), translate.refused():
        build(make_recipe("dpo", tiny, lora=lora), tmp_path)


def test_lora_section_arrives(tiny: Path, tmp_path: Path) -> None:
    lora = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.2, "target_modules": ["q_proj"], "use_rslora": True}
    config = build(make_recipe("sft", tiny, lora=lora), tmp_path).model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 7, 0.2, True)
    assert config.target_modules == {"q_proj"}


def test_sft_loss_is_over_supervised_tokens_only(tiny: Path, tmp_path: Path) -> None:
    trainer = build(make_recipe("sft", tiny), tmp_path)
    batch = trainer.data_collator(SFT_ROWS)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_qlora_adapters_are_float32(tiny: Path, tmp_path: Path, method: str) -> None:
    recipe = make_recipe(method, tiny, model={"dtype": "bfloat16"}, quantization={})
    model = build(recipe, tmp_path).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    quantised = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 14
    assert {module.compute_dtype for module in quantised} == {torch.bfloat16}


def test_4_bit_gradients_survive_an_evaluation(tiny: Path, tmp_path: Path) -> None:
    """On some CPUs bitsandbytes repacks weights for inference, and that layout has no backward pass."""
    trainer = build(make_recipe("sft", tiny, model={"dtype": "bfloat16"}, quantization={}), tmp_path)
    batch = trainer.data_collator(SFT_ROWS)

    def step() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return {name: g.clone() for name, g in gradients(trainer.model).items()}

    before = step()
    trainer.model.eval()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, dict(batch))
    after = step()
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(gradient, after[name], rtol=1e-3, atol=1e-6)


def test_full_fine_tuning_trains_float32_against_a_second_copy(tiny: Path, tmp_path: Path) -> None:
    trainer = build(make_recipe("dpo", tiny, model={"dtype": "bfloat16"}, lora=None), tmp_path)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.ref_model is not None
    loss = trainer.compute_loss(trainer.model, dict(trainer.data_collator(ROWS)))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    trainer.model.get_input_embeddings().weight.data.mul_(1.5)
    changed = trainer.compute_loss(trainer.model, dict(trainer.data_collator(ROWS)))
    assert abs(changed.item() - math.log(2)) > 1e-4


def test_dpo_goes_on_from_an_adapter_which_is_its_reference(tiny: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "parent" / "model")
    recipe = make_recipe("dpo", tiny, model={"adapter": str(tmp_path / "parent")}, lora=None)
    trainer = build(recipe, tmp_path / "run")
    batch = trainer.data_collator(ROWS)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-6)
    with torch.no_grad():
        reference = trainer.compute_ref_log_probs(trainer.model, batch)[0]
        plain = build(make_recipe("dpo", tiny), tmp_path / "plain")
        of_base = plain.compute_ref_log_probs(plain.model, batch)[0]
    assert (reference - of_base).abs().max() > 1e-2
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)


def test_stop_tokens_outlive_the_trainers_constructor(tiny: Path, tmp_path: Path) -> None:
    trainer = build(make_recipe("dpo", tiny), tmp_path)
    tokenizer = trainer.processing_class
    assert trainer.model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert trainer.model.generation_config.pad_token_id == tokenizer.pad_token_id
