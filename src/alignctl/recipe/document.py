"""The recipe's keys for editors (JSON Schema) and for people (docs/recipe.md)."""

from __future__ import annotations

from typing import Any

from alignctl.recipe import catalog
from alignctl.recipe.schema import METHODS, SECTIONS, Recipe, Section, Source


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, `extends` included.

    A file that extends another may leave out what that one gives, so nothing is required.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "alignctl recipe"
    schema["properties"]["extends"] = {"type": "string", "description": "A recipe that this one changes key by key."}
    schema["properties"]["model"]["examples"] = [{"chat_template": name} for name in catalog.templates()]
    schema.pop("required", None)
    schema["anyOf"] = [{"required": ["extends"]}, {"required": ["model", "data", "training"]}]
    pairs = [(a, b) for i, a in enumerate(METHODS) for b in METHODS[i + 1 :]]
    given = {"type": "object"}
    schema["not"] = {"anyOf": [{"required": [a, b], "properties": {a: given, b: given}} for a, b in pairs]}
    for name in ("Model", "Data", "Training"):
        schema["$defs"][name].pop("required")
    return schema


def markdown() -> str:
    """docs/recipe.md: every key with its type, default and meaning."""
    parts = [_HEAD.replace("TEMPLATES", ", ".join(f"`{name}`" for name in catalog.templates()))]
    sections: dict[str, type[Section]] = {**SECTIONS, "data.train[] and data.eval[]": Source}
    for name, section in sections.items():
        rows = [_row(key, info) for key, info in section.model_fields.items()]
        table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) if rows else "No keys."
        parts.append(f"## {name}\n\n{section.__doc__}\n\n{table}\n")
    parts.append(f"## trl\n\n{Recipe.model_fields['trl'].description}\n")
    return "\n".join(parts)


def _row(key: str, info: Any) -> str:
    kind = info.annotation.__name__ if type(info.annotation) is type else str(info.annotation)
    for noise in ("typing.", "alignctl.recipe.schema.", " | None"):
        kind = kind.replace(noise, "")
    if "Annotated[list[Literal" in kind:
        kind = kind.split(", Annotated")[0].removeprefix("Union[") + " or a list of them"
    default = "required" if info.is_required() else f"`{info.default!r}`".replace("`None`", "—")
    cells = (f"`{key}`", kind.replace("|", "or").replace("'", "`"), default, info.description or "")
    return "| " + " | ".join(cells) + " |"


_HEAD = """# The recipe

A recipe is a YAML file of sections. Exactly one of `sft`, `dpo` and `orpo` is present, and it is the method.
Unknown keys, duplicate keys and impossible pairs are refused before anything is loaded, all at once, with their lines.

- `extends: other.yaml` starts from another recipe; the nearer file wins key by key, and `key: null` takes a key away.
- `${oc.env:NAME}` and `${oc.env:NAME,default}` read the environment; such a value is never written to the run folder.
- `alignctl dpo recipe.yaml training.learning_rate=1e-5` changes one key for one run.

**Rows** for `dpo` and `orpo` have `prompt`, `chosen` and `rejected` as strings, or `chosen` and `rejected` as lists of
`{role, content}`: the answers alone after a `prompt` list, or whole conversations that differ in the last message. Rows
for `sft` have `messages`, or `prompt` and `completion`. A `system` column is kept in every shape.

**Chat templates** by name: TEMPLATES. A prompt ends with the user's turn; a system message goes into the first user
turn where the template has no system role.

This page is made by `make docs` from the code that checks recipes.
"""
