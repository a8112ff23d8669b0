"""What an adapter changes in its base, weight by weight; the base is never loaded whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, load_peft_weights
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from alignctl.errors import Problem, RecipeError

_PREFIX = "base_model.model."
# What an adapter may train besides low-rank updates of layers; PEFT's own names.
_MORE = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
_OUT = "serve or push the run as an adapter: alignctl serve, alignctl push"


@dataclass(frozen=True)
class Updates:
    """An adapter's layers on a model without weights, and their own weights; both by the layer's name."""

    layers: dict[str, LoraLayer]
    weights: dict[str, dict[str, Tensor]]

    def merged(self, layer: str, weight: Tensor) -> Tensor:
        """`weight` of the base with the adapter's update, in float32, as PEFT computes it for this kind of layer."""
        adapted = self.layers[layer]
        adapted.load_state_dict(self.weights[layer], strict=False, assign=True)
        base = adapted.get_base_layer()
        base.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
        adapted.merge()
        merged: Tensor = base.weight.data
        base.weight = nn.Parameter(torch.empty_like(merged, device="meta"), requires_grad=False)
        return merged


def skeleton(config: PreTrainedConfig, *, trusted: bool) -> PreTrainedModel:
    """A model of `config` whose weights have shapes and no values."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    return model


def updates(folder: Path, config: PreTrainedConfig, *, trusted: bool) -> Updates:
    """The adapter in `folder` for a model of `config`.

    Raises:
        RecipeError: it is more than low-rank updates of layers, or its weights are not those of its layers.
    """
    adapter = LoraConfig.from_pretrained(folder)
    more = [name for name in _MORE if getattr(adapter, name)] + (["bias"] if adapter.bias != "none" else [])
    if more:
        raise RecipeError(Problem(str(folder), f"cannot be merged: it trains {', '.join(more)}, too", _OUT))
    plain = skeleton(config, trusted=trusted)
    tied = {id(plain.get_input_embeddings()), id(plain.get_output_embeddings())} if _is_tied(plain) else set()
    adapted = get_peft_model(plain, adapter, low_cpu_mem_usage=True).get_base_model()
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if id(layer.get_base_layer()) in tied:
            what = f"cannot be merged: {name} is adapted, and its weight is both embedding and head"
            raise RecipeError(Problem(str(folder), what, _OUT))
    weights = _by_layer(_saved(folder))
    _same(layers, weights, folder)
    return Updates(layers, weights)


def _saved(folder: Path) -> dict[str, Tensor]:
    try:
        saved: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except SafetensorError as error:
        what = f"its adapter cannot be read: {error}"
        raise RecipeError(Problem(str(folder), what, "alignctl verify looks at the whole of it")) from error
    return saved


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def _by_layer(saved: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter file's weights by layer, each under the name that it has in the layer."""
    out: dict[str, dict[str, Tensor]] = {}
    for key, weight in saved.items():
        layer, _, name = key.removeprefix(_PREFIX).rpartition(".lora_")
        kind, *rest = f"lora_{name}".split(".")
        if kind == "lora_magnitude_vector":
            rest = ["weight"]
        out.setdefault(layer, {})[".".join([kind, "default", *rest])] = weight.float()
    return out


def _same(layers: dict[str, LoraLayer], weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
    """Refuse an adapter file that holds more or less than its layers have."""
    expected = {
        (layer, name)
        for layer, module in layers.items()
        for name, _ in module.named_parameters()
        if name.split(".")[0] in module.adapter_layer_names
    }
    found = {(layer, name) for layer, part in weights.items() for name in part}
    for missing, what in ((expected - found, "lacks"), (found - expected, "holds, for no layer that is adapted,")):
        if missing:
            first = ".".join(min(missing))
            what = f"cannot be merged: the adapter {what} {first}" + _and_more(len(missing))
            raise RecipeError(Problem(str(folder), what, "alignctl verify says whether it is whole"))


def _and_more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def four_bit(config: PreTrainedConfig, quantization: BitsAndBytesConfig, *, trusted: bool) -> dict[str, bool]:
    """The layers of a model of `config` whose weights are kept in 4 bits; True where they are kept transposed."""
    model = skeleton(config, trusted=trusted)
    before = dict(model.named_modules())
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    after = dict(model.named_modules())
    return {name: isinstance(before[name], Conv1D) for name in before if after[name] is not before[name]}


def rounded(
    weight: Tensor, quantization: BitsAndBytesConfig, precision: torch.dtype, device: torch.device, *, transposed: bool
) -> Tensor:
    """`weight` as a 4-bit layer computes with it: quantised and dequantised as transformers and bitsandbytes do."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    given = weight.to(precision)
    stored = Params4bit(
        (given.T if transposed else given).contiguous(),
        requires_grad=False,
        quant_type=quantization.bnb_4bit_quant_type,
        compress_statistics=quantization.bnb_4bit_use_double_quant,
    ).to(device)
    out: Tensor = dequantize_4bit(stored.data, stored.quant_state).cpu()
    return out.T if transposed else out
