"""A recipe file to a checked `Recipe`: extends, environment, overrides, and every problem at once."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from alignctl.errors import Problem, RecipeError
from alignctl.recipe import catalog, tree
from alignctl.recipe.foreign import FOREIGN
from alignctl.recipe.schema import METHODS, SECTIONS, Recipe, Source
from alignctl.recipe.tree import Tree

_ENVIRONMENT = re.compile(r"\$\{oc\.env:(?P<name>\w+)(?:,(?P<default>[^}]*))?\}")
_OWNED = {
    "output_dir": "the option --output DIR",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "max_length": "data.max_length",
    "use_cpu": "nothing; the device is chosen for you",
    "report_to": "logging.report_to",
    "padding_free": "nothing; TRL's DPO ignores it",
    "packing": "nothing yet; rows are not mixed",
    "push_to_hub": "nothing; a run uploads nothing",
    "resume_from_checkpoint": "the option --resume",
    "remove_unused_columns": "nothing; the columns are alignctl's own",
    "disable_tqdm": "nothing; alignctl draws its own progress",
    "logging_nan_inf_filter": "nothing; it hides NaN and is always off",
    "save_strategy": "training.save_steps",
    "eval_strategy": "training.eval_steps",
}


@dataclass(frozen=True)
class Loaded:
    """A checked recipe, the name that its run gets, and the keys whose values came from the environment."""

    recipe: Recipe
    name: str
    secrets: dict[str, str]

    def resolved(self) -> dict[str, Any]:
        """Every key that counts, defaults included; values read from the environment stay `${oc.env:…}`."""
        values = self.recipe.model_dump(mode="json", exclude_none=True)
        for dotted, written in self.secrets.items():
            *parents, last = dotted.split(".")
            holder: Any = values
            for key in parents:
                holder = holder[int(key)] if isinstance(holder, list) else holder[key]
            holder[int(last) if isinstance(holder, list) else last] = written
        return values

    def text(self) -> str:
        """The resolved recipe as YAML, as the run folder holds it."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def load(path: Path, overrides: list[str] | None = None, method: str | None = None) -> Loaded:
    """Read `path`, apply `overrides`, and check everything.

    Raises:
        RecipeError: with one problem for each mistake, `method` being the command that asked.
    """
    found = _with_bases(path, ())
    for override in overrides or []:
        tree.put(found, override)
    found.values.pop("extends", None)
    secrets = _from_environment(found)
    _find_files(found, path)
    problems = [*found.problems, *_rules(found, method)]
    recipe = None
    try:
        recipe = Recipe.model_validate(found.values)
    except ValidationError as error:
        problems += [_explain(found, dict(item)) for item in error.errors()]
    if problems or recipe is None:
        raise RecipeError(*dict.fromkeys(sorted(problems, key=_order)))
    return Loaded(recipe, path.stem, secrets)


def _order(problem: Problem) -> tuple[str, int, str]:
    file, _, line = problem.where.rpartition(":")
    return (file, int(line), problem.what) if line.isdigit() else (problem.where, 0, problem.what)


def _with_bases(path: Path, above: tuple[Path, ...]) -> Tree:
    if not path.is_file():
        raise RecipeError(Problem(str(path), "no such recipe", catalog.suggestion(str(path))))
    here = tree.read(path)
    base = here.values.get("extends")
    if base is None:
        return here
    place = here.place("extends")
    if not isinstance(base, str):
        here.problems.append(Problem(place, "extends: must be a path", "extends: _base/phi2.yaml"))
        return here
    target = next((p for p in (path.parent / base, catalog.folder() / base) if p.is_file()), None)
    if target is None:
        here.problems.append(Problem(place, f"extends: no such file {base}", "a path beside this recipe"))
        return here
    if target.resolve() in {p.resolve() for p in (path, *above)}:
        here.problems.append(Problem(place, f"extends: {base} extends this file again", "take one of the two away"))
        return here
    return tree.merge(_with_bases(target, (path, *above)), here)


