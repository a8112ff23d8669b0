"""A recipe file to a checked `Recipe`: extends, environment, overrides, and every problem at once."""

from __future__ import annotations

import difflib
import glob
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

from alignctl import secrets
from alignctl.errors import Problem, RecipeError
from alignctl.recipe import catalog, tree
from alignctl.recipe.foreign import FOREIGN, OWNED
from alignctl.recipe.schema import METHODS, SECTIONS, Recipe, Source
from alignctl.recipe.tree import Tree

_ENVIRONMENT = re.compile(r"\$\{oc\.env:(?P<name>\w+)(?:,(?P<default>[^{}]*))?\}")
_PACKAGE = re.compile(r"pypi:[A-Za-z0-9][\w.-]*==[\w.!+-]+", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Loaded:
    """A checked recipe, the name that its run gets, and the keys whose values came from the environment."""

    recipe: Recipe
    name: str
    secrets: dict[tuple[str, ...], str]

    def resolved(self) -> dict[str, Any]:
        """Every key that counts, defaults included; values read from the environment stay `${oc.env:…}`."""
        values = self.recipe.model_dump(mode="json", exclude_none=True)
        for (*parents, last), written in self.secrets.items():
            holder: Any = values
            for key in parents:
                holder = holder[int(key)] if isinstance(holder, list) else holder[key]
            holder[int(last) if isinstance(holder, list) else last] = written
        hidden: dict[str, Any] = secrets.hidden(values)
        return hidden

    def text(self) -> str:
        """The resolved recipe as YAML, as the run folder holds it."""
        return tree.dump(self.resolved())


def load(path: Path, overrides: list[str] | None = None, method: str | None = None) -> Loaded:
    """Read `path`, apply `overrides`, and check everything.

    Raises:
        RecipeError: with one problem for each mistake, `method` being the command that asked.
    """
    found = _with_bases(path, ())
    if found.broken:
        raise RecipeError(*found.problems)
    for override in overrides or []:
        tree.put(found, override)
    found.values.pop("extends", None)
    environment = _Environment(found)
    found.values = _without_null(environment.expanded())
    _find_files(found, path)
    recipe, wrong = _validated(found, environment)
    problems = [*found.problems, *_rules(found, method), *wrong]
    if problems or recipe is None:
        raise RecipeError(*dict.fromkeys(sorted(problems, key=_order)))
    return Loaded(recipe, path.stem, environment.written)


def _validated(found: Tree, environment: _Environment) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or what is wrong with its keys one by one."""
    try:
        return Recipe.model_validate(found.values), []
    except ValidationError as error:
        items = [dict(item) for item in error.errors()]
    texts = [item for item in items if item["type"] == "string_type" and _location(item) in environment.texts]
    if texts:  # digits from the environment are a number only where a number belongs
        for item in texts:
            _set(found.values, _location(item), environment.texts[_location(item)])
        return _validated(found, environment)
    wrong: dict[tuple[str, ...], Problem] = {}
    for item in items:
        location = _location(item)
        if location not in environment.missing:
            wrong.setdefault(location, _explain(found, item, environment.written.get(location)))
    deepest = [at for at in wrong if not any(other[: len(at)] == at and other != at for other in wrong)]
    return None, [wrong[at] for at in deepest]


def _set(values: Any, location: tuple[str, ...], value: Any) -> None:
    *parents, last = location
    for key in parents:
        values = values[int(key)] if isinstance(values, list) else values[key]
    values[int(last) if isinstance(values, list) else last] = value


def _without_null(values: dict[str, Any]) -> dict[str, Any]:
    """`key: null` means the default; what stands under `trl` is TRL's own."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if value is not None:
            out[key] = _without_null(value) if isinstance(value, dict) and key != "trl" else value
    return out


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


class _Environment:
    """The values of a tree that come from the environment: as written, as text, and those that it does not have."""

    def __init__(self, found: Tree) -> None:
        self.found = found
        self.written: dict[tuple[str, ...], str] = {}
        self.texts: dict[tuple[str, ...], str] = {}
        self.missing: set[tuple[str, ...]] = set()

    def expanded(self) -> Any:
        """The tree's values with every `${oc.env:NAME}` replaced."""
        return self._walk(self.found.values, ())

    def _walk(self, value: Any, at: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: self._walk(item, (*at, str(key))) for key, item in value.items()}
        if isinstance(value, list):
            return [self._walk(item, (*at, str(i))) for i, item in enumerate(value)]
        return self._expand(value, at) if isinstance(value, str) and "${" in value else value

    def _expand(self, written: str, at: tuple[str, ...]) -> Any:
        dotted = ".".join(at)
        self.written[at] = written
        if "${" in _ENVIRONMENT.sub("", written):
            self._problem(
                at, f"{dotted}: unknown {written}", "only ${oc.env:NAME} and ${oc.env:NAME,default} are known"
            )
        names = [match["name"] for match in _ENVIRONMENT.finditer(written) if match["default"] is None]
        for name in names:
            if name not in os.environ:
                self._problem(at, f"{dotted}: the environment has no {name}", "export it")
        for match in _ENVIRONMENT.finditer(written):
            secrets.note(match["name"])
        text = _ENVIRONMENT.sub(lambda match: os.environ.get(match["name"], match["default"] or ""), written)
        self.texts[at] = text
        try:
            return tree.scalar(text) if _ENVIRONMENT.fullmatch(written) else text
        except yaml.YAMLError:
            return text

    def _problem(self, at: tuple[str, ...], what: str, way_out: str) -> None:
        self.missing.add(at)
        self.found.problems.append(Problem(self.found.place(".".join(at)), what, way_out))


def _find_files(found: Tree, recipe: Path) -> None:
    """Make the paths of local files absolute, so that the run folder's recipe means the same anywhere."""
    places = (recipe.parent, Path.cwd(), catalog.folder())

    def absolute(path: str) -> str:
        hit = next((place / path for place in places if path and (place / path).exists()), None)
        if hit:
            return str(hit.resolve())
        globs = [f"{glob.escape(str(place.resolve()))}/{path}" for place in places if glob.has_magic(path)]
        return next((each for each in globs if glob.glob(each, recursive=True)), path)  # noqa: PTH207 (`**.jsonl`)

    model, data = found.values.get("model"), found.values.get("data")
    template = model.get("chat_template") if isinstance(model, dict) else None
    if isinstance(template, str) and template.endswith(".jinja"):
        found.values["model"]["chat_template"] = absolute(template)
    for part in ("train", "eval"):
        sources = data.get(part) if isinstance(data, dict) else None
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, dict) and isinstance(source.get("path"), str):
                source["path"] = absolute(source["path"])


