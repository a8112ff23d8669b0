"""What of a run goes to the hub. The hub is an object that remembers what it was given."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

Here = Callable[..., subprocess.CompletedProcess[str]]
TOKEN = "hf_" + "a1" * 17


class Hub:
    """What an HfApi was asked to do."""

    def __init__(self) -> None:
        self.private: bool | None = None
        self.public_before = False
        self.commits: list[tuple[str, dict[str, bytes]]] = []

    def create_repo(self, api: HfApi, repo: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.private = private
        return SimpleNamespace(repo_id=repo if "/" in repo else f"me/{repo}")

    def repo_info(self, api: HfApi, repo: str) -> Any:
        return SimpleNamespace(private=bool(self.private) and not self.public_before)

    def create_commit(self, api: HfApi, repo: str, operations: list[CommitOperationAdd], *, commit_message: str) -> Any:
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        self.commits.append((repo, files))
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub to which somebody is logged in."""
    there = Hub()
    for name in ("create_repo", "repo_info", "create_commit"):
        method = getattr(there, name)
        monkeypatch.setattr(HfApi, name, lambda api, *given, _method=method, **more: _method(api, *given, **more))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    return there


@pytest.fixture
def run(finished: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished run, to be changed."""
    shutil.copytree(finished("dpo"), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs that were verified, which takes a process and is tested where it belongs."""
    asked: list[Path] = []
    monkeypatch.setattr("alignctl.cli.verify.command", asked.append)
    return asked


def test_the_model_is_verified_and_uploaded(run: Path, hub: Hub, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with (run / "model" / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\nI logged in with {TOKEN}.\n")
    (run / "model" / "training_args.bin").write_bytes(b"pickle")
    (run / "model" / ".cache").mkdir()
    done = here("push", str(run), "me/tea")
    assert done.returncode == 0, done.stderr
    assert "gate.reload" in done.stdout
    ((repo, files),) = hub.commits
    assert repo == "me/tea" and hub.private is None
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert TOKEN.encode() not in files["README.md"] and b"I logged in with ${oc.env:HF_TOKEN}" in files["README.md"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    for line in (
        "left out: training_args.bin is neither weights in safetensors nor text that a model needs",
        "left out: .cache is a link or a folder",
        "left out: samples.jsonl holds rows of the data",
        "uploaded: https://hub/me/tea/commit/1",
    ):
        assert line in done.stdout
    weights = (run / "model" / "adapter_model.safetensors").stat().st_size
    assert f"{weights:,}  adapter_model.safetensors" in done.stdout
    assert "is not on the hub: who loads the adapter needs it" in done.stdout


def test_what_is_not_verified_is_not_uploaded(run: Path, hub: Hub, here: Here) -> None:
    file = run / "model" / "adapter_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)
    done = here("push", str(run), "me/tea")
    assert done.returncode == 6
    assert "gate.reload" in done.stderr and hub.commits == []


def test_a_dry_run_uploads_nothing_and_needs_no_token(
    run: Path, hub: Hub, here: Here, unverified: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    done = here("push", str(run), "me/tea", "--private", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "to me/tea (private)" in done.stdout and "nothing was uploaded: --dry-run" in done.stdout
    assert hub.commits == [] and hub.private is None and unverified == [run]


def test_without_a_token_nothing_is_asked(
    run: Path, here: Here, unverified: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    done = here("push", str(run), "me/tea")
    assert done.returncode == 4
    assert "there is no token to log in with — hf auth login, or HF_TOKEN in the environment" in done.stderr
    assert unverified == []


def test_a_public_repository_does_not_become_private(run: Path, hub: Hub, here: Here, unverified: list[Path]) -> None:
    hub.public_before = True
    done = here("push", str(run), "me/tea", "--private")
    assert done.returncode == 2
    assert "me/tea: exists and is public, and --private does not change that" in done.stderr
    assert hub.commits == []


def test_a_secret_stays_here(
    run: Path, hub: Hub, here: Here, unverified: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with (run / "model" / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\nI logged in with {TOKEN}.\n")
    done = here("push", str(run), "me/tea")
    assert done.returncode == 4
    assert "README.md: holds a secret of the environment" in done.stderr and TOKEN not in done.stderr + done.stdout
    assert hub.commits == []


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("nobody answers"), HfHubHTTPError.__bases__[0]("nobody answers")]
)
def test_a_hub_that_cannot_be_reached_is_told(
    run: Path, hub: Hub, here: Here, unverified: list[Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def offline(*given: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_repo", offline)
    done = here("push", str(run), "me/tea")
    assert done.returncode == 4
    assert "me/tea: the hub refuses, or cannot be reached: nobody answers" in done.stderr


def test_a_name_that_cannot_be_is_refused(run: Path, here: Here, unverified: list[Path]) -> None:
    done = here("push", str(run), "me/tea/cup")
    assert done.returncode == 2
    assert "a name such as you/your-model" in done.stderr and unverified == []


def test_a_merged_model_goes_in_place_of_the_adapter(
    run: Path, hub: Hub, here: Here, unverified: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert here("merge", str(run), str(out)).returncode == 0
    done = here("push", str(run), "me/tea", "--merged", str(out))
    assert done.returncode == 0, done.stderr
    ((_, files),) = hub.commits
    assert {"model.safetensors", "config.json", "README.md", "alignctl.json"} <= set(files)
    assert "adapter_model.safetensors" not in files
    assert "left out: model the merged model takes its place" in done.stdout


def test_a_merged_model_that_was_changed_stays_here(
    run: Path, hub: Hub, here: Here, unverified: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert here("merge", str(run), str(out)).returncode == 0
    file = out / "model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file)
    done = here("push", str(run), "me/tea", "--merged", str(out))
    assert done.returncode == 6
    assert "model.safetensors is not the file that was compared with the adapter" in done.stderr
    shutil.copyfile(out / "config.json", out / "alignctl.json")
    assert "is no merged model — alignctl merge" in here("push", str(run), "me/tea", "--merged", str(out)).stderr
    assert hub.commits == []


def test_a_merged_model_of_another_adapter_is_refused(
    run: Path, hub: Hub, here: Here, unverified: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert here("merge", str(run), str(out)).returncode == 0
    file = run / "model" / "adapter_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)
    done = here("push", str(run), "me/tea", "--merged", str(out))
    assert done.returncode == 2
    assert "was merged from another adapter" in done.stderr and hub.commits == []
