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
    broken: bool = False

    def place(self, dotted: str) -> str:
        """The place of a key, or of the nearest section around it."""
        while dotted and dotted not in self.places:
            dotted = dotted.rpartition(".")[0]
        return self.places.get(dotted, "recipe")


# A recipe of more values than this is none: aliases in aliases stand for values without end.
MOST = 10_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `5e-7` as YAML 1.2 does: a number; and that counts what aliases stand for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.around: list[yaml.Node] = []  # the nodes that hold the one being read
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if node is not None and node not in self._sizes:
            items = node.value if isinstance(node, yaml.CollectionNode) else []
            below = [each for item in items for each in (item if isinstance(item, tuple) else (item,))]
            self._sizes[node] = 1 + sum(self._sizes.get(each, 0) for each in below)
            if self._sizes[node] > MOST:
                raise yaml.composer.ComposerError(None, None, f"stands for more than {MOST:,} values", node.start_mark)
        return node


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
    return yaml.load(text, _Loader)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which `_Loader` would read as something else."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def dump(values: dict[str, Any]) -> str:
    """`values` as YAML that reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def inline(value: Any) -> str:
    """`value` as YAML on one line."""
    listed = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6
    )
    return listed.strip()[1:-1]


def read(path: Path) -> Tree:
    """Read one file. What is wrong with it becomes problems, not exceptions."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            tree = Tree({})
            tree.values = _values(loader, node, (), tree, str(path))
            return tree
    except UnicodeDecodeError as error:
        return _broken(str(path), f"is not UTF-8 text (byte {error.start})", "save it as UTF-8")
    except OSError as error:
        return _broken(str(path), f"cannot be read: {error.strerror}", "check its permissions")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return _broken(f"{path}:{line}", f"not YAML: {error.problem}", "mend the line")
    except yaml.YAMLError as error:
        return _broken(str(path), f"not YAML: {str(error).splitlines()[0]}", "mend the file")
    except RecursionError:
        return _broken(str(path), "is nested too deeply", "a recipe has sections and keys")
    what = "is empty" if node is None else "is not a mapping of sections"
    return _broken(str(path), what, "start from `alignctl recipes copy NAME`")


def _broken(where: str, what: str, way_out: str) -> Tree:
    return Tree({}, problems=[Problem(where, what, way_out)], broken=True)


def _values(loader: _Loader, node: yaml.Node, at: Path_, tree: Tree, file: str) -> Any:
    if node in loader.around:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands inside itself", node.start_mark)
    tree.places[".".join(at)] = f"{file}:{node.start_mark.line + 1}"
    loader.around.append(node)
    try:
        if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
            what = f"could not determine a constructor for the tag {node.tag!r}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [_values(loader, child, (*at, str(i)), tree, file) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return _mapping(loader, node, at, tree, file)
        return loader.construct_object(node, deep=True)
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
    finally:
        loader.around.pop()


def _mapping(loader: _Loader, node: yaml.MappingNode, at: Path_, tree: Tree, file: str) -> dict[str, Any]:
    written: dict[str, str] = {}
    second: list[yaml.Node] = []
    for key_node, _ in node.value:
        key, place = str(key_node.value), f"{file}:{key_node.start_mark.line + 1}"
        if key in written and key_node.tag != "tag:yaml.org,2002:merge":
            dotted = ".".join((*at, key))
            tree.problems.append(Problem(place, f"{dotted}: stands twice, first at {written[key]}", "keep one of them"))
            second.append(key_node)
        written.setdefault(key, place)
    loader.flatten_mapping(node)  # what `<<` brings comes first, so that the keys written here win
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node not in second:
            key = str(key_node.value)
            values[key] = _values(loader, value_node, (*at, key), tree, file)
            tree.places[".".join((*at, key))] = f"{file}:{key_node.start_mark.line + 1}"
    return values


def merge(base: Tree, near: Tree) -> Tree:
    """`near` over `base`, key by key; lists and scalars are replaced whole, and `null` takes a section away."""
    places = dict(base.places)
    for dotted in near.places:
        if dotted and not isinstance(_at(near.values, dotted), dict):
            _forget(places, dotted)
    problems = [*base.problems, *near.problems]
    values = _merged(base.values, near.values)
    return Tree(values, {**places, **near.places}, problems, base.broken or near.broken)


def _at(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if isinstance(values, list):
            values = values[int(key)]
        else:
            values = values.get(key) if isinstance(values, dict) else None
    return values


def _forget(places: dict[str, str], dotted: str) -> None:
    """Take away the places below a key whose value is replaced."""
    for below in [place for place in places if place.startswith(f"{dotted}.")]:
        del places[below]


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
    if dotted == "extends":
        tree.problems.append(Problem(place, "cannot be set here", "`extends` belongs in the file"))
        return
    *parents, last = dotted.split(".")
    try:
        value = scalar(text)
        holder: Any = tree.values
        for depth, key in enumerate(parents, 1):
            holder = holder[_index(key)] if isinstance(holder, list) else _section(tree, holder, parents[:depth], place)
        if isinstance(holder, list):
            holder[_index(last)] = value
        else:
            holder[last] = value
    except (yaml.YAMLError, ValueError, IndexError, TypeError, AttributeError, RecursionError):
        tree.problems.append(Problem(place, "cannot be set", "the key must name a value of the recipe"))
        return
    _forget(tree.places, dotted)
    tree.places[dotted] = place


def _index(key: str) -> int:
    if not key.isdigit():
        raise ValueError(key)
    return int(key)


def _section(tree: Tree, holder: dict[str, Any], path: list[str], place: str) -> Any:
    if holder.get(path[-1]) is None:
        holder[path[-1]] = {}
        tree.places[".".join(path)] = place
    return holder[path[-1]]