def _rules(found: Tree, method: str | None) -> list[Problem]:
    """What no single key can know: methods, pairs of keys that contradict each other, and the names under `trl`."""
    values = found.values
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    return [
        *_method_rules(found, values, method),
        *_pair_rules(found, sections),
        *_weight_rules(found, sections.get("data", {})),
        *_template_rules(found, sections.get("model", {})),
        *_code_rules(found, sections.get("model", {})),
        *_trl_rules(found, values),
        *_choice_rules(found, sections.get("training", {})),
    ]


def _method_rules(found: Tree, values: dict[str, Any], method: str | None) -> list[Problem]:
    present = [name for name in METHODS if name in values]
    if len(present) > 1:
        return [Problem(found.place(present[1]), f"{' and '.join(present)}: a recipe has one method", "keep one")]
    empty = [name for name in METHODS if name in found.places and name not in values]
    if not present and empty:
        return [
            Problem(found.place(empty[0]), f"{empty[0]}: is empty", f"write `{empty[0]}: {{}}` to keep the defaults")
        ]
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
        (
            "quantization",
            "quantization" in sections and "lora" not in sections and not given("model.adapter"),
            "4-bit weights cannot be trained",
            "add a `lora:` section",
        ),
        (
            "data.eval_fraction",
            given("data.eval") is not None and given("data.eval_fraction") is not None,
            "data.eval is given too",
            "keep one of the two",
        ),
        (
            "training.warmup_steps",
            given("training.warmup_steps") is not None and given("training.warmup_ratio") is not None,
            "training.warmup_ratio is given too",
            "keep one of the two",
        ),
        (
            "dpo.loss_weights",
            isinstance(weights, list) and len(weights) != count,
            f"must have as many numbers as dpo.loss_type has losses ({count})",
            "give one weight for each loss",
        ),
        (
            "dpo.precompute_ref_log_probs",
            bool(given("dpo.precompute_ref_log_probs")) and given("dpo.ld_alpha") is not None,
            "whole answers are kept, and dpo.ld_alpha weighs their tokens",
            "take one of the two away",
        ),
        (
            "dpo.label_smoothing",
            "exo_pair" in (losses if isinstance(losses, list) else [losses]) and not given("dpo.label_smoothing"),
            "must be above 0 for exo_pair",
            "the paper recommends 1e-3",
        ),
    ]
    return [Problem(found.place(key), f"{key}: {what}", way_out) for key, wrong, what, way_out in checks if wrong]