def _from_environment(found: Tree) -> dict[str, str]:
    """Replace `${oc.env:NAME}` in place; returns {dotted key: text as written}."""
    secrets: dict[str, str] = {}

    def walk(value: Any, dotted: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, f"{dotted}.{k}" if dotted else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, f"{dotted}.{i}") for i, v in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        secrets[dotted] = value
        return _expand(found, value, dotted)

    found.values = walk(found.values, "")
    return secrets


def _expand(found: Tree, text: str, dotted: str) -> Any:
    def one(match: re.Match[str]) -> str:
        value = os.environ.get(match["name"], match["default"])
        if value is None:
            found.problems.append(
                Problem(found.place(dotted), f"{dotted}: the environment has no {match['name']}", "export it")
            )
        return value or ""

    out = _ENVIRONMENT.sub(one, text)
    if "${" in out and "${oc.env:" not in text:
        found.problems.append(Problem(found.place(dotted), f"{dotted}: unknown {text}", "only ${oc.env:NAME} is known"))
    return tree.scalar(out) if _ENVIRONMENT.fullmatch(text) else out


def _find_files(found: Tree, recipe: Path) -> None:
    """Make the paths of local data files absolute, so that the run folder's recipe means the same anywhere."""
    data = found.values.get("data")
    for part in ("train", "eval"):
        sources = data.get(part) if isinstance(data, dict) else None
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, dict) and isinstance(source.get("path"), str):
                places = (recipe.parent, Path.cwd(), catalog.folder())
                hits = [p / source["path"] for p in places if (p / source["path"]).is_file()]
                source["path"] = str(hits[0].resolve()) if hits else source["path"]


def _rules(found: Tree, method: str | None) -> list[Problem]:
    """What no single key can know: methods, pairs of keys that contradict each other, and the names under `trl`."""
    values = {key: value for key, value in found.values.items() if value is not None}
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    return [
        *_method_rules(found, values, method),
        *_pair_rules(found, sections),
        *_template_rules(found, sections.get("model", {})),
        *_trl_rules(found, values),
    ]


def _method_rules(found: Tree, values: dict[str, Any], method: str | None) -> list[Problem]:
    present = [name for name in METHODS if name in values]
    if len(present) > 1:
        return [Problem(found.place(present[1]), f"{' and '.join(present)}: a recipe has one method", "keep one")]
    if not present:
        return [Problem(found.place(""), "no method", f"add a section, e.g. `{method or 'dpo'}: {{}}`")]
    if method and present[0] != method:
        return [Problem(found.place(present[0]), f"this is a recipe for {present[0]}", f"run `alignctl {present[0]}`")]
    return []


def _pair_rules(found: Tree, sections: dict[str, dict[str, Any]]) -> list[Problem]:
    def given(dotted: str) -> Any:
        section, _, key = dotted.partition(".")
        return sections.get(section, {}).get(key)

    losses = given("dpo.loss_type")
    count = len(losses) if isinstance(losses, list) else 1
    weights = given("dpo.loss_weights")
    checks = [
        ("quantization", "quantization" in sections and "lora" not in sections and not given("model.adapter"),
         "4-bit weights cannot be trained", "add a `lora:` section"),
        ("data.eval_fraction", given("data.eval") is not None and given("data.eval_fraction") is not None,
         "data.eval is given too", "keep one of the two"),
        ("training.warmup_steps", given("training.warmup_steps") is not None and
         given("training.warmup_ratio") is not None, "training.warmup_ratio is given too", "keep one of the two"),
        ("dpo.loss_weights", isinstance(weights, list) and len(weights) != count,
         f"must have as many numbers as dpo.loss_type has losses ({count})", "give one weight for each loss"),
        ("dpo.label_smoothing", losses == "exo_pair" and not given("dpo.label_smoothing"),
         "must be above 0 for exo_pair", "the paper recommends 1e-3"),
    ]
    return [Problem(found.place(key), f"{key}: {what}", way_out) for key, wrong, what, way_out in checks if wrong]


