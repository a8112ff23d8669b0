"""Nothing secret is written down or shown."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignctl.cli import training
from alignctl.rundir import RunDir
from alignctl.train import preflight, verify

Train = Callable[..., Any]
Here = Callable[..., subprocess.CompletedProcess[str]]
# 5: secrets.

TOKEN = 'tok"en/ü-5ecret9'


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("ALIGNCTL_PRIVATE", "pr1vate-revision")
    return TOKEN


def told(ran: Any) -> list[str]:
    """Where a run tells a secret, in any spelling: files of its folder, stdout, stderr."""
    spelled = {form.encode() for form in (TOKEN, json.dumps(TOKEN)[1:-1], "%C3%BC-5ecret9", "5ecret9", "pr1vate")}
    found = {str(path): path.read_bytes() for path in ran.folder.rglob("*") if path.is_file()}
    found |= {"stdout": ran.out.encode(), "stderr": ran.err.encode()}
    return [name for name, content in found.items() if any(form in content for form in spelled)]


def saying(monkeypatch: pytest.MonkeyPatch, what: str, then: Exception | None = None) -> None:
    """Let a library say `what` on both streams of the process before the first step, and then fail or go on."""
    examine = preflight.examine

    def examined(*given: Any, **more: Any) -> None:
        os.write(1, f"GET {what}\n".encode())
        os.write(2, f"{what}\n".encode())
        subprocess.run(["sh", "-c", 'echo "$1" >&2', "sh", json.dumps(what)], check=True)
        if then is not None:
            raise then
        examine(*given, **more)

    monkeypatch.setattr(preflight, "examine", examined)


def test_what_a_library_prints_is_not_kept(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, secret)
    ran = train()
    assert ran.code == 0 and told(ran) == []
    log = (ran.folder / "logs" / "libraries.log").read_text(encoding="utf-8")
    assert "GET ${oc.env:HF_TOKEN}\n${oc.env:HF_TOKEN}\n" in log and '"${oc.env:HF_TOKEN}"' in log


def test_an_error_that_holds_a_secret(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, secret, ValueError(f"401 for https://me:{secret}@example.org"))
    ran = train()
    assert ran.code == 1 and told(ran) == []
    assert ran.record["status"] == "failed" and "https://me:${oc.env:HF_TOKEN}@example.org" in ran.record["why"]
    assert "https://me:${oc.env:HF_TOKEN}@example.org" in ran.err


def test_a_secret_on_the_command_line(train: Train, secret: str) -> None:
    words = [f"trl.run_name='https://me:{secret}@example.org'", f"model.revision='{secret}'"]
    ran = train("dpo", None, *words, data={"eval_fraction": 0.25}, evaluation={"samples": 2, "max_new_tokens": 4})
    assert ran.code == 0, ran.err
    assert told(ran) == []
    assert "'model.revision='\"'\"'${oc.env:HF_TOKEN}" in ran.record["command"]
    kept = yaml.safe_load((ran.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["revision"] == "${oc.env:HF_TOKEN}"
    assert kept["trl"]["run_name"] == "https://me:${oc.env:HF_TOKEN}@example.org"


def test_a_secret_in_the_recipe(train: Train, secret: str) -> None:
    names = {"revision": "${oc.env:ALIGNCTL_PRIVATE}"}
    ran = train(model=names, trl={"run_name": "${oc.env:ALIGNCTL_PRIVATE}"}, training={"save_steps": 2})
    assert ran.code == 0 and told(ran) == []
    assert ran.record["model"]["revision"] == "${oc.env:ALIGNCTL_PRIVATE}"
    assert "`${oc.env:ALIGNCTL_PRIVATE}`" in (ran.folder / "model" / "README.md").read_text(encoding="utf-8")


def test_a_place_in_the_recipe(train: Train, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT writes it into the adapter's config, which others cannot load without: the run says so."""
    monkeypatch.setenv("ALIGNCTL_PLACE", str(tiny))
    ran = train(model={"name_or_path": "${oc.env:ALIGNCTL_PLACE}"})
    assert ran.code == 0, ran.err
    said = "adapter_config.json will say ${oc.env:ALIGNCTL_PLACE}, which others cannot load"
    assert f"note: the base's name holds a secret: {said}" in " ".join(ran.out.partition("step 1/4")[0].split())
    assert ran.verdict("saved") == "warned" and "warning: gate.saved: " in ran.out
    assert "names the base as ${oc.env:ALIGNCTL_PLACE}, for a secret is not written" in " ".join(ran.out.split())
    config = json.loads((ran.folder / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "${oc.env:ALIGNCTL_PLACE}"
    texts = [path.read_bytes() for path in ran.folder.rglob("*") if path.is_file()] + [ran.out.encode()]
    assert not any(str(tiny).encode() in text for text in texts)


def test_a_run_that_is_killed_has_told_nothing(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def examined(built: preflight.Built, **given: Any) -> None:
        seen.update({path.name: path.read_text(encoding="utf-8") for path in built.parts.run.glob("*.*")})

    monkeypatch.setattr(preflight, "examine", examined)
    train("dpo", None, f"model.revision='{secret}'")
    assert {"run.json", "recipe.yaml", "ledger.json"} <= set(seen)
    assert [name for name, text in seen.items() if "5ecret9" in text] == []


def test_a_run_that_hides_something_can_be_resumed(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints know what was written to them: the secrets are out before."""
    given = {"trl": {"run_name": "${oc.env:ALIGNCTL_PRIVATE}"}, "training": {"save_steps": 2}}
    with monkeypatch.context() as failing:
        failing.setattr(verify, "note_live", lambda *given: (_ for _ in ()).throw(KeyError(secret)))
        ran = train("dpo", None, f"model.revision='{secret}'", **given)
    assert ran.code == 1 and ran.record["status"] == "failed" and told(ran) == []
    ran = train("dpo", None, f"model.revision='{secret}'", "--resume", **given)
    assert ran.code == 0 and ran.record["status"] == "finished", ran.err
    assert told(ran) == []


def test_a_traceback_that_holds_a_secret(train: Train, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, "nothing", ValueError(f"401 for {secret} \x1b]0;title\x07"))
    ran = train("dpo", None, "--debug")
    assert "Traceback" in ran.err and "401 for ${oc.env:HF_TOKEN}" in ran.err
    assert TOKEN not in ran.err and "\x1b" not in ran.err


def test_the_command_that_is_kept_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "ab12cd34")
    monkeypatch.setattr(sys, "argv", ["alignctl", "dpo", "r.yaml", "model.revision=ab12cd34", "--resume"])
    assert training._command_line() == "alignctl dpo r.yaml 'model.revision=${oc.env:HF_TOKEN}'"


def test_what_is_verified_later_holds_no_secret(
    train: Train, here: Here, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def begin(run: RunDir) -> Iterator[None]:
        (run / "logs" / "reload.log").write_text(f"Warning: {secret}\n", encoding="utf-8")
        yield

    ran = train()
    monkeypatch.setattr(verify, "begin", begin)
    monkeypatch.setattr(verify, "reload", lambda *given: None)
    assert here("verify", "run").returncode == 0 and told(ran) == []
    assert (ran.folder / "logs" / "reload.log").read_text(encoding="utf-8") == "Warning: ${oc.env:HF_TOKEN}\n"


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_check_and_inspect_show_no_secret(train: Train, here: Here, secret: str, command: str) -> None:
    row = {"prompt": f"My token is {secret}.", "chosen": "Good to know.", "rejected": "Oh no, it is not."}
    ran = train("dpo", [row], "dpo.bta=1")  # writes the files and stops
    assert ran.code == 2
    for options in ([], ["--json"]):
        done = here(command, "r.yaml", f"model.revision='{secret}'", "data.max_dropped=1", *options)
        assert done.returncode == 0, done.stderr
        assert "5ecret9" not in done.stdout + done.stderr
    assert "My token is ${oc.env:HF_TOKEN}." in done.stdout or command == "check"
