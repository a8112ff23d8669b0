"""The values of a new recipe, from what is known of rows, model and machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from alignctl.init.draft import Choice, Draft
from alignctl.init.facts import Memory, Model, Rows, Wanted
from alignctl.init.rates import rate

ADAPTERS = ("auto", "qlora", "lora", "full")
LONG, STEP = 2048, 64
SPARE = 0.03
HALF = 0.5
BATCHES = ((1024, 4), (2048, 2), (math.inf, 1))
UPDATES = ((500, 16), (100, 8), (0, 4))
FRACTIONS = ((2000, 0.05), (200, 0.1), (0, 0.2))


def draft(wanted: Wanted, rows: Rows, model: Model, memory: Memory, chosen: Choice) -> Draft:
    """Every section of the recipe, in the order of docs/recipe.md; `chosen` is what it trains."""
    adapter = chosen.value
    length = max_length(rows, model)
    sections: dict[str, dict[str, Choice]] = {"model": _model(wanted, model)}
    if adapter == "qlora":
        sections["quantization"] = {"load_in_4bit": Choice(True, chosen.why)}
    if adapter != "full":
        sections["lora"] = dict(_LORA)
    sections["data"] = _data(wanted, rows, length)
    sections["training"] = _training(wanted, rows, model, memory, adapter, length.value)
    sections[wanted.method] = _method(wanted, adapter, model)
    return sections


def chosen_adapter(wanted: Wanted, model: Model, memory: Memory) -> Choice:
    """`qlora`, `lora` or `full`, as far as it can be told without a plan."""
    if wanted.adapter != "auto":
        return Choice(wanted.adapter, "as asked for")
    if model.gib is None:
        return Choice("qlora", "the model's size is not known, and 4 bits need the least memory")
    said = f"the weights take {model.gib:.1f} GiB in bfloat16, and {memory.what} has {memory.gib:.1f}"
    if model.gib > HALF * memory.gib:
        return Choice("qlora", f"{said}: 4 bits leave room for what training needs")
    return Choice("lora", f"{said}: no need for 4 bits")


def head(wanted: Wanted, chosen: Choice, output: Path) -> list[str]:
    """The comment above the recipe."""
    return [
        f"{wanted.method.upper()} of {wanted.model}, made by `alignctl init`; docs/init.md says where values are from.",
        f"Trains {_TRAINS[chosen.value]}" + ("." if chosen.value == "qlora" else f": {chosen.why}."),
        f"Run: alignctl {wanted.method} {output}",
    ]


_TRAINS = {"qlora": "adapters on 4-bit weights", "lora": "adapters", "full": "all weights"}


def max_length(rows: Rows, model: Model) -> Choice:
    """Tokens of a row: nearly all rows whole, unless few long ones make every batch expensive."""
    share = 0.99 if rows.percentile(0.99) <= LONG else 0.95
    tokens = max(STEP, math.ceil(rows.percentile(share) / STEP) * STEP)
    how = "have at most" if rows.counted else "have, guessed from their characters, at most"
    why = f"{share:.0%} of the rows {how} {rows.percentile(share):,} tokens; the longest has {rows.tokens[-1]:,}"
    if model.context is not None and tokens > model.context:
        return Choice(model.context, f"the model's context; {rows.over(model.context):.0%} of the rows are longer")
    return Choice(tokens, why)


def _model(wanted: Wanted, model: Model) -> dict[str, Choice]:
    choices = {"name_or_path": Choice(wanted.model, model.size())}
    if model.commit is not None:
        choices["revision"] = Choice(model.commit, "what its main branch is today, so that the run can be repeated")
    choices["chat_template"] = template(wanted, model)
    return choices


def template(wanted: Wanted, model: Model) -> Choice:
    """The chat template's name: the tokenizer's own, or one whose marks the model knows or can spell."""
    if wanted.template is not None:
        return Choice(wanted.template, "as asked for")
    if model.template:
        return Choice("model", "the tokenizer's own")
    if model.template is None:
        return Choice("model", "the tokenizer's own, if it has one: it could not be looked at")
    if model.knows_chatml:
        return Choice("chatml", "the tokenizer has no template of its own, and has ChatML's tokens")
    if model.kind == "phi":
        return Choice("instruct", "the tokenizer has no template of its own; the format of Phi-2's model card")
    return Choice("zephyr", "the tokenizer has no template of its own; this one is made of text that any model knows")


_LORA = {
    "r": Choice(16, "the rank of zephyr-7b-beta's QLoRA recipes"),
    "lora_alpha": Choice(32, "an update is multiplied by lora_alpha / r, here 2"),
    "target_modules": Choice("all-linear", "adapters on every linear layer learn more than on attention alone"),
}


def _data(wanted: Wanted, rows: Rows, length: Choice) -> dict[str, Choice]:
    about = f"{rows.count:,} rows, read as {rows.shape}"
    source = _source(wanted.data, wanted.split)
    if rows.answer is not None:
        source["answer"], about = rows.answer, f"{about}: the chosen answers are trained"
    choices = {"train": Choice([source], about)}
    if wanted.eval_data is not None:
        choices["eval"] = Choice(
            [_source(wanted.eval_data, wanted.eval_split)], "held out; nothing of it is trained on"
        )
    else:
        fraction = next(share for limit, share in FRACTIONS if rows.count >= limit)
        choices["eval_fraction"] = Choice(fraction, "no held-out rows were named: this share of the prompts is")
    return choices | {"max_length": length} | dropped(rows, length.value)


def dropped(rows: Rows, length: int) -> dict[str, Choice]:
    """`max_dropped`, where more of the rows are beyond `length` than the recipe allows without it."""
    over = rows.over(length)
    if over + SPARE <= 0.05:
        return {}
    share = min(1.0, math.ceil((over + SPARE) * 100) / 100)
    return {"max_dropped": Choice(share, f"{over:.1%} of the rows are longer than max_length, and are dropped")}


def _source(path: str, split: str) -> dict[str, Any]:
    """A source; a file has no splits, and `train` is the default."""
    plain = split == "train" or Path(path).suffix != ""
    return {"path": path} if plain else {"path": path, "split": split}


def _training(wanted: Wanted, rows: Rows, model: Model, memory: Memory, adapter: str, length: int) -> dict[str, Choice]:
    found = rate(wanted.method, adapter=adapter != "full", parameters=model.parameters)
    update = next(size for limit, size in UPDATES if rows.count >= limit)
    batch = min(update, next(size for limit, size in BATCHES if length <= limit))
    epochs, why_epochs = _epochs(wanted.method, rows.count)
    choices = {
        "learning_rate": Choice(found.learning_rate, found.why),
        "num_train_epochs": Choice(epochs, why_epochs),
        "per_device_train_batch_size": Choice(batch, f"rows of up to {length} tokens in one forward pass"),
        "gradient_accumulation_steps": Choice(update // batch, f"{update} rows an update, of {rows.count:,}"),
        "lr_scheduler_type": Choice("cosine", "as in zephyr-7b-beta's recipes"),
        "warmup_ratio": Choice(0.1, "as in zephyr-7b-beta's recipes"),
    }
    if adapter == "qlora" and memory.gpu:
        choices["optim"] = Choice("paged_adamw_8bit", "its states leave the GPU when memory is short")
    return choices


def _epochs(method: str, rows: int) -> tuple[int, str]:
    if method == "orpo" and rows < 10_000:
        return 3, "as mistral-capybara's ORPO on 7 thousand rows"
    if method == "sft" and rows < 1000:
        return 3, "few rows: one pass is few updates"
    return 1, "as zephyr-7b-beta; more passes learn rows by heart"


def _method(wanted: Wanted, adapter: str, model: Model) -> dict[str, Choice]:
    found = rate(wanted.method, adapter=adapter != "full", parameters=model.parameters)
    return {} if found.beta is None else {"beta": Choice(found.beta, found.why_beta)}
