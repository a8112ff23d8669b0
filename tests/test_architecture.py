"""The house rules: who may import whom, which rooms stay light, and how big things may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "alignctl"
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "matplotlib"}
LAYERS = [  # a room may import only rooms of the lines above its own
    {"errors", "secrets"},
    {"recipe", "formats", "rundir", "quiet", "terminal", "statistics", "drift"},
    {"plan"},
    {"report", "init"},
    {"evaluate"},
    {"train"},
    {"proof"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(SRC.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            if node.module == "alignctl":
                found |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("alignctl."):
                found.add(str(node.module).split(".")[1])
    return found - {"__version__"}


def test_arrows_point_down() -> None:
    for path in FILES:
        here = room(path)
        if here in FLOOR:
            for there in imported_rooms(path) - {here}:
                assert FLOOR[there] < FLOOR[here], f"{path.name} must not import {there}"


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in FILES} - {"__init__", "__main__"} == set(FLOOR)


def test_light_rooms_stay_light() -> None:
    light = [f"alignctl.{name}" for name in FLOOR if name not in ("train", "evaluate", "proof", "statistics")]
    light += [
        "alignctl.cli.main",
        "alignctl.cli.app",
        "alignctl.cli.training",
        "alignctl.cli.plan",
        "alignctl.recipe.load",
        "alignctl.recipe.document",
        "alignctl.report.html",
        "alignctl.report.listing",
    ]
    code = f"import sys, {', '.join(light)}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


def test_only_the_seam_touches_underscored_names_of_trl() -> None:
    for path in FILES:
        if path.name == "trl_seam.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                assert "trainer" not in owner and "trl" not in owner, f"{path.name}:{node.lineno}: {owner}.{node.attr}"


def functions() -> list[tuple[Path, ast.FunctionDef]]:
    return [
        (path, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]


def test_functions_are_short_and_files_small() -> None:
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for _, node in functions())
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[len(lengths) * 9 // 10] <= 40
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_every_argument_is_typed() -> None:
    for path, node in functions():
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{path.name}:{node.lineno} {node.name}: {bare}"
        assert node.returns is not None, f"{path.name}:{node.lineno} {node.name}"
