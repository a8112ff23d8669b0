"""A run's adapter merged into its base: the adapted model to rounding, or nothing at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alignctl.errors import AlignctlError, MachineError, RecipeError, VerifyError
from alignctl.proof import merge, trained
from alignctl.proof.agreement import Agreement
from alignctl.proof.updates import Updates
from alignctl.train.display import Display

IDS = torch.tensor([[5, 9, 12, 40, 41, 7]])
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
Here = Callable[..., subprocess.CompletedProcess[str]]
Craft = Callable[..., Path]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def plain(folder: Path, **given: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **given}).eval()


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    change(values)
    write = json.dumps if file.suffix == ".json" else yaml.safe_dump
    file.write_text(write(values), encoding="utf-8")


@pytest.fixture
def craft(finished: Callable[..., Path], workshop: Path, tmp_path: Path) -> Craft:
    """A finished run in whose place a random adapter stands, which changes much; on another base where one is given."""

    def make(base: Path = workshop / "base", quantized: bool = False, **lora: Any) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(finished("dpo"), folder)
        torch.manual_seed(0)
        shape = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False, **lora}
        model = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", **shape))
        for name, weight in model.named_parameters():
            if "magnitude" in name:
                weight.data *= 1.3
        model.save_pretrained(folder / "model")
        section = NF4 | {"bnb_4bit_compute_dtype": "float32"} if quantized else None
        changes = {"model": {"name_or_path": str(base), "dtype": "float32"}, "quantization": section}
        rewritten(folder / "recipe.yaml", lambda values: values.update(changes))
        rewritten(folder / "run.json", lambda values: values["model"].update(base_fingerprint=None))
        return folder

    return make


def merged(run: Path, out: Path, size: int | str = "2GB", **given: Any) -> Agreement:
    asked = {"onto": None, "dtype": None, "max_kl": None, **given}
    display = Display(open(os.devnull, "w"))  # noqa: SIM115, PTH123 (it ends with the test)
    return merge.merge(merge.wanted(trained.opened(run), out, **asked), display, size)


def refused(run: Path, out: Path, kind: type[AlignctlError], what: str, **given: Any) -> None:
    """`run` is not merged for the reason `what`, and nothing is left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind, match=what):
        merged(run, out, **given)
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_the_merged_model_is_the_adapted_one(craft: Craft, workshop: Path, tmp_path: Path, lora: dict) -> None:
    run = craft(**lora)
    found = merged(run, tmp_path / "out")
    base = plain(workshop / "base")
    before = logits(base)
    live = logits(PeftModel.from_pretrained(base, run / "model").eval())
    after = logits(plain(tmp_path / "out", dtype="auto"))
    assert (live - before).abs().max() > 0.1
    assert torch.allclose(after, live, atol=2e-5)
    assert found.kl < 1e-8 and found.top1 == 1 and found.base_kl > 1e-3 and found.rows == 8


def test_a_run_that_went_on_from_an_adapter_is_merged_with_it(
    finished: Callable[..., Path], workshop: Path, tmp_path: Path
) -> None:
    parent = finished("sft")
    run = finished("dpo", lora=None, model={"adapter": str(parent)})
    merged(run, tmp_path / "out")
    base = plain(workshop / "base")
    live = logits(PeftModel.from_pretrained(base, run / "model").eval())
    assert torch.allclose(logits(plain(tmp_path / "out")), live, atol=2e-5)


def test_an_adapter_of_rounded_weights_is_merged_onto_them(craft: Craft, tmp_path: Path) -> None:
    run = craft(quantized=True)
    found = merged(run, tmp_path / "out")
    live = logits(trained.opened(run).load().tuned)
    assert torch.allclose(logits(plain(tmp_path / "out")), live, atol=1e-4)
    other = merged(run, tmp_path / "original", onto="original", max_kl=10)
    assert other.kl > 100 * found.kl
    assert json.loads((tmp_path / "out" / "alignctl.json").read_text(encoding="utf-8"))["onto"] == "dequantized"


