"""A recipe of another tool as one of ours: key by key what was carried over, and what was not and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from alignctl.errors import Problem, RecipeError
from alignctl.init import dialects, sets
from alignctl.init.draft import Choice, Draft, shown
from alignctl.recipe import tree
from alignctl.recipe.foreign import FOREIGN, OWNED
from alignctl.recipe.load import Loaded, load, trl_arguments
from alignctl.recipe.schema import METHODS, SECTIONS

DIALECTS = tuple(dialects.OWN)
_COMPUTE = ("bf16", "fp16", "bfloat16", "float16")  # what is computed in counts, before what is loaded in
_KEY = re.compile(r"([a-z]+\.\w+)(?:: ([\w-]+))?")
_NAMES = {"alpaca": "alpaca", "chatml": "chatml", "zephyr": "zephyr", "mistral": "mistral-instruct"}
_ORDER = ("model", "quantization", "lora", "data", "training", *METHODS, "logging", "trl")
_HERE = [name for name in SECTIONS if name not in ("gates", "evaluation", "logging", *METHODS)]


@dataclass
class Conversion:
    """What becomes of a recipe: `carried` and `left` have its keys in their order."""

    dialect: str
    method: str
    draft: Draft = field(default_factory=dict)
    carried: list[tuple[str, str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    template: str | None = None

    def put(self, dotted: str, value: Any, key: str, why: str = "") -> None:
        """Carry `key` over as `dotted`, where that takes the value and has none yet."""
        section, _, name = dotted.partition(".")
        if section in METHODS and section != self.method and name in SECTIONS[self.method].model_fields:
            section = self.method  # a beta is a beta
        refused = "reads the environment" if "${" in str(value) else _refusal(section, name, value)
        already = self.draft.get(section, {}).get(name)
        if section in METHODS and section != self.method:
            self.left[key] = f"{dotted} is not for {self.method}"
        elif refused:
            self.left[key] = f"{section}.{name}: {refused}"
        elif already is not None and already.value != value:
            self.left[key] = f"{section}.{name} is {shown(already.value)} already"
        else:
            self.draft.setdefault(section, {})[name] = already or Choice(value, why or ("" if key == name else key))
            self.carried.append((key, f"{section}.{name}: {shown(value)}{f' ({why})' if why else ''}"))

    def drop_section(self, section: str, why: str) -> None:
        """What was carried into `section` is not used."""
        for key, what in [each for each in self.carried if each[1].startswith(f"{section}.")]:
            self.carried.remove((key, what))
            self.left[key] = why
        self.draft.pop(section, None)

    def head(self, file: Path, output: Path) -> list[str]:
        """The comment above the recipe."""
        return [
            f"{file.name} of {self.dialect}, carried over by `alignctl init --from`; a comment names the key there.",
            f"Run: alignctl {self.method} {output}",
        ]

    def tail(self, file: Path) -> list[str]:
        """The comment below it: what was not carried over."""
        lines = [f"{key}: {why}" for key, why in self.left.items()]
        return ["", f"Not carried over from {file.name}:", *lines] if lines else []


def convert(file: Path, dialect: str | None, method: str | None) -> Conversion:
    """The recipe in `file`, which is of `dialect` and trains by `method` where these are given.

    Raises:
        RecipeError: the file cannot be read, or has no model or rows, or it cannot be told what it is.
    """
    if not file.is_file():
        raise RecipeError(Problem(str(file), "no such file", "--from CONFIG names a recipe of another tool"))
    read = tree.read(file)
    if read.problems:
        raise RecipeError(*read.problems)
    values = {key: value for key, value in read.values.items() if value is not None}
    dialect = dialect or dialects.detect(values, file)
    found = Conversion(dialect, method or dialects.method(dialect, values, file))
    done = _rows(found, values, file)
    for key in sorted(values, key=lambda name: name not in _COMPUTE):
        if key not in done:
            _key(found, key, values[key])
    _adapter(found, values)
    _settle(found, values)
    required = {"model": "name_or_path", "data": "train"}
    missing = [f"{section}.{key}" for section, key in required.items() if key not in found.draft.get(section, {})]
    if missing:
        what = f"says nothing that could be {' or '.join(missing)} here"
        about = [Problem(str(file), f"{key}: {why}") for key, why in found.left.items() if why.startswith((*missing,))]
        raise RecipeError(Problem(str(file), what, "is it a recipe for training?"), *about)
    found.draft = {section: _sorted(section, found.draft[section]) for section in _ORDER if section in found.draft}
    found.carried.sort(key=lambda each: list(values).index(each[0]) if each[0] in values else len(values))
    return found


def accepted(written: Path, method: str, file: Path) -> Loaded:
    """The recipe that was written from `file`.

    Raises:
        RecipeError: two keys that were carried over do not go together.
    """
    try:
        return load(written, method=method)
    except RecipeError as error:
        raise RecipeError(*(Problem(str(file), each.what, each.way_out) for each in error.problems)) from error


def _sorted(section: str, choices: dict[str, Choice]) -> dict[str, Choice]:
    order = list(SECTIONS[section].model_fields) if section in SECTIONS else list(choices)
    return {name: choices[name] for name in order if name in choices}


def _rows(found: Conversion, values: dict[str, Any], file: Path) -> set[str]:
    """The data sets; returns the keys that speak of them."""
    given = sets.find(found.dialect, values, file)
    notes = "; ".join(given.notes)
    if given.train:
        found.put("data.train", given.train, given.key, notes)
    if given.eval:
        found.put("data.eval", given.eval, given.key)
    found.left |= given.left
    if given.fraction is not None:
        found.put("data.eval_fraction", given.fraction, given.key)
    others = [key for key in values if key in given.keys and key != given.key]
    found.carried += [(key, "the sources of data.train and data.eval") for key in others]
    return given.keys


def _key(found: Conversion, key: str, value: Any) -> None:
    """Carry one key over, by its own rule, by the table of foreign names, or because it has the same name here."""
    special = _SPECIAL.get(key)
    answer = FOREIGN.get(key, "")
    direct = _KEY.fullmatch(answer)
    homes = [f"{name}.{key}" for name in (*_HERE, found.method) if key in SECTIONS[name].model_fields]
    if special is not None:
        special(found, key, value)
    elif direct and direct[2] is None:
        found.put(direct[1], value, key)
    elif direct and value is not False:
        found.put(direct[1], tree.scalar(direct[2]), key)
    elif answer and value is False:
        found.left[key] = "is off"
    elif answer:
        found.left[key] = answer.removeprefix("nothing; ") if answer.startswith("nothing; ") else f"here it is {answer}"
    elif homes:
        found.put(homes[0], value, key)
    elif key in OWNED:
        found.left[key] = OWNED[key].removeprefix("nothing; ")
    elif key in trl_arguments()[found.method] and isinstance(value, bool | int | float | str):
        found.put(f"trl.{key}", value, key)
    else:
        found.left[key] = "alignctl has no such key"


def _refusal(section: str, name: str, value: Any) -> str:
    """Why a key of ours does not take `value`; empty when it does."""
    if section == "trl":
        return ""
    if name in ("optim", "lr_scheduler_type") and value not in trl_arguments()[name]:
        return f"TRL knows no {value!r}"
    info = SECTIONS[section].model_fields[name]
    taken: Any = Annotated[info.annotation, info]
    try:
        TypeAdapter(taken, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        return f"{said[0].lower()}{said[1:]}, got {value!r:.60}"
    return ""


def _adapter(found: Conversion, values: dict[str, Any]) -> None:
    """The sections `lora` and `quantization`, which stand for what they are switched on by."""
    adapter = dialects.trains_adapter(found.dialect, values)
    if not adapter:
        found.drop_section("lora", "no adapter is trained")
    if not dialects.four_bits(found.dialect, values):
        found.drop_section("quantization", "the weights are not stored in 4 bits")
    elif adapter:
        key = "quantization_bit" if found.dialect == "llamafactory" else "load_in_4bit"
        found.draft.setdefault("quantization", {}).setdefault("load_in_4bit", Choice(True, key))
    else:
        found.drop_section("quantization", "4-bit weights cannot be trained without an adapter")
    if adapter:
        found.draft.setdefault("lora", {})
        why = f"not given there: alignctl's own, where {found.dialect} asks PEFT or the model"
        found.draft["lora"].setdefault("target_modules", Choice("all-linear", why))
    if found.dialect == "llamafactory" and adapter and "lora_alpha" not in found.draft["lora"]:
        rank = found.draft["lora"].get("r", Choice(8)).value
        found.draft["lora"]["lora_alpha"] = Choice(2 * rank, f"{found.dialect}'s default, twice the rank")


def _settle(found: Conversion, values: dict[str, Any]) -> None:
    """The method's section, the defaults of the other tool, and pairs of keys of which we take one."""
    found.draft.setdefault(found.method, {})
    loss = dialects.loss(found.dialect, values)
    if loss and found.method == "dpo":
        found.draft["dpo"].setdefault("loss_type", Choice(loss, "rl" if found.dialect == "axolotl" else "pref_loss"))
    for dotted, value in dialects.defaults(found.dialect, found.method).items():
        section, _, name = dotted.partition(".")
        if section in found.draft or section == "training":
            choices = found.draft.setdefault(section, {})
            choices.setdefault(name, Choice(value, f"{found.dialect}'s default"))
    training, data = found.draft["training"], found.draft.get("data", {})
    if "warmup_steps" in training and "warmup_ratio" in training:
        loser = "warmup_ratio" if training["warmup_steps"].value else "warmup_steps"
        _take_away(found, "training", loser, "the other one of warmup_steps and warmup_ratio counts")
    if "eval" in data and "eval_fraction" in data:
        _take_away(found, "data", "eval_fraction", "held-out rows are named")
    if "learning_rate" not in training:
        training["learning_rate"] = Choice(2e-4, "not given there; alignctl's choice")


