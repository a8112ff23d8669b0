"""YAML text to values that know their lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.errors import Problem
from alignctl.recipe import tree
from alignctl.recipe.tree import Tree


@pytest.fixture
def read(write: Callable[..., Path], here: Path) -> Callable[[str], Tree]:
    """Read a text as a file; the places are relative to the test's folder."""

    def read(text: str) -> Tree:
        found = tree.read(write(text))
        found.places = {key: place.removeprefix(f"{here}/") for key, place in found.places.items()}
        return found

    return read


@pytest.fixture
def said(read: Callable[[str], Tree], here: Path) -> Callable[[str], list[str]]:
    """The problems of a text."""
    return lambda text: [str(problem).replace(f"{here}/", "") for problem in read(text).problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("5E-7", 5e-7),
        ("1e5", 1e5),
        ("+1e3", 1e3),
        ("1.5e+3", 1500.0),
        ("1.0", 1.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("-.5", -0.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("7", 7),
        ("-7", -7),
        ("1_000", 1000),
        ("on", True),
        ("Yes", True),
        ("true", True),
        ("off", False),
        ("No", False),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5e-7'", "5e-7"),
        ("'on'", "on"),
        ("1_000.5", "1_000.5"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("y", "y"),
        ("[1, 5e-7]", [1, 5e-7]),
        ("{a: 1e5}", {"a": 1e5}),
    ],
)
def test_values(text: str, value: object, read: Callable[[str], Tree]) -> None:
    for got in (tree.scalar(text), read(f"key: {text}\n").values["key"]):
        assert got == value
        assert type(got) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(tree.scalar(".nan"))


def test_keys_are_text(read: Callable[[str], Tree]) -> None:
    assert read("on: 1\n1: 2\nnull: 3\n").values == {"on": 1, "1": 2, "null": 3}


def test_places(read: Callable[[str], Tree]) -> None:
    found = read("# head\n\nmodel:\n  dtype: auto\ndata:\n  train:\n    - path: a\n    - path: b\n      take: 5\n")
    assert found.places == {
        "": "r.yaml:3",
        "model": "r.yaml:3",
        "model.dtype": "r.yaml:4",
        "data": "r.yaml:5",
        "data.train": "r.yaml:6",
        "data.train.0": "r.yaml:7",
        "data.train.0.path": "r.yaml:7",
        "data.train.1": "r.yaml:8",
        "data.train.1.path": "r.yaml:8",
        "data.train.1.take": "r.yaml:9",
    }


@pytest.mark.parametrize(
    ("dotted", "place"),
    [
        ("model.dtype", "r.yaml:2"),
        ("model.revision", "r.yaml:1"),
        ("model.dtype.deeper.still", "r.yaml:2"),
        ("nothing.here", "r.yaml:1"),
        ("", "r.yaml:1"),
    ],
)
def test_the_place_of_a_key_that_is_not_there_is_that_of_its_section(
    dotted: str, place: str, read: Callable[[str], Tree]
) -> None:
    assert read("model:\n  dtype: auto\n").place(dotted) == place


def test_without_a_file_the_place_is_the_recipe() -> None:
    assert Tree({}).place("model.dtype") == "recipe"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a: stands twice, first at r.yaml:1 — keep one of them"),
        ("s:\n  a: 1\n  b: 2\n  a: 3\n", "r.yaml:4: s.a: stands twice, first at r.yaml:2 — keep one of them"),
        ("s:\n  a: 1\nt: 0\ns:\n  b: 2\n", "r.yaml:4: s: stands twice, first at r.yaml:1 — keep one of them"),
        ("l:\n- a: 1\n- a: 2\n  a: 3\n", "r.yaml:4: l.1.a: stands twice, first at r.yaml:3 — keep one of them"),
        ("s: {a: 1,\n  a: 2}\n", "r.yaml:2: s.a: stands twice, first at r.yaml:1 — keep one of them"),
    ],
)
def test_a_duplicate_key_names_both_lines(text: str, problem: str, said: Callable[[str], list[str]]) -> None:
    assert said(text) == [problem]


def test_of_duplicate_keys_the_first_counts(read: Callable[[str], Tree]) -> None:
    found = read("s: {a: 1}\ns: {a: 2, b: 3}\n")
    assert found.values == {"s": {"a": 1}}
    assert found.places["s"] == "r.yaml:1"


