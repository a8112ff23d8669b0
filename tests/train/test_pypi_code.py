"""A package that would run code to become a wheel is not taken."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from alignctl.errors import MachineError
from alignctl.train import pypi

BACKEND = """
open({mark!r}, "w").close()


def build_wheel(*given):
    raise ValueError


prepare_metadata_for_build_wheel = build_wheel
"""


def test_a_source_package_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.format(mark=str(tmp_path / "ran")),
    }
    with tarfile.open(index / "toy-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"toy-1.0/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    with pytest.raises(MachineError, match="No matching distribution"):
        pypi.fetch("pypi:toy==1.0", None)
    assert not (tmp_path / "ran").exists()
