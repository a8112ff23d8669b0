"""A model's `config.json` as the modules that it stands for, with their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from alignctl.errors import Problem, RecipeError

Reads = Literal["hidden", "attention", "mlp"]


@dataclass(frozen=True)
class Family:
    """What `config.json` leaves to the code of an architecture.

    Attributes:
        norm: root mean square, or LayerNorm, which autocast computes in float32 on a GPU.
        norms: of the model's width, in one block.
        head_norms: further ones on queries and keys, of a head's width or of all heads together.
        gated: the MLP is `down(act(gate(x)) * up(x))`, else `down(act(up(x)))`.
        fused: queries, keys and values come out of one layer, and so do gate and up.
        biases: of query, key and value; of attention's output; of the MLP; of the head.
        parallel: attention and MLP read the same normed input, and `norms` counts it once.
        tied: the output head is the input embeddings, where `config.json` does not say.
        names: of the linear layers of a block, where they are not llama's.
    """

    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    head_norms: Literal["", "head", "width"] = ""
    gated: bool = True
    fused: bool = False
    biases: tuple[bool, bool, bool, bool] = (False, False, False, False)
    parallel: bool = False
    tied: bool = False
    names: tuple[str, ...] = ()


_ALL = (True, True, True, False)
_PHI = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "granite": Family(),
    "smollm3": Family(tied=True),
    "qwen2": Family(biases=(True, False, False, False)),
    "qwen3": Family(head_norms="head"),
    "olmo2": Family(head_norms="width"),
    "gemma2": Family(norms=4, tied=True),
    "gemma3_text": Family(norms=4, head_norms="head", tied=True),
    "phi": Family("layer", 1, gated=False, biases=(True, True, True, True), parallel=True, names=_PHI),
    "phi3": Family(fused=True),
    "gpt_neox": Family("layer", 2, gated=False, fused=True, biases=_ALL, names=_NEOX),
}


@dataclass(frozen=True)
class Linear:
    """One linear layer `[rows, columns]` of a block, and what its input is."""

    name: str
    rows: int
    columns: int
    bias: bool
    reads: Reads

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Shape:
    """A causal language model of `layers` equal blocks.

    Attributes:
        model_type: transformers' name of the architecture.
        known: False when the architecture is not in `FAMILIES` and was taken for a llama.
        width: of the residual stream.
        inner: width of the MLP, of one expert where there are several.
        rotary: how much of a head is rotated; below `head_width` the two parts are put together again.
        gelu: the MLP's activation is the tanh approximation of GELU, which keeps more for its backward pass than SiLU.
    """

    model_type: str
    known: bool
    family: Family
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    rotary: int
    vocabulary: int
    tied: bool
    gelu: bool
    experts: int
    active_experts: int

    @property
    def queries(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all keys, and of all values."""
        return self.key_heads * self.head_width

    def linears(self) -> list[Linear]:
        """The linear layers of one block, which all-linear adapts and 4-bit storage packs."""
        first, out, mlp, _ = self.family.biases
        widths = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        if self.family.fused:
            widths = {"qkv_proj": sum(widths.values())}
        found = [Linear(name, rows, self.width, first, "hidden") for name, rows in widths.items()]
        found.append(Linear("o_proj", self.width, self.queries, out, "attention"))
        found += [] if self.experts else self._mlp(mlp)
        names = self.family.names or [each.name for each in found]
        return [replace(each, name=name) for each, name in zip(found, names, strict=True)]

    def _mlp(self, bias: bool) -> list[Linear]:
        widths = {"gate_proj": self.inner, "up_proj": self.inner} if self.family.gated else {"up_proj": self.inner}
        if self.family.fused and self.family.gated:
            widths = {"gate_up_proj": 2 * self.inner}
        into = [Linear(name, rows, self.width, bias, "hidden") for name, rows in widths.items()]
        return [*into, Linear("down_proj", self.width, self.inner, bias, "mlp")]

    def block(self) -> int:
        """Parameters of one block."""
        packed = sum(each.weights + each.bias * each.rows for each in self.linears())
        return packed + self.expert_weights() + self.norm_weights()

    def expert_weights(self) -> int:
        """Of one block: all experts, which are stored as whole tensors and never in 4 bits, and their router."""
        return self.experts * (3 * self.inner * self.width + self.width)

    def norm_weights(self) -> int:
        """Of one block."""
        each = {"": 0, "head": 2 * self.head_width, "width": self.queries + self.keys}[self.family.head_norms]
        return self._norm(self.width) * self.family.norms + each

    def _norm(self, width: int) -> int:
        return width * (2 if self.family.norm == "layer" else 1)

    def embeddings(self) -> int:
        """Parameters of the input embeddings."""
        return self.vocabulary * self.width

    def head(self) -> int:
        """Parameters that the output head has for itself."""
        return 0 if self.tied else self.embeddings() + self.family.biases[3] * self.vocabulary

    def parameters(self) -> int:
        """All of them, as transformers counts them."""
        return self.layers * self.block() + self.embeddings() + self.head() + self._norm(self.width)


def of(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape of the model that `config` describes.

    Raises:
        RecipeError: a size is missing or no number.
    """
    if isinstance(config.get("text_config"), Mapping):  # of a model that also sees
        config = config["text_config"]
    model_type = str(config.get("model_type"))
    known = model_type in FAMILIES
    try:
        return _read(config, model_type, known)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"cannot be read as a language model's: {error}"
        raise RecipeError(Problem(where, what, "give a model with hidden_size, num_hidden_layers, …")) from error


def _read(config: Mapping[str, Any], model_type: str, known: bool) -> Shape:
    family = _with_biases(FAMILIES.get(model_type, FAMILIES["llama"]), config, model_type)
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_width = int(config.get("head_dim") or width // heads)
    rope = config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or config.get("rotary_pct")
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    return Shape(
        model_type=model_type,
        known=known,
        family=family,
        layers=int(config["num_hidden_layers"]),
        width=width,
        inner=int(config["intermediate_size"]),
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads),
        head_width=head_width,
        rotary=int(head_width * float(partial or 1)),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        gelu=str(config.get("hidden_act") or config.get("hidden_activation")) in _GELUS,
        experts=experts,
        active_experts=int(config.get("num_experts_per_tok") or 2) if experts else 0,
    )


_GELUS = ("gelu_new", "gelu_fast")


def _with_biases(family: Family, config: Mapping[str, Any], model_type: str) -> Family:
    """`family` with the biases that `config` switches on or off."""
    first, out, mlp, head = family.biases
    attention = config.get("attention_bias")
    if attention is not None and model_type not in ("qwen2", "phi", "mistral", "mixtral"):  # those do not look at it
        first = out = bool(attention)
    if config.get("mlp_bias") is not None:
        mlp = bool(config["mlp_bias"])
    values = dict(vars(family)) | {"biases": (first, out, mlp, head)}
    return Family(**values)
