"""What counts as a secret, in which spellings, and what becomes of the files that hold one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from alignctl import quiet, secrets
from alignctl.terminal import as_json, harmless

ODD = 'pass"word/ü 5\\'


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that holds no other secret."""
    for name in os.environ:
        if any(part in name.upper() for part in ("TOKEN", "KEY", "SECRET", "PASSWORD")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(secrets, "_read", set())


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET_1", "DB_PASSWORD", "hf_token"])
def test_a_telling_name_makes_its_value_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ab12cd34")
    assert secrets.hide("token ab12cd34, again ab12cd34.") == f"token ${{oc.env:{name}}}, again ${{oc.env:{name}}}."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "ab12cd3"),
        ("HF_TOKEN", "12345678"),
        ("HF_TOKEN", "1.234567e-05"),
        ("HF_TOKEN", ""),
        ("HOME_PAGE", "ab12cd34"),
        ("TOKENIZER_NAME", "ab12cd34"),
        ("TOKENIZERS_PARALLELISM", "ab12cd34"),
    ],
)
def test_what_is_no_secret(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    text = f"a {value} b"
    assert secrets.hide(text) == text


def test_what_a_recipe_reads_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNCTL_PLACE", "ab12cd34")
    assert secrets.hide("ab12cd34") == "ab12cd34"
    secrets.note("ALIGNCTL_PLACE")
    assert secrets.hide("ab12cd34") == "${oc.env:ALIGNCTL_PLACE}"
    monkeypatch.delenv("ALIGNCTL_PLACE")
    assert secrets.hide("ab12cd34") == "ab12cd34"


def test_a_secret_in_another_one_does_not_leave_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "ab12cd34")
    monkeypatch.setenv("B_TOKEN", "ab12cd34-ef56")
    assert secrets.hide("ab12cd34-ef56 ab12cd34") == "${oc.env:B_TOKEN} ${oc.env:A_TOKEN}"


@pytest.mark.parametrize(
    "written",
    [
        ODD,
        json.dumps(ODD),
        json.dumps(ODD, ensure_ascii=False),
        "pass%22word/%C3%BC%205%5C",
        "pass%22word%2F%C3%BC%205%5C",
    ],
)
def test_every_spelling_is_found(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f" {ODD}\n")
    assert secrets.hide(f"<{written}>").strip('<">') == "${oc.env:HF_TOKEN}"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("https://me:open@example.org/x", "https://***@example.org/x"),
        ("postgres://:open@example.org", "postgres://***@example.org"),
        ("https://example.org:8080/a@b", "https://example.org:8080/a@b"),
        ("ssh://git@example.org", "ssh://git@example.org"),
        ("https://me:${oc.env:PW}@example.org", "https://me:${oc.env:PW}@example.org"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "hf_***"),
        ("hf_hub_download", "hf_hub_download"),
    ],
)
def test_what_tells_itself(text: str, without: str) -> None:
    assert secrets.hide(text) == without


def test_keys_and_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "training")
    value = {"training": ["in training", 5, None, True, ("training",)]}
    assert secrets.hidden(value) == {"training": ["in ${oc.env:HF_TOKEN}", 5, None, True, ["${oc.env:HF_TOKEN}"]]}


def test_the_terminal_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ODD)
    assert harmless(f"\x1b{ODD}") == "\ufffd${oc.env:HF_TOKEN}"
    assert json.loads(as_json({"a": [ODD]})) == {"a": ["${oc.env:HF_TOKEN}"]}


def test_a_run_folder_is_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ODD)
    outside = tmp_path / "outside.log"
    outside.write_text(ODD, encoding="utf-8")
    run = tmp_path / "run"
    for folder in ("model", "logs", "checkpoints/step-1"):
        (run / folder).mkdir(parents=True)
    for name in ("model/config.json", "model/tokenizer.json", "checkpoints/step-1/config.json"):
        (run / name).write_text(json.dumps({"a": ODD, "n": 1}), encoding="utf-8")
    (run / "logs" / "broken.json").write_text(f"{ODD} {{", encoding="utf-8")
    (run / "logs" / "libraries.log").write_bytes(f"{ODD}\n".encode() + b"\xff\n")
    (run / "logs" / "link.log").symlink_to(outside)
    (run / "training_args.bin").write_bytes(b"\x80\x02" + ODD.encode())
    with pytest.raises(KeyError), secrets.kept_out(run):
        raise KeyError
    assert json.loads((run / "model/config.json").read_text()) == {"a": "${oc.env:HF_TOKEN}", "n": 1}
    assert json.loads((run / "model/tokenizer.json").read_text())["a"] == ODD
    assert json.loads((run / "checkpoints/step-1/config.json").read_text())["a"] == ODD
    assert (run / "logs/broken.json").read_text() == "${oc.env:HF_TOKEN} {"
    assert (run / "logs/libraries.log").read_bytes() == b"${oc.env:HF_TOKEN}\n\xff\n"
    assert (run / "logs/link.log").is_symlink() and outside.read_text(encoding="utf-8") == ODD
    assert not (run / "training_args.bin").exists()
    secrets.sweep(run / "checkpoints")
    assert json.loads((run / "checkpoints/step-1/config.json").read_text())["a"] == "${oc.env:HF_TOKEN}"
    assert not list(run.rglob("*.writing"))


def test_a_file_without_secrets_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ODD)
    file = tmp_path / "config.json"
    file.write_text('{"a":1}', encoding="utf-8")
    before = file.stat().st_ino
    secrets.sweep(tmp_path)
    assert file.stat().st_ino == before and file.read_text() == '{"a":1}'


def test_what_libraries_say_is_cleaned_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ODD)
    log = tmp_path / "libraries.log"
    with pytest.raises(KeyError), quiet.libraries(log):
        os.write(2, f"GET {ODD}\n".encode())
        raise KeyError
    assert log.read_text(encoding="utf-8") == "GET ${oc.env:HF_TOKEN}\n"
    with quiet.libraries(Path(os.devnull)):
        os.write(2, ODD.encode())
    assert not Path(os.devnull).is_file()
