"""Recipes shaped as other tools have them, key by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignctl.errors import RecipeError
from alignctl.init import convert, draft
from alignctl.init.convert import Conversion
from alignctl.recipe.schema import Recipe

HANDBOOK_DPO = """
model_name_or_path: someone/zephyr-sft
torch_dtype: float16
attn_implementation: flash_attention_2
use_peft: true
load_in_4bit: true
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj]
dataset_mixer: {someone/feedback: 1.0, someone/more: 0.5}
dataset_splits: [train_prefs, test_prefs]
preprocessing_num_workers: 12
bf16: true
beta: 0.01
do_eval: true
evaluation_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 1
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
hub_model_id: zephyr-dpo
learning_rate: 5.0e-6
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: paged_adamw_32bit
output_dir: data/zephyr-dpo
per_device_train_batch_size: 4
per_device_eval_batch_size: 8
push_to_hub: true
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""
HANDBOOK_SFT = """
model_name_or_path: someone/base
model_revision: main
chat_template: "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
dataset_mixture:
  datasets:
    - {id: someone/chat, config: default, split: train_sft, columns: [messages], weight: 1.0}
    - {id: someone/chat, config: default, split: test_sft, columns: [messages], weight: 1.0}
  test_split_size: 1000
  seed: 0
dataset_num_proc: 12
eval_strategy: epoch
learning_rate: 2.0e-05
max_seq_length: 2048
max_steps: -1
per_device_train_batch_size: 16
report_to: [wandb]
"""
HANDBOOK_ORPO = """
model_name_or_path: someone/base
dataset_mixture: {datasets: [{id: someone/pairs, split: train}], test_split_size: 0.1}
bf16: true
beta: 0.05
learning_rate: 5.0e-6
lr_scheduler_type: inverse_sqrt
max_length: 2048
max_prompt_length: 1792
num_train_epochs: 3
optim: adamw_bnb_8bit
per_device_train_batch_size: 8
report_to: [tensorboard, wandb]
warmup_steps: 100
"""
TRL_DPO = """
model_name_or_path: someone/instruct
dtype: bfloat16
trust_remote_code: true
dataset_name: someone/pairs
dataset_test_split: validation
eval_strategy: steps
eval_steps: 50
use_peft: true
lora_target_modules: all-linear
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
learning_rate: 5.0e-7
gradient_accumulation_steps: 8
logging_first_step: true
dataset_num_proc: 4
use_liger_kernel: true
"""
AXOLOTL_DPO = """
base_model: someone/instruct
model_type: MistralForCausalLM
load_in_8bit: false
load_in_4bit: true
chat_template: chatml
rl: dpo
rl_beta: 0.2
datasets:
  - {path: someone/pairs, split: train, type: chatml.intel}
  - path: json
    ds_type: json
    data_files: [pairs.jsonl]
    type: chat_template.default
    field_messages: conversation
    field_chosen: better
    field_rejected: rejected
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./out
sequence_len: 2048
sample_packing: false
adapter: qlora
lora_model_dir:
lora_r: 8
lora_alpha: 16
lora_dropout: 0.2
lora_target_linear: true
lora_target_modules: [gate_proj]
lora_modules_to_save: [embed_tokens, lm_head]
wandb_project: mine
gradient_accumulation_steps: 4
micro_batch_size: 16
num_epochs: 6
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0001
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
special_tokens: {bos_token: "<|im_start|>"}
"""
AXOLOTL_ORPO = """
base_model: someone/base
load_in_4bit: true
rl: orpo
orpo_alpha: 0.1
datasets: [{path: someone/pairs, type: chat_template.argilla}]
val_set_size: 0.1
adapter: qlora
sequence_len: 4096
lora_r: 32
micro_batch_size: 2
optimizer: paged_adamw_8bit
learning_rate: 0.0002
warmup_ratio: 0.1
flash_attention: true
"""
FACTORY_DPO = """
model_name_or_path: someone/instruct
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.3
pref_loss: sigmoid
quantization_bit: 4
dataset: dpo_en_demo, mine, hubbed
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
output_dir: saves/x
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
FACTORY_SFT = """
model_name_or_path: someone/base
stage: sft
finetuning_type: full
dataset: identity
template: alpaca
cutoff_len: 1024
learning_rate: 1.0e-5
"""
INFO = {
    "mine": {"file_name": "mine.json", "ranking": True, "columns": {"prompt": "question", "rejected": "bad"}},
    "hubbed": {"hf_hub_url": "someone/hubbed", "subset": "small", "split": "train_prefs"},
}

Convert = Callable[..., tuple[Conversion, Recipe]]


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Convert a text, and read what it became with our own parser."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, name: str = "config.yaml", **options: Any) -> tuple[Conversion, Recipe]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        found = convert.convert(file, options.get("dialect"), options.get("method"))
        output = tmp_path / "r.yaml"
        output.write_text(draft.text(found.draft, found.head(file, output), found.tail(file)), encoding="utf-8")
        (tmp_path / "recipe.jinja").write_text(found.template or "", encoding="utf-8")
        return found, convert.accepted(output, found.method, file).recipe

    return run


def sources(given: Any) -> list[dict[str, Any]]:
    return [source.model_dump(exclude_defaults=True) for source in given or []]


def test_handbook_dpo_qlora(converted: Convert) -> None:
    found, recipe = converted(HANDBOOK_DPO, "zephyr/dpo/config_qlora.yaml")
    assert (found.dialect, recipe.method) == ("handbook", "dpo")
    assert recipe.model.name_or_path == "someone/zephyr-sft" and recipe.model.dtype == "bfloat16"
    assert recipe.quantization is not None and recipe.quantization.bnb_4bit_use_double_quant is False
    assert recipe.lora is not None and (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (
        16,
        16,
        0.05,
    )
    assert recipe.lora.target_modules == ["q_proj", "k_proj", "v_proj"]
    train = [{"path": "someone/feedback", "split": "train_prefs"}, {"path": "someone/more", "split": "train_prefs"}]
    assert sources(recipe.data.train) == train
    assert sources(recipe.data.eval) == [source | {"split": "test_prefs"} for source in train]
    training = recipe.training
    assert (training.learning_rate, training.num_train_epochs, training.optim) == (5e-6, 1, "paged_adamw_32bit")
    assert (training.eval_steps, training.warmup_ratio, training.save_total_limit) == (100, 0.1, 1)
    assert recipe.dpo is not None and recipe.dpo.beta == 0.01 and recipe.data.max_length == 1024
    assert found.left["dataset_mixer.someone/more"].startswith("a fraction of 0.5")
    assert found.left["torch_dtype"] == "model.dtype is bfloat16 already"
    assert found.left["push_to_hub"] == "a run uploads nothing"
    assert "prompt and answer together" in found.left["max_prompt_length"]
    assert {"output_dir", "gradient_checkpointing_kwargs", "preprocessing_num_workers", "do_eval"} <= found.left.keys()


def test_every_key_is_spoken_of_once(converted: Convert) -> None:
    keys = {line.partition(":")[0] for line in HANDBOOK_DPO.splitlines() if line and line[0].isalpha()}
    found, _ = converted(HANDBOOK_DPO, "dpo.yaml")
    carried = {key for key, _ in found.carried}
    assert carried | {key.partition(".")[0] for key in found.left} == keys
    assert not carried & found.left.keys()


def test_handbook_sft_of_all_weights(converted: Convert) -> None:
    found, recipe = converted(HANDBOOK_SFT, "sft/config_full.yaml")
    assert recipe.method == "sft" and recipe.lora is None and recipe.quantization is None
    assert recipe.model.revision == "main" and recipe.model.chat_template.endswith("recipe.jinja")
    assert found.template is not None and found.template.startswith("{% for message")
    assert sources(recipe.data.train) == [{"path": "someone/chat", "name": "default", "split": "train_sft"}]
    assert sources(recipe.data.eval) == [{"path": "someone/chat", "name": "default", "split": "test_sft"}]
    assert recipe.data.max_length == 2048 and recipe.logging.report_to == "wandb"
    assert (recipe.training.num_train_epochs, recipe.training.lr_scheduler_type) == (3, "linear")  # its defaults
    assert found.left["eval_strategy"].startswith("'epoch' is no step") and found.left["max_steps"] == "is off"
    assert "test_split_size" in "".join(found.left)


def test_handbook_orpo(converted: Convert) -> None:
    found, recipe = converted(HANDBOOK_ORPO, method="orpo")
    assert recipe.orpo is not None and recipe.orpo.beta == 0.05 and recipe.data.eval_fraction == 0.1
    assert (recipe.training.warmup_steps, recipe.training.warmup_ratio) == (100, None)
    assert recipe.logging.report_to == "tensorboard" and found.left["report_to[1:]"] == "a run has one tracker"


def test_trl_dpo(converted: Convert) -> None:
    found, recipe = converted(TRL_DPO)
    assert (found.dialect, recipe.method) == ("trl", "dpo")  # by its loss
    assert sources(recipe.data.train) == [{"path": "someone/pairs"}]
    assert sources(recipe.data.eval) == [{"path": "someone/pairs", "split": "validation"}]
    assert recipe.dpo is not None and recipe.dpo.loss_type == ["sigmoid", "sft"]
    assert recipe.dpo.loss_weights == [1.0, 0.2] and recipe.training.learning_rate == 5e-7
    assert recipe.lora is not None and recipe.lora.lora_alpha == 32 and recipe.lora.lora_dropout == 0.05
    assert recipe.training.per_device_train_batch_size == 8 and recipe.trl == {"logging_first_step": True}
    assert recipe.model.trust_remote_code is False and "if you trust" in found.left["trust_remote_code"]


def test_trl_sets_in_a_list(converted: Convert) -> None:
    text = """
