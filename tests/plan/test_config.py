"""Where the shape of a model comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignctl.errors import MachineError, RecipeError
from alignctl.plan import config
from alignctl.recipe import catalog, load
from alignctl.recipe.schema import Model


def test_every_model_of_the_built_in_recipes_is_packaged() -> None:
    names = {load.load(catalog.entry(name).path).recipe.model.name_or_path for name in catalog.names()}
    assert names <= config.packaged().keys()


def test_the_hubs_cache_without_the_hub(tmp_path: Path) -> None:
    sha = "0" * 40
    model = tmp_path / "hub" / "models--some--one"
    (model / "snapshots" / sha).mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(sha)
    values = config.packaged()["microsoft/phi-2"]
    (model / "snapshots" / sha / "config.json").write_text(json.dumps(values), encoding="utf-8")
    code = (
        "from alignctl.plan import config; from alignctl.recipe.schema import Model\n"
        "for fetch in (True, False):\n"
        "    print(config.shape_of(Model(name_or_path='some/one'), fetch=fetch).parameters())"
    )
    variables = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2779683840", "2779683840"]


@pytest.mark.parametrize("name", ["nobody/nothing", "a/b/c"])
def test_nothing_is_fetched_that_is_not_to_be(name: str) -> None:
    with pytest.raises(MachineError, match=f"{name} is neither a folder nor in the hub's cache"):
        config.shape_of(Model(name_or_path=name), fetch=False)


def test_a_package_that_is_not_in_the_table() -> None:
    with pytest.raises(MachineError, match="a package shows its sizes only when it is unpacked"):
        config.shape_of(Model(name_or_path="pypi:other==1.0"))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "holds no object")]
)
def test_a_folder_without_a_config(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RecipeError, match=rf"model\.name_or_path: .*config\.json {said}"):
        config.shape_of(Model(name_or_path=str(tmp_path)))