def _take_away(found: Conversion, section: str, name: str, why: str) -> None:
    found.draft[section].pop(name)
    for key, what in [each for each in found.carried if each[1].startswith(f"{section}.{name}:")]:
        found.carried.remove((key, what))
        found.left[key] = why


def _steps(target: str) -> Callable[[Conversion, str, Any], None]:
    """A strategy: `steps` is what we do with `target`, the rest there is not."""

    def carry(found: Conversion, key: str, value: Any) -> None:
        if value in ("no", False):
            found.left[key] = "is off"
        elif value in ("steps", True):
            found.left[key] = f"{target} alone counts here"
        else:
            found.left[key] = f"{value!r:.40} is no step: {target} is a number of steps here"

    return carry


def _template(found: Conversion, key: str, value: Any) -> None:
    """A template by its name at the other tool, or as Jinja text, which gets a file of its own."""
    if isinstance(value, str) and "{%" in value:
        found.put("model.chat_template", "recipe.jinja", key, "as a file of its own")
        found.template = value
    elif isinstance(value, str) and value in _NAMES:
        found.put("model.chat_template", _NAMES[value], key)
    elif value == "tokenizer_default" or found.dialect == "llamafactory":
        found.put("model.chat_template", "model", key, f"{value}: the tokenizer's own")
    elif isinstance(value, str) and value.endswith(".jinja") and Path(value).is_file():
        found.put("model.chat_template", str(Path(value).resolve()), key)
    else:
        found.left[key] = (
            f"no template here is called {value!r:.40}; alignctl takes the tokenizer's own, or a .jinja file"
        )