def _weight_rules(found: Tree, data: dict[str, Any]) -> list[Problem]:
    problems = []
    for part in ("train", "eval"):
        given = data.get(part)
        sources = [s for s in given if isinstance(s, dict)] if isinstance(given, list) else []
        weighted = [source.get("weight") is not None for source in sources]
        if any(weighted) and not all(weighted):
            key = f"data.{part}.{weighted.index(False)}"
            what = f"{key}: has no weight, and another source has one"
            problems.append(Problem(found.place(key), what, "give every source a weight, or none"))
    return problems


def _template_rules(found: Tree, model: dict[str, Any]) -> list[Problem]:
    template = model.get("chat_template")
    if not isinstance(template, str) or template == "model" or template in catalog.templates():
        return []
    if template.endswith(".jinja"):
        if Path(template).is_file():
            return []
        what, way_out = f"no such file {template}", "it is looked for beside the recipe and in the current folder"
    else:
        near = difflib.get_close_matches(template, catalog.templates(), 1)
        what = f"unknown template {template!r}"
        way_out = (
            f"did you mean {near[0]}?" if near else f"one of model, {', '.join(catalog.templates())}, or a .jinja file"
        )
    return [Problem(found.place("model.chat_template"), f"model.chat_template: {what}", way_out)]


def _code_rules(found: Tree, model: dict[str, Any]) -> list[Problem]:
    """What would load code from elsewhere: kernels of the hub, and what pip would take for more than a package."""
    problems = []
    attention, name, revision = (model.get(key) for key in ("attn_implementation", "name_or_path", "revision"))
    if isinstance(attention, str) and "/" in attention and model.get("trust_remote_code") is not True:
        what = f"model.attn_implementation: {attention} is code from the hub"
        way_out = "model.trust_remote_code=true, if you trust where it is from"
        problems.append(Problem(found.place("model.attn_implementation"), what, way_out))
    if isinstance(name, str) and name.startswith("pypi:"):
        if not _PACKAGE.fullmatch(name):
            what = "model.name_or_path: is no package and version"
            problems.append(Problem(found.place("model.name_or_path"), what, "write it as pypi:PACKAGE==VERSION"))
        if revision is not None and not _SHA256.fullmatch(str(revision)):
            what = "model.revision: is no SHA-256"
            way_out = "64 digits and letters a to f, or none: PyPI shows that of the wheel"
            problems.append(Problem(found.place("model.revision"), what, way_out))
    return problems


@cache
def trl_arguments() -> dict[str, list[str]]:
    """Names in the pinned TRL: the arguments of each method's config, and the choices for `optim` and
    `lr_scheduler_type`. Made by `scripts/trl_arguments.py`.
    """
    text = resources.files("alignctl.recipe").joinpath("trl_arguments.json").read_text(encoding="utf-8")
    names: dict[str, list[str]] = json.loads(text)
    return names


