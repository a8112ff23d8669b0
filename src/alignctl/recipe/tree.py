"""YAML text to plain values that remember their lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignctl.errors import Problem

Path_ = tuple[str, ...]


@dataclass
class Tree:
    """Values of a recipe, and where each dotted key was written: `places["dpo.beta"] == "my.yaml:12"`."""

    values: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, dotted: str) -> str:
        """The place of a key, or of the nearest section around it."""
        while dotted and dotted not in self.places:
            dotted = dotted.rpartition(".")[0]
        return self.places.get(dotted, "recipe")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `5e-7` as YAML 1.2 does: a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def scalar(text: str) -> Any:
    """The value of `key=text` on the command line, read as YAML."""
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def read(path: Path) -> Tree:
    """Read one file. Syntax errors and duplicate keys become problems, not exceptions."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except UnicodeDecodeError as error:
        return Tree({}, problems=[Problem(str(path), f"is not UTF-8 text (byte {error.start})", "save it as UTF-8")])
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return Tree({}, problems=[Problem(f"{path}:{line}", f"not YAML: {error.problem}", "mend the line")])
    except yaml.YAMLError as error:
        return Tree({}, problems=[Problem(str(path), f"not YAML: {str(error).splitlines()[0]}", "mend the file")])
    if not isinstance(node, yaml.MappingNode):
        what = "is empty" if node is None else "is not a mapping of sections"
        return Tree({}, problems=[Problem(str(path), what, "start from `alignctl recipes copy NAME`")])
    tree = Tree({})
    tree.values = _values(loader, node, (), tree, str(path))
    return tree


def _values(loader: _Loader, node: yaml.Node, at: Path_, tree: Tree, file: str) -> Any:
    tree.places[".".join(at)] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_values(loader, child, (*at, str(i)), tree, file) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    loader.flatten_mapping(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        dotted, place = ".".join((*at, key)), f"{file}:{key_node.start_mark.line + 1}"
        if key in values:
            tree.problems.append(
                Problem(place, f"{dotted}: stands twice, first at {tree.places[dotted]}", "keep one of them")
            )
            continue
        values[key] = _values(loader, value_node, (*at, key), tree, file)
        tree.places[dotted] = place
    return values


def merge(base: Tree, near: Tree) -> Tree:
    """`near` over `base`, key by key; lists and scalars are replaced whole, and `null` takes a section away."""
    return Tree(
        _merged(base.values, near.values), {**base.places, **near.places}, [*base.problems, *near.problems]
    )


def _merged(base: dict[str, Any], near: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in near.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def put(tree: Tree, override: str) -> None:
    """Apply one `dotted.key=value` of the command line to `tree`; numbers in the key index lists."""
    dotted, equals, text = override.partition("=")
    place = f"argument {override!r}"
    if not equals or not dotted:
        tree.problems.append(Problem(place, "is not key=value", "write it as training.learning_rate=1e-5"))
        return
    *parents, last = dotted.split(".")
    try:
        value = scalar(text)
        holder: Any = tree.values
        for key in parents:
            holder = holder[int(key)] if isinstance(holder, list) else _section(holder, key)
        if isinstance(holder, list):
            holder[int(last)] = value
        else:
            holder[last] = value
    except (yaml.YAMLError, ValueError, IndexError, TypeError, AttributeError):
        tree.problems.append(Problem(place, "cannot be set", "the key must name a value of the recipe"))
        return
    tree.places[dotted] = place


def _section(holder: dict[str, Any], key: str) -> Any:
    if holder.get(key) is None:
        holder[key] = {}
    return holder[key]