def test_one_name_in_two_sections_is_no_duplicate(said: Callable[[str], list[str]]) -> None:
    assert said("s: {a: 1}\nt: {a: 1}\nl: [{a: 1}, {a: 1}]\n") == []


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "r.yaml:3: not YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: not YAML: found character '\\t'"),
        ("a: b: c\n", "r.yaml:1: not YAML: mapping values are not allowed here"),
        ("a: 1\nb: *nowhere\n", "r.yaml:2: not YAML: found undefined alias 'nowhere'"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not YAML: but found another document"),
        ("a: 'open\n\n", "r.yaml:3: not YAML: found unexpected end of stream"),
        ("a: \x00\n", "r.yaml: not YAML: unacceptable character #x0000"),
    ],
)
def test_a_syntax_error_names_its_line(
    text: str, start: str, read: Callable[[str], Tree], said: Callable[[str], list[str]]
) -> None:
    (problem,) = said(text)
    assert problem.startswith(start)
    assert read(text).values == {}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("a: 1\nb: !secret token\n", 2, id="unknown tag"),
        pytest.param("a: 1\nb: !!python/object:os.system x\n", 2, id="python tag"),
        pytest.param("a: 1\n\nb: 2024-13-45\n", 3, id="impossible date"),
        pytest.param("a: 1\nb: !!int x\n", 2, id="no integer"),
        pytest.param("a: 1\nb: {<<: 5}\n", 2, id="merge of a scalar"),
        pytest.param("a: 1\nb: &b {c: *b}\n", 2, id="an alias inside itself"),
    ],
)
def test_what_cannot_be_constructed_is_a_problem_with_its_line(
    text: str, line: int, said: Callable[[str], list[str]]
) -> None:
    (problem,) = said(text)
    assert problem.startswith(f"r.yaml:{line}: ")


def test_text_that_is_not_utf8_names_the_byte(here: Path) -> None:
    path = here / "r.yaml"
    path.write_bytes("a: Käse\n".encode("latin-1"))
    assert tree.read(path) == Tree({}, {}, [Problem(str(path), "is not UTF-8 text (byte 4)", "save it as UTF-8")], True)


def test_a_byte_order_mark_is_no_part_of_the_first_key(here: Path) -> None:
    path = here / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert tree.read(path).values == {"a": 1}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("# nothing but a comment\n", "is empty"),
        ("- a\n- b\n", "is not a mapping of sections"),
        ("model\n", "is not a mapping of sections"),
    ],
)
def test_a_file_without_sections(
    text: str, what: str, read: Callable[[str], Tree], said: Callable[[str], list[str]]
) -> None:
    assert said(text) == [f"r.yaml: {what} — start from `alignctl recipes copy NAME`"]
    assert read(text).values == {}


def test_an_alias_is_a_copy(read: Callable[[str], Tree]) -> None:
    found = read("a: &rows [{path: x}]\nb: *rows\n")
    tree.put(found, "b.0.path=y")
    assert found.values == {"a": [{"path": "x"}], "b": [{"path": "y"}]}


def test_a_merge_key_adds_keys_and_keeps_their_places(read: Callable[[str], Tree]) -> None:
    found = read("a: &a\n  p: 1\nb:\n  <<: *a\n  q: 2\n")
    assert (found.values["b"], found.problems) == ({"p": 1, "q": 2}, [])
    assert (found.places["b.p"], found.places["b.q"]) == ("r.yaml:2", "r.yaml:5")


@pytest.mark.parametrize("text", ["b: {<<: *a, p: 2}", "b: {p: 2, <<: *a}", "b: {<<: [{p: 2}, *a]}"])
def test_a_key_beside_a_merge_key_wins(text: str, read: Callable[[str], Tree]) -> None:
    found = read(f"a: &a {{p: 1, q: 1}}\n{text}\n")
    assert (found.values["b"], found.problems) == ({"p": 2, "q": 1}, [])


@pytest.mark.parametrize(
    ("base", "near", "merged"),
    [
        ({"s": {"a": 1, "b": 2}}, {"s": {"b": 3}}, {"s": {"a": 1, "b": 3}}),
        ({"s": {"t": {"a": 1, "b": 2}}}, {"s": {"t": {"b": 3}}}, {"s": {"t": {"a": 1, "b": 3}}}),
        ({"s": {"a": 1}}, {"t": {"b": 2}}, {"s": {"a": 1}, "t": {"b": 2}}),
        ({"l": [1, 2, 3]}, {"l": [4]}, {"l": [4]}),
        ({"l": [{"a": 1, "b": 2}]}, {"l": [{"a": 3}]}, {"l": [{"a": 3}]}),
        ({"s": {"a": 1}}, {"s": None}, {"s": None}),
        ({"s": {"a": 1, "b": 2}}, {"s": {"a": None}}, {"s": {"a": None, "b": 2}}),
        ({"s": None}, {"s": {"a": 1}}, {"s": {"a": 1}}),
        ({"s": {"a": 1}}, {"s": 5}, {"s": 5}),
        ({"s": 5}, {"s": {"a": 1}}, {"s": {"a": 1}}),
        ({"s": {"a": 1}}, {"s": {}}, {"s": {"a": 1}}),
    ],
)
def test_merge(base: dict[str, Any], near: dict[str, Any], merged: dict[str, Any]) -> None:
    before = repr((base, near))
    assert tree.merge(Tree(base), Tree(near)).values == merged
    assert repr((base, near)) == before