def _tracker(found: Conversion, key: str, value: Any) -> None:
    given = value if isinstance(value, list) else [value]
    found.put("logging.report_to", given[0] if given else "none", key)
    if len(given) > 1:
        found.left[f"{key}[1:]"] = "a run has one tracker"


def _targets(found: Conversion, key: str, value: Any) -> None:
    if value in ("all", ["all"], "all-linear"):
        found.put("lora.target_modules", "all-linear", key)
    elif isinstance(value, str):
        found.put("lora.target_modules", [name.strip() for name in value.split(",")], key)
    elif "target_modules" in found.draft.get("lora", {}):
        found.left[key] = "lora.target_modules is all-linear already"
    else:
        found.put("lora.target_modules", value, key)


def _dtype(found: Conversion, key: str, value: Any) -> None:
    if value is False:
        found.left[key] = "is off"
        return
    names = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
    found.put("model.dtype", "auto" if value == "auto" else names[key], key)


def _dtype_name(found: Conversion, key: str, value: Any) -> None:
    found.put("model.dtype", str(value).removeprefix("torch."), key)


def _warmup(found: Conversion, key: str, value: Any) -> None:
    share = isinstance(value, float) and value < 1
    found.put("training.warmup_ratio" if share else "training.warmup_steps", value, key)


