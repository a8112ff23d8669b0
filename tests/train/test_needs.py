"""What must be installed, and which package an import error is about."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alignctl.train import needs


def test_ranges_are_those_of_the_installed_package() -> None:
    wanted = {each.name: str(each.specifier) for each in needs.requirements()}
    assert wanted["trl"] == "<1.17,>=1.16" and "torch" in wanted and "wandb" not in wanted


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("No module named 'trl'", name="trl"), "is not installed"),
        (ModuleNotFoundError("No module named 'trl.experimental.orpo'", name="trl.experimental"), "is not installed"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), "is not installed"),
        (ModuleNotFoundError("No module named 'alignctl.typo'", name="alignctl.typo"), None),
        (ImportError("no name"), None),
    ],
)
def test_the_package_behind_an_import_error(
    metadata: Callable[..., None], error: ImportError, expected: str | None
) -> None:
    metadata(["trl<1.17,>=1.16", "pyyaml>=6"])
    found = needs.behind(error)
    assert (found and found.what) == expected


def test_an_import_error_where_all_is_installed_stays_a_bug(metadata: Callable[..., None]) -> None:
    metadata(["trl<1.17,>=1.16"], trl="1.16.3")
    assert needs.behind(ImportError("cannot import name 'x' from 'trl'", name="trl")) is None