def test_rounding_to_bfloat16_is_no_reason_to_refuse(craft: Craft, tmp_path: Path) -> None:
    found = merged(craft(), tmp_path / "out", dtype="bfloat16")
    assert 0 < found.kl < 1e-3
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert plain(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_files_are_as_large_as_allowed(craft: Craft, tmp_path: Path) -> None:
    run = craft()
    merged(run, tmp_path / "whole")
    merged(run, tmp_path / "out", size=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        assert sum(w.nbytes for w in load_file(file).values()) <= 100_000 or len(load_file(file)) == 1
    assert torch.equal(logits(plain(tmp_path / "out")), logits(plain(tmp_path / "whole")))


def test_an_empty_folder_is_filled(craft: Craft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = craft()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    merged(run, Path())
    assert (tmp_path / "out" / "model.safetensors").is_file() and not list(tmp_path.glob("*.writing"))


def test_tied_embeddings_stay_tied(craft: Craft, workshop: Path, tmp_path: Path) -> None:
    base = tied(workshop, tmp_path)
    merged(craft(base), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = plain(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def tied(workshop: Path, tmp_path: Path) -> Path:
    """The tiny model with its embedding as its head."""
    base = tmp_path / "tied"
    model = plain(workshop / "base")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(workshop / "base").save_pretrained(base)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    return base


# --- faults -------------------------------------------------------------------------------------------------------


def test_a_wrong_scaling_is_refused(craft: Craft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Updates.merged
    monkeypatch.setattr(Updates, "merged", lambda self, at, weight: 2 * right(self, at, weight) - weight.float())
    refused(craft(), tmp_path / "out", VerifyError, "is not the adapted one: KL")


def test_a_skipped_layer_is_refused(craft: Craft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Updates.merged
    skipped = "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(
        Updates, "merged", lambda self, at, weight: weight if at == skipped else right(self, at, weight)
    )
    refused(craft(), tmp_path / "out", VerifyError, "is not the adapted one: KL")


def test_a_limit_that_is_raised_lets_it_pass(craft: Craft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Updates, "merged", lambda self, at, weight: weight)
    found = merged(craft(), tmp_path / "out", max_kl=100)
    assert found.kl == pytest.approx(found.base_kl, rel=1e-3)


# --- what cannot be merged ----------------------------------------------------------------------------------------


def test_a_run_of_all_weights_has_nothing_to_merge(finished: Callable[..., Path], tmp_path: Path) -> None:
    refused(finished("orpo", lora=None), tmp_path / "out", RecipeError, "nothing to merge — .*model is the whole")


def test_a_folder_that_holds_something_stays(craft: Craft, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(craft(), tmp_path / "out", RecipeError, "exists and is not empty")


def test_nothing_is_dequantised_that_was_not_quantised(craft: Craft, tmp_path: Path) -> None:
    refused(craft(), tmp_path / "out", RecipeError, "kept no weights in 4 bits", onto="dequantized")


def test_a_run_that_failed_is_not_merged(craft: Craft, tmp_path: Path) -> None:
    run = craft()
    rewritten(run / "run.json", lambda values: values.update(status="failed"))
    refused(run, tmp_path / "out", RecipeError, r"is not finished \(status: failed\)")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapted_weight_that_is_embedding_and_head_is_refused(
    craft: Craft, workshop: Path, tmp_path: Path, target: str
) -> None:
    run = craft(tied(workshop, tmp_path), target_modules=["q_proj", target], ensure_weight_tying=False)
    refused(run, tmp_path / "out", RecipeError, f"{target} is adapted, and its weight is both embedding and head")


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}, {"lora_bias": True}, {"bias": "all"}]
)
def test_an_adapter_that_trains_more_is_refused(craft: Craft, tmp_path: Path, more: dict) -> None:
    refused(craft(target_modules=["q_proj"], **more), tmp_path / "out", RecipeError, f"it trains {next(iter(more))}")


def test_an_adapter_that_lacks_a_layer_is_refused(craft: Craft, tmp_path: Path) -> None:
    run = craft()
    file = run / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if "layers.1.mlp.up_proj.lora_B" in name)
    save_file({name: weight for name, weight in weights.items() if name != gone}, file)
    refused(run, tmp_path / "out", RecipeError, r"the adapter lacks model.layers.1.mlp.up_proj.lora_B")


def test_an_adapter_that_is_cut_off_is_refused(craft: Craft, tmp_path: Path) -> None:
    run = craft()
    file = run / "model" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(run, tmp_path / "out", RecipeError, "its adapter cannot be read")


def test_a_weight_that_the_base_does_not_have_is_named(craft: Craft, workshop: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(workshop / "base", base)
    weights = load_file(base / "model.safetensors")
    run = craft(base)
    weights["model.layers.0.mlp.up.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(run, tmp_path / "out", RecipeError, r"no weight model.layers.0.mlp.up_proj.weight for the adapter")


def test_a_full_disk_is_known_before(craft: Craft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = craft()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(run, tmp_path / "out", MachineError, "free space, or name a folder on another disk")


# --- the command --------------------------------------------------------------------------------------------------

USE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, expected = sys.argv[1], sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
chat = [{"role": "user", "content": "Say tea."}]
given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
assert "<|im_start|>assistant" in tokenizer.decode(given["input_ids"][0])
assert str(model.generation_config.eos_token_id) == expected, model.generation_config.eos_token_id
assert "alignctl" not in sys.modules
print(model.generate(**given, max_new_tokens=3, do_sample=False).shape[1] - given["input_ids"].shape[1])
"""


def test_the_command_makes_a_model_for_plain_transformers(craft: Craft, here: Here, tmp_path: Path) -> None:
    run, out = craft(), tmp_path / "out"
    done = here("merge", str(run), str(out))
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "merging 14 weights" in printed and "the same best token in 100.0% of 40 tokens of 8 rows" in printed
    stops = json.loads((run / "model" / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", USE, str(out), str(stops)]
    used = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip() in "123"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card and "merged into the original base weights, in float32" in card


def test_rows_that_are_gone_are_replaced_by_those_in_the_run(craft: Craft, tmp_path: Path) -> None:
    run = craft()
    rewritten(run / "recipe.yaml", lambda values: values["data"].update(train=[{"path": "gone.jsonl"}], eval=None))
    found = merged(run, tmp_path / "out")
    note = json.loads((tmp_path / "out" / "alignctl.json").read_text(encoding="utf-8"))
    assert found.rows == 4 and "cannot be read any more" in note["compared_on"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--onto", "rounded"), "--onto: knows no 'rounded' — one of original, dequantized"),
        (("--dtype", "int8"), "--dtype: knows no 'int8' — one of bfloat16, float16, float32"),
        (("--max-kl", "-1"), "--max-kl: -1.0 nats are no limit — a number above 0"),
    ],
)
def test_options_are_checked(here: Here, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = here("merge", str(tmp_path), str(tmp_path / "out"), *options)
    assert done.returncode == 2
    assert said in done.stderr