def _template_rules(found: Tree, model: dict[str, Any]) -> list[Problem]:
    template = model.get("chat_template")
    if not isinstance(template, str) or template == "model" or template in catalog.templates():
        return []
    if template.endswith(".jinja"):
        if Path(template).is_file():
            return []
        what, way_out = f"no such file {template}", "the path is looked for in the current folder"
    else:
        near = difflib.get_close_matches(template, catalog.templates(), 1)
        what = f"unknown template {template!r}"
        way_out = f"did you mean {near[0]}?" if near else f"one of model, {', '.join(catalog.templates())}, or a .jinja file"
    return [Problem(found.place("model.chat_template"), f"model.chat_template: {what}", way_out)]


@cache
def trl_arguments() -> dict[str, list[str]]:
    """The argument names of each method's TRL config, as of the pinned TRL; made by `scripts/trl_arguments.py`."""
    text = resources.files("alignctl.recipe").joinpath("trl_arguments.json").read_text(encoding="utf-8")
    names: dict[str, list[str]] = json.loads(text)
    return names


def _trl_rules(found: Tree, values: dict[str, Any]) -> list[Problem]:
    method = next((name for name in METHODS if name in values), None)
    extra = values.get("trl")
    if method is None or not isinstance(extra, dict):
        return []
    own = {key: f"training.{key}" for key in SECTIONS["training"].model_fields}
    own |= {key: f"{method}.{key}" for key in SECTIONS[method].model_fields} | _OWNED
    problems = []
    for key in extra:
        where, what = found.place(f"trl.{key}"), f"trl.{key}: "
        if key in own:
            problems.append(Problem(where, f"{what}alignctl sets this itself", f"use {own[key]}"))
        elif key not in trl_arguments()[method]:
            near = difflib.get_close_matches(key, trl_arguments()[method], 1)
            problems.append(
                Problem(where, f"{what}TRL's {method} config has no such argument",
                        f"did you mean trl.{near[0]}?" if near else "see TRL's documentation")
            )
    return problems


def _explain(found: Tree, item: dict[str, Any]) -> Problem:
    """One pydantic error as one problem."""
    location = [str(part) for part in item["loc"]]
    kind = str(item["type"])
    if kind == "extra_forbidden":
        dotted = ".".join(location)
        return Problem(found.place(dotted), f"{dotted}: unknown key", _nearest(location))
    dotted = ".".join(part for part in location if part.islower() and "[" not in part and part not in _TYPES)
    if kind == "missing":
        return Problem(found.place(dotted), f"{dotted}: is missing", f"add {dotted}")
    got = item.get("input")
    what = item["msg"][0].lower() + item["msg"][1:]
    shown = f", got {got!r}" if isinstance(got, str | int | float | bool) else ""
    return Problem(found.place(dotted), f"{dotted}: {what}{shown}", _default(dotted))


_TYPES = {"str", "int", "bool", "float", "literal", "list", "none"}


def _default(dotted: str) -> str:
    section, _, key = dotted.partition(".")
    info = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    if info is None or info.is_required() or info.default is None:
        return "see docs/recipe.md"
    return f"the default is {info.default!r}"


def _nearest(location: list[str]) -> str:
    *parents, key = location
    siblings = list(SECTIONS[parents[0]].model_fields) if parents and parents[0] in SECTIONS else []
    siblings = siblings if len(parents) == 1 else list(Source.model_fields) if parents else []
    top = [*Recipe.model_fields, "extends"]
    near = difflib.get_close_matches(key, siblings or top, 1, cutoff=0.75)
    if near:
        return f"did you mean {'.'.join([*parents, near[0]])}?"
    homes = [f"{name}.{key}" for name, section in SECTIONS.items() if key in section.model_fields]
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    if key in FOREIGN:
        return f"here it is {FOREIGN[key]}"
    return _guess(key, parents, siblings or top)


def _guess(key: str, parents: list[str], siblings: list[str]) -> str:
    everywhere = {k: f"{name}.{k}" for name, section in SECTIONS.items() for k in section.model_fields}
    near = difflib.get_close_matches(key, siblings, 1) or difflib.get_close_matches(key, everywhere, 1)
    if near:
        return f"did you mean {'.'.join([*parents, near[0]]) if near[0] in siblings else everywhere[near[0]]}?"
    return f"known here: {', '.join(siblings)}"