def test_merge_keeps_places_and_problems_of_both() -> None:
    far, close = Problem("base.yaml:9", "far"), Problem("near.yaml:9", "close")
    base = Tree({"s": {"a": 1, "b": 1}}, {"s": "base.yaml:1", "s.a": "base.yaml:2", "s.b": "base.yaml:3"}, [far])
    near = Tree({"s": {"b": 2}}, {"s": "near.yaml:1", "s.b": "near.yaml:2"}, [close])
    both = tree.merge(base, near)
    assert both.places == {"s": "near.yaml:1", "s.a": "base.yaml:2", "s.b": "near.yaml:2"}
    assert both.problems == [far, close]


@pytest.mark.parametrize(
    ("text", "dotted"), [("l: [{q: 1}]", "l.0.p"), ("l: [{q: 1}]", "l.1"), ("s: null", "s.a"), ("s: 5", "s.a")]
)
def test_merge_forgets_the_places_of_what_is_replaced(text: str, dotted: str, read: Callable[[str], Tree]) -> None:
    base = read("s: {a: 1}\nl: [{p: 1}, {p: 2}]\n")
    assert tree.merge(base, read(f"# near\n\n\n{text}\n")).place(dotted) == "r.yaml:4"


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("s.a=5e-7", {"s": {"a": 5e-7}, "l": [{"p": "x"}, 2], "n": None}),
        ("s.a=null", {"s": {"a": None}, "l": [{"p": "x"}, 2], "n": None}),
        ("s.a=", {"s": {"a": None}, "l": [{"p": "x"}, 2], "n": None}),
        ("s.a=off", {"s": {"a": False}, "l": [{"p": "x"}, 2], "n": None}),
        ("s.a=b=c", {"s": {"a": "b=c"}, "l": [{"p": "x"}, 2], "n": None}),
        ("s.b=2", {"s": {"a": 1, "b": 2}, "l": [{"p": "x"}, 2], "n": None}),
        ("s={c: 3}", {"s": {"c": 3}, "l": [{"p": "x"}, 2], "n": None}),
        ("l.0.p=y", {"s": {"a": 1}, "l": [{"p": "y"}, 2], "n": None}),
        ("l.0.q=5", {"s": {"a": 1}, "l": [{"p": "x", "q": 5}, 2], "n": None}),
        ("l.1=9", {"s": {"a": 1}, "l": [{"p": "x"}, 9], "n": None}),
        ("l=[7]", {"s": {"a": 1}, "l": [7], "n": None}),
    ],
)
def test_put(override: str, values: dict[str, Any]) -> None:
    found = Tree({"s": {"a": 1}, "l": [{"p": "x"}, 2], "n": None}, {"s": "r.yaml:1"})
    tree.put(found, override)
    assert found.values == values
    assert found.problems == []
    assert found.places == {"s": "r.yaml:1"} | {override.partition("=")[0]: f"argument '{override}'"}


@pytest.mark.parametrize(
    ("override", "values", "made"),
    [
        ("n.a.b=1", {"s": {"a": 1}, "n": {"a": {"b": 1}}}, ("n", "n.a", "n.a.b")),
        ("t.a.b=1", {"s": {"a": 1}, "n": None, "t": {"a": {"b": 1}}}, ("t", "t.a", "t.a.b")),
    ],
)
def test_put_makes_the_sections_on_the_way(override: str, values: dict[str, Any], made: tuple[str, ...]) -> None:
    found = Tree({"s": {"a": 1}, "n": None}, {"s": "r.yaml:1", "n": "r.yaml:2"})
    tree.put(found, override)
    assert found.values == values
    assert found.problems == []
    assert found.places == {"s": "r.yaml:1", "n": "r.yaml:2"} | dict.fromkeys(made, f"argument '{override}'")


@pytest.mark.parametrize("override", ["", "s.a", "=5", "--resume"])
def test_an_override_that_is_not_key_value(override: str) -> None:
    found = Tree({"s": {"a": 1}})
    tree.put(found, override)
    assert found.values == {"s": {"a": 1}}
    assert [str(problem) for problem in found.problems] == [
        f"argument '{override}': is not key=value — write it as training.learning_rate=1e-5"
    ]


@pytest.mark.parametrize(
    "override", ["s.a.b=1", "s.a.b.c=1", "l.2=1", "l.2.p=1", "l.first=1", "l.first.p=1", "s.a=[", "s.a=@x", "t.u={a"]
)
def test_an_override_that_cannot_be_set_changes_nothing(override: str) -> None:
    found = Tree({"s": {"a": 1}, "l": [{"p": "x"}, 2]})
    tree.put(found, override)
    assert found.values == {"s": {"a": 1}, "l": [{"p": "x"}, 2]}
    assert found.places == {}
    assert [str(problem) for problem in found.problems] == [
        f"argument '{override}': cannot be set — the key must name a value of the recipe"
    ]