def _trl_rules(found: Tree, values: dict[str, Any]) -> list[Problem]:
    method = next((name for name in METHODS if name in values), None)
    extra = values.get("trl")
    if method is None or not isinstance(extra, dict):
        return []
    own = {key: f"training.{key}" for key in SECTIONS["training"].model_fields}
    own |= {key: f"{method}.{key}" for key in SECTIONS[method].model_fields} | OWNED
    problems = []
    for key in extra:
        where, what = found.place(f"trl.{key}"), f"trl.{key}: "
        if key in own:
            problems.append(Problem(where, f"{what}alignctl sets this itself", f"use {own[key]}"))
        elif key not in trl_arguments()[method]:
            near = difflib.get_close_matches(key, trl_arguments()[method], 1)
            problems.append(
                Problem(
                    where,
                    f"{what}TRL's {method} config has no such argument",
                    f"did you mean trl.{near[0]}?" if near else "see TRL's documentation",
                )
            )
    return problems


def _choice_rules(found: Tree, training: dict[str, Any]) -> list[Problem]:
    problems = []
    for key in ("optim", "lr_scheduler_type"):
        value, known = training.get(key), trl_arguments()[key]
        if isinstance(value, str) and value not in known:
            near = difflib.get_close_matches(value, known, 1)
            way_out = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            dotted = f"training.{key}"
            problems.append(Problem(found.place(dotted), f"{dotted}: unknown {value!r}", way_out))
    return problems


def _location(item: dict[str, Any]) -> tuple[str, ...]:
    """The keys that a pydantic error is about, without the names that it gives to the branches of a union."""
    parts = item["loc"]
    return tuple(
        str(part)
        for i, part in enumerate(parts)
        if isinstance(part, int) or part in _KEYS or (item["type"] == "extra_forbidden" and i == len(parts) - 1)
    )


_KEYS = {
    *Recipe.model_fields,
    *Source.model_fields,
    *(key for section in SECTIONS.values() for key in section.model_fields),
}


def _explain(found: Tree, item: dict[str, Any], written: str | None) -> Problem:
    """One pydantic error as one problem; a value from the environment is shown as it was written."""
    location = _location(item)
    dotted = ".".join(location)
    if item["type"] == "extra_forbidden":
        return Problem(found.place(dotted), f"{dotted}: unknown key", _nearest(location))
    if item["type"] == "missing":
        return Problem(found.place(dotted), f"{dotted}: is missing", f"add {dotted}")
    got = written if written is not None else item.get("input")
    what = item["msg"][0].lower() + item["msg"][1:]
    shown = f", got {got!r}" if isinstance(got, str | int | float | bool) else ""
    return Problem(found.place(dotted), f"{dotted}: {what}{shown}", _meant(item) or _default(dotted))


def _meant(item: dict[str, Any]) -> str:
    """The nearest of the values that a key knows."""
    known = re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", ""))
    near = difflib.get_close_matches(str(item.get("input")), known, 1)
    return f"did you mean {near[0]}?" if near else ""


def _default(dotted: str) -> str:
    section, _, key = dotted.partition(".")
    info = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    if info is None or info.is_required() or info.default is None:
        return "see docs/recipe.md"
    return f"the default is {info.default!r}"


def _nearest(location: tuple[str, ...]) -> str:
    *parents, key = location
    if key in FOREIGN:
        return f"here it is {FOREIGN[key]}"
    siblings = _siblings(parents)
    near = difflib.get_close_matches(key, siblings, 1, cutoff=0.75)
    given = {name: section for name, section in SECTIONS.items() if name != "gates"}  # its keys are names of checks
    homes = [f"{name}.{key}" for name, section in given.items() if key in section.model_fields]
    if near or homes:
        return f"did you mean {'.'.join([*parents, near[0]]) if near else ' or '.join(homes)}?"
    near = difflib.get_close_matches(key, siblings, 1)
    everywhere = {k: f"{name}.{k}" for name, section in given.items() for k in section.model_fields}
    far = difflib.get_close_matches(key, everywhere, 1, cutoff=0.75)
    if near or far:
        return f"did you mean {'.'.join([*parents, near[0]]) if near else everywhere[far[0]]}?"
    return f"known here: {', '.join(siblings)}"


def _siblings(parents: list[str]) -> list[str]:
    if not parents:
        return [*Recipe.model_fields, "extends"]
    return list(SECTIONS[parents[0]].model_fields if len(parents) == 1 else Source.model_fields)