def _limit(found: Conversion, key: str, value: Any) -> None:
    if value in (-1, 0):
        found.left[key] = "is off"
    else:
        found.put("training.max_steps", value, key)


def _trl(found: Conversion, key: str, value: Any) -> None:
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name in SECTIONS[found.method].model_fields:
            found.put(f"{found.method}.{name}", inner, f"{key}.{name}")
        else:
            found.left[f"{key}.{name}"] = f"{found.method} has no such key here"


def _code(found: Conversion, key: str, value: Any) -> None:
    found.left[key] = "it runs code of the model's repository; model.trust_remote_code: true, if you trust that"


def _four_bits(found: Conversion, key: str, value: Any) -> None:
    if value in (True, 4):
        found.put("quantization.load_in_4bit", True, key)
    else:
        found.left[key] = "is off" if value is False else "4 bits are what there is"


def _kept(what: str) -> Callable[[Conversion, str, Any], None]:
    def carry(found: Conversion, key: str, value: Any) -> None:
        if value is False:
            found.left[key] = "is off"
        else:
            found.carried.append((key, what))

    return carry


_ATTENTION = "packed batches take torch's own flash attention; model.attn_implementation names another"


def _attention(found: Conversion, key: str, value: Any) -> None:
    found.left[key] = _ATTENTION


_SPECIAL: dict[str, Callable[[Conversion, str, Any], None]] = {
    "eval_strategy": _steps("training.eval_steps"),
    "evaluation_strategy": _steps("training.eval_steps"),
    "do_eval": _steps("training.eval_steps"),
    "save_strategy": _steps("training.save_steps"),
    "logging_strategy": _steps("training.logging_steps"),
    "chat_template": _template,
    "template": _template,
    "report_to": _tracker,
    "lora_target": _targets,
    "lora_target_modules": _targets,
    "bf16": _dtype,
    "fp16": _dtype,
    "bfloat16": _dtype,
    "float16": _dtype,
    "torch_dtype": _dtype_name,
    "dtype": _dtype_name,
    "warmup_steps": _warmup,
    "max_steps": _limit,
    "trl": _trl,
    "trust_remote_code": _code,
    "load_in_4bit": _four_bits,
    "quantization_bit": _four_bits,
    "attn_implementation": _attention,
    "use_peft": _kept("the section lora"),
    "adapter": _kept("the section lora"),
    "finetuning_type": _kept("the section lora, or none"),
    "stage": _kept("the section of the method"),
    "rl": _kept("the section of the method"),
    "pref_loss": _kept("the method and its loss"),
}
