"""The tokenizer with its template, the base model, and the adapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.recipe.schema import Recipe
from alignctl.train import needs
from alignctl.train.machine import Machine
from alignctl.train.tokenizer import model_path
from alignctl.train.tokens import Encoder

_UNSAFE = "model.use_safetensors=false, if you trust where it is from"


def quantization(recipe: Recipe, precision: torch.dtype, machine: Machine) -> BitsAndBytesConfig | None:
    """The 4-bit config, or None.

    Raises:
        MachineError: bitsandbytes is not installed.
    """
    section = recipe.quantization
    if section is None:
        return None
    if missing := needs.bitsandbytes():
        raise MachineError(missing)
    compute = section.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=precision if compute == "auto" else machine.precision(compute),
    )


def load_base(recipe: Recipe, precision: torch.dtype, machine: Machine) -> PreTrainedModel:
    """The base model on its device: frozen weights in `precision` or 4 bits, weights to be trained in float32.

    Raises:
        RecipeError: it is an adapter or holds one, or its weights are in a pickle file.
    """
    path, revision = model_path(recipe)
    attention = recipe.model.attn_implementation
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        config=_config(recipe, path, revision),
        revision=revision,
        dtype=precision if recipe.trains_adapter else torch.float32,
        quantization_config=quantization(recipe, precision, machine),
        attn_implementation=None if attention == "auto" else attention,
        use_safetensors=recipe.model.use_safetensors or None,
        trust_remote_code=recipe.model.trust_remote_code,
        device_map={"": machine.device},
    )
    model.config.use_cache = False
    if recipe.quantization is not None:
        _keep_trainable_layout(model)
    return model


def _config(recipe: Recipe, path: str, revision: str | None) -> PreTrainedConfig:
    """The base model's config, which decides what is loaded with it.

    Raises:
        RecipeError: an adapter would be loaded too, or a pickle file that the config names.
    """
    if find_adapter_config_file(path, revision=revision) is not None:
        what, way_out = f"{path} is an adapter, or holds one", "name it in model.adapter, and here what it belongs to"
        raise RecipeError(Problem("model.name_or_path", what, way_out))
    trusted = recipe.model.trust_remote_code
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusted)
    weights = config.to_dict().get("transformers_weights")
    if recipe.model.use_safetensors and weights is not None and not str(weights).endswith((".safetensors", ".json")):
        what = f"its weights are in {weights}, and a pickle file can run code when it is loaded"
        raise RecipeError(Problem("model.name_or_path", what, _UNSAFE))
    return config


def _keep_trainable_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU at the first evaluation.

    The repacked layout has a kernel without a backward pass, and training goes on with it: gradients end at the last
    4-bit layer, without an error. To go when bitsandbytes unpacks in training, or differentiates the kernel.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def align_generation(model: PreTrainedModel, encoder: Encoder) -> None:
    """Make generation stop on, and pad with, the tokens that training uses."""
    model.generation_config.eos_token_id = list(encoder.stop_ids)
    model.generation_config.pad_token_id = encoder.tokenizer.pad_token_id
    model.config.pad_token_id = encoder.tokenizer.pad_token_id


def lora_config(recipe: Recipe) -> LoraConfig | None:
    """PEFT's config for a fresh adapter, or None."""
    if recipe.lora is None or recipe.model.adapter is not None:
        return None
    given = recipe.lora.target_modules
    if isinstance(given, str) and given != "all-linear" and given.isidentifier():
        what = f"{given} as a text is a pattern for whole names of layers, and matches none"
        raise RecipeError(Problem("lora.target_modules", what, f"[{given}]"))
    return LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump())


def adapter_folder(recipe: Recipe) -> Path | None:
    """The folder of `model.adapter`: a run's `model/`, or an adapter folder itself.

    Raises:
        RecipeError: it is not there, not an adapter, or not the one that the `lora:` section describes.
    """
    if recipe.model.adapter is None:
        return None
    given = Path(recipe.model.adapter).expanduser()
    folder = next((p for p in (given / "model", given) if (p / "adapter_config.json").is_file()), None)
    if folder is None:
        weights = next((p for p in (given / "model", given) if (p / "config.json").is_file()), None)
        way_out = f"model.name_or_path: {weights} (all weights were trained there)" if weights else "train it first"
        raise RecipeError(Problem("model.adapter", f"no adapter in {given}", way_out))
    if recipe.model.use_safetensors and not (folder / "adapter_model.safetensors").is_file():
        what = f"{folder} holds no adapter_model.safetensors, and a pickle file can run code when it is loaded"
        raise RecipeError(Problem("model.adapter", what, _UNSAFE))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":  # others load weights of their own, from wherever their config says
        what = f"{folder} is an adapter of the kind {config.get('peft_type')}"
        raise RecipeError(Problem("model.adapter", what, "give one of the kind LORA"))
    _same_shape(recipe, config, folder)
    return folder


def _same_shape(recipe: Recipe, config: dict[str, Any], folder: Path) -> None:
    if recipe.lora is None:
        return
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        wanted, found = getattr(recipe.lora, key), config.get(key)
        if wanted != found:
            raise RecipeError(
                Problem(
                    f"lora.{key}",
                    f"is {wanted}, but the adapter in {folder} has {found}",
                    "an adapter keeps its shape; take the `lora:` section away",
                )
            )


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`base` with the adapter in `folder`, trainable."""
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def name_base(model: PeftModel, recipe: Recipe) -> None:
    """Let the adapter's config name the base that it is on, by which others load it.

    PEFT keeps what an adapter said of the base that it was on before, and never writes the revision.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = model_path(recipe)


def fingerprint(model: torch.nn.Module, without: str | None = None) -> str:
    """SHA-256 over every parameter's name, shape, dtype and 64 of its values, evenly spaced.

    Parameters whose name holds `without` are left out.
    """
    return _digest({name: p for name, p in model.named_parameters() if without is None or without not in name})


def base_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """`fingerprint` of the weights below any adapter, the same with and without one."""
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    plain = {name.replace(".base_layer", ""): p for name, p in owner.named_parameters() if "lora_" not in name}
    return _digest(plain)


def trained_fingerprint(model: torch.nn.Module) -> str:
    """`fingerprint` of what is trained."""
    return _digest({name: p for name, p in model.named_parameters() if p.requires_grad})


def _digest(parameters: dict[str, torch.nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        values = parameter.detach().reshape(-1)
        step = max(1, values.numel() // 64)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values[::step][:64].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def storage(recipe: Recipe, precision: torch.dtype) -> str:
    """How the base's weights are kept, in a word."""
    if recipe.quantization is not None:
        return recipe.quantization.bnb_4bit_quant_type
    return "float32" if not recipe.trains_adapter else str(precision).removeprefix("torch.")