model_name_or_path: someone/instruct
datasets:
  - {path: someone/pairs, split: "train[:10%]"}
  - {path: json, data_files: [a.jsonl, b.jsonl]}
"""
    found, recipe = converted(text, "my-dpo.yaml")
    assert (found.dialect, recipe.method) == ("trl", "dpo")
    assert [source.path for source in recipe.data.train] == ["someone/pairs", "a.jsonl", "b.jsonl"]


def test_axolotl_dpo(converted: Convert) -> None:
    found, recipe = converted(AXOLOTL_DPO)
    assert (found.dialect, recipe.method) == ("axolotl", "dpo")
    assert recipe.quantization is not None and recipe.lora is not None and recipe.lora.target_modules == "all-linear"
    assert sources(recipe.data.train) == [
        {"path": "someone/pairs"},
        {"path": "pairs.jsonl", "columns": {"chosen": "better"}},
    ]
    assert recipe.data.eval_fraction == 0.05 and recipe.data.max_length == 2048
    training = recipe.training
    assert (training.per_device_train_batch_size, training.num_train_epochs, training.warmup_steps) == (16, 6, 10)
    assert (training.optim, training.learning_rate) == ("adamw_bnb_8bit", 1e-4)
    assert recipe.dpo is not None and recipe.dpo.beta == 0.2
    assert recipe.model.chat_template == "chatml" and recipe.model.dtype == "auto"
    assert recipe.logging.report_to == "wandb" and recipe.trl == {"tf32": False}
    assert found.left["lora_modules_to_save"] == "adapters alone are trained"
    assert found.left["sample_packing"] == found.left["load_in_8bit"] == "is off"
    assert "lora_model_dir" not in found.left  # an empty key says nothing
    assert "orca (question" in found.draft["data"]["train"].why


def test_axolotl_orpo(converted: Convert) -> None:
    _, recipe = converted(AXOLOTL_ORPO)
    assert recipe.orpo is not None and recipe.orpo.beta == 0.1
    assert recipe.lora is not None and (recipe.lora.r, recipe.lora.lora_alpha) == (32, 16)
    assert recipe.training.gradient_accumulation_steps == 1


def test_factory_dpo(converted: Convert, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    (tmp_path / "data" / "mine.json").write_text("[]", encoding="utf-8")
    found, recipe = converted(FACTORY_DPO)
    assert (found.dialect, recipe.method) == ("llamafactory", "dpo")
    unknown, mine, hubbed = sources(recipe.data.train)
    assert unknown == {"path": "dpo_en_demo", "take": 1000}
    assert mine["path"] == str(tmp_path / "data" / "mine.json")
    assert mine["columns"] == {"instruction": "question", "rejected": "bad"}
    assert hubbed == {"path": "someone/hubbed", "name": "small", "split": "train_prefs", "take": 1000}
    assert "dpo_en_demo is a name of LLaMA-Factory's" in found.draft["data"]["train"].why
    assert recipe.quantization is not None and recipe.quantization.bnb_4bit_use_double_quant is True
    assert recipe.lora is not None and (recipe.lora.r, recipe.lora.lora_alpha) == (8, 16)
    assert recipe.dpo is not None and (recipe.dpo.beta, recipe.dpo.loss_type) == (0.3, "sigmoid")
    assert recipe.model.chat_template == "model" and recipe.model.dtype == "bfloat16"
    assert (recipe.data.max_length, recipe.data.eval_fraction, recipe.training.eval_steps) == (2048, 0.1, 500)


def test_factory_orpo_is_a_loss_there(converted: Convert) -> None:
    _, recipe = converted(FACTORY_DPO.replace("pref_loss: sigmoid", "pref_loss: orpo"))
    assert recipe.orpo is not None and recipe.orpo.beta == 0.3


def test_factory_sft_of_all_weights(converted: Convert) -> None:
    found, recipe = converted(FACTORY_SFT)
    assert recipe.method == "sft" and recipe.lora is None and recipe.model.chat_template == "alpaca"
    assert sources(recipe.data.train) == [{"path": "identity"}]
    assert found.left["dataset: identity"].startswith("kept as a hub name")
    assert recipe.training.per_device_train_batch_size == 8


def test_axolotl_ipo_is_a_loss_of_dpo(converted: Convert) -> None:
    _, recipe = converted(AXOLOTL_DPO.replace("rl: dpo", "rl: ipo"))
    assert recipe.dpo is not None and recipe.dpo.loss_type == "ipo"


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (
            AXOLOTL_DPO.replace("rl: dpo", "rl: kto"),
            {},
            "rl: 'kto' is no method that alignctl has — it has sft, dpo, orpo",
        ),
        (FACTORY_DPO.replace("sigmoid", "simpo"), {}, "pref_loss: 'simpo' is no method"),
        (HANDBOOK_ORPO, {}, "is for DPO or for ORPO: nothing in it tells — --method dpo, or orpo"),
        ("base_model: a\nstage: sft\n", {}, "has the keys of axolotl and of llamafactory — --dialect with one of"),
        ("learning_rate: 1\n", {}, "has no key that tells whose recipe it is — --dialect with one of"),
        ("learning_rate: 1\n", {"dialect": "trl"}, "could be model.name_or_path or data.train here"),
        ("seed: 1\nseed: 2\n", {}, "seed: stands twice"),
        ("- a\n", {}, "is not a mapping"),
    ],
)
def test_what_cannot_be_told_is_asked(converted: Convert, text: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        converted(text, **options)
    assert said in str(refused.value)


def test_a_value_that_our_key_does_not_take_is_left_with_its_reason(converted: Convert) -> None:
    text = TRL_DPO + "optim: adamw_of_mine\nsave_total_limit: 0\nseed: ${oc.env:SEED}\nnonsense: 1\nrpo_alpha: 1.0\n"
    found, recipe = converted(text)
    assert recipe.training.optim == "adamw_torch" and recipe.training.seed == 42
    assert found.left["optim"] == "training.optim: TRL knows no 'adamw_of_mine'"
    assert found.left["save_total_limit"] == "training.save_total_limit: input should be greater than 0, got 0"
    assert found.left["seed"] == "training.seed: reads the environment"
    assert found.left["nonsense"] == "alignctl has no such key"
    assert "dpo.loss_weights" in found.left["rpo_alpha"]


def test_keys_that_do_not_go_together_are_refused_by_the_name_of_the_other_recipe(converted: Convert) -> None:
    with pytest.raises(RecipeError, match=r"config.yaml: dpo.loss_weights: must have as many numbers"):
        converted(TRL_DPO.replace("[sigmoid, sft]", "sigmoid"))


def test_lora_keys_without_an_adapter_are_not_used(converted: Convert) -> None:
    found, recipe = converted(HANDBOOK_DPO.replace("use_peft: true", "use_peft: false"), "dpo.yaml")
    assert recipe.lora is None and recipe.quantization is None
    assert found.left["lora_r"] == "no adapter is trained"
    assert found.left["load_in_4bit"] == "4-bit weights cannot be trained without an adapter"
    assert found.left["use_peft"] == "is off"


def test_what_was_left_stands_below_the_recipe(converted: Convert, tmp_path: Path) -> None:
    converted(AXOLOTL_DPO)
    text = (tmp_path / "r.yaml").read_text(encoding="utf-8")
    assert "\n# Not carried over from config.yaml:\n" in text
    assert "\n# lora_modules_to_save: adapters alone are trained\n" in text
    assert "  per_device_train_batch_size: 16  # micro_batch_size\n" in text


ODD = (-1.5, ["a", 1], {"a": {"b": 1}})


@pytest.mark.parametrize("text", [HANDBOOK_DPO, TRL_DPO, AXOLOTL_DPO, FACTORY_DPO])
def test_whatever_stands_behind_a_key_the_recipe_is_one_or_the_refusal_says_why(converted: Convert, text: str) -> None:
    given = yaml.safe_load(text)
    for key in given:
        for odd in ODD:
            try:
                converted(yaml.safe_dump(given | {key: odd}), method="dpo")
            except RecipeError as refused:
                assert all(problem.where.endswith("config.yaml") for problem in refused.problems), (key, odd, refused)
