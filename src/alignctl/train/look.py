"""A look at what a new recipe is for: the model's config and tokenizer, the rows, and the memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from alignctl import formats
from alignctl.errors import MachineError
from alignctl.formats import RowError
from alignctl.init import facts
from alignctl.init.facts import Memory, Model, Rows, Wanted
from alignctl.recipe.schema import Recipe
from alignctl.train import data, lengths, machine, sources
from alignctl.train.encode import shaped
from alignctl.train.tokenizer import load_encoder, load_tokenizer, model_path
from alignctl.train.tokens import Encoder
from alignctl.train.translate import refused, translated

SAMPLE = 2000
FIRST = 20
CHARACTERS = 3  # of a token, on the careful side
_UNBOUNDED = 10**6


def recipe(wanted: Wanted, template: str, answer: str | None = None) -> Recipe:
    """The least recipe that reads what is `wanted`."""
    source = {"path": wanted.data, "split": wanted.split, "take": SAMPLE, "answer": answer}
    return Recipe.model_validate(
        {
            "model": {"name_or_path": wanted.model, "chat_template": template},
            "data": {"train": [source], "max_length": _UNBOUNDED},
            "training": {"learning_rate": 1.0},
            wanted.method: {},
        }
    )


def model(wanted: Wanted, note: Callable[[str], None]) -> Model:
    """The model, as far as its config and tokenizer can be had; what cannot is noted."""
    asked = recipe(wanted, "model")
    try:
        with translated(), refused():
            path, revision = model_path(asked)
            config = AutoConfig.from_pretrained(path, revision=revision)
            tokenizer = load_tokenizer(asked)
            parameters = _parameters(config)
    except MachineError as error:
        note(f"the model cannot be looked at: {error.problems[0].what}")
        return Model(parameters=facts.by_name(wanted.model), counted=False)
    words = tokenizer.get_vocab()
    return Model(
        parameters=parameters,
        context=getattr(config, "max_position_embeddings", None),
        template=bool(tokenizer.chat_template),
        knows_chatml="<|im_start|>" in words and "<|im_end|>" in words,
        kind=config.model_type,
        commit=getattr(config, "_commit_hash", None),
    )


def _parameters(config: PreTrainedConfig) -> int:
    """The parameters of a model of `config`, counted without their memory."""
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def rows(wanted: Wanted, template: str, *, tokenizer: bool) -> Rows:
    """The rows' number and shape, and the lengths of the first of them; without a tokenizer these are guessed.

    Raises:
        AlignctlError: the rows cannot be read.
    """
    asked = recipe(wanted, template, _answer(recipe(wanted, template)))
    if not tokenizer:
        return _guessed(asked)
    with translated(), refused():
        encoder = load_encoder(asked)
    return _counted(asked, encoder)


def _answer(asked: Recipe) -> str | None:
    """`chosen` where SFT is asked for on a preference set."""
    if asked.method != "sft":
        return None
    first = [raw.values for raw in islice(sources.read(asked.data.train[0]), FIRST)]
    for preference in (False, True):
        with contextlib.suppress(RowError):
            formats.detect(first, preference=preference)
            return "chosen" if preference else None
    return None


def _counted(asked: Recipe, encoder: Encoder) -> Rows:
    found, _ = data.read(asked, encoder)
    if not len(found):
        data.check_lost(asked, found, None)
    tokens = {name: found.lengths(name) for name in found.id_columns}
    longest = (
        tokens["prompt_ids"] + tokens["chosen_ids"].clip(tokens["rejected_ids"])
        if "prompt_ids" in tokens
        else tokens[found.id_columns[0]]
    )
    count, shape = _count(asked), found.sources[0].shape.what
    planned = replace(lengths.of(asked, found), count=count)
    return Rows(count, shape, tuple(sorted(longest.tolist())), answer=_side(asked), lengths=planned)


def _guessed(asked: Recipe) -> Rows:
    source = asked.data.train[0]
    shape, given, _ = shaped(source, asked.method, sources.read(source))
    tokens = []
    for raw in islice(given, SAMPLE):
        try:
            tokens.append(_characters(formats.read(shape, raw.values)) // CHARACTERS)
        except (RowError, formats.Dropped):
            continue
    return Rows(_count(asked), shape.what, tuple(sorted(tokens)) or (0,), counted=False, answer=_side(asked))


def _side(asked: Recipe) -> str | None:
    return asked.data.train[0].answer


def _characters(row: formats.Canonical) -> int:
    """Characters of a canonical row: all of it, of two or more answers the longest."""
    if "text" in row:
        return len(row["text"])
    sides = [row["messages"]] if "messages" in row else [row.get(side, []) for side in ("chosen", "rejected")]
    sides = [[answer] for answer in row["answers"]] if "answers" in row else sides
    return _length(row.get("prompt", [])) + max(map(_length, sides))


def _length(turns: list[Any]) -> int:
    return sum(len(turn["content"]) for turn in turns)


def _count(asked: Recipe) -> int:
    """All rows of the source, not those of the sample alone."""
    whole = asked.data.train[0].model_copy(update={"take": None})
    return sum(1 for _ in sources.read(whole))


def memory() -> Memory:
    """What this machine has to train in."""
    here = machine.detect()
    if here.kind == "cuda":
        return Memory(torch.cuda.mem_get_info(0)[1] / machine.GIB, here.name, gpu=True)
    return Memory(machine.host_memory_gib(), "this machine (it has no GPU)", gpu=False)
