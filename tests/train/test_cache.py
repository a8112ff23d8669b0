"""Encoded rows on disk: found again when nothing changed, made anew when anything did, and never half written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pytest
from transformers import PreTrainedTokenizerBase

from alignctl.errors import DataError, MachineError
from alignctl.recipe import catalog
from alignctl.recipe.schema import Recipe
from alignctl.train import cache, data, encode, tokens, workers
from alignctl.train.data import Rows
from alignctl.train.encode import Job
from alignctl.train.files import RawRow
from alignctl.train.tokens import Encoder, Limit

MakeRecipe = Callable[..., Recipe]
MakeTokenizer = Callable[[str], PreTrainedTokenizerBase]
WriteRows = Callable[..., Path]
Row = dict[str, Any]


def pair(prompt: str, chosen: str = "Leaves.", rejected: str = "Stones.") -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


ROWS = [pair("Tea?"), pair("Coffee?", "Beans."), pair("Empty?", ""), pair("Milk?", "Cows.")]


@pytest.fixture
def path(write_rows: WriteRows) -> Path:
    return write_rows(ROWS)


def read(recipe: Recipe, encoder: Encoder) -> Rows:
    return data.read(recipe, encoder)[0]


def missed(recipe: Recipe, encoder: Encoder) -> bool:
    """Whether any of the recipe's rows were encoded anew."""
    return any(part.cache.startswith("miss ") for part in read(recipe, encoder).sources)


def entries() -> list[Path]:
    """What the cache holds, rests of unfinished writing included."""
    return sorted(cache.folder().iterdir()) if cache.folder().exists() else []


def content(rows: Rows) -> dict[str, Any]:
    """Everything about rows but how long they took."""
    said = rows.summary()
    for part in said["sources"]:
        part.pop("cache")
    return {"table": rows.table.to_pylist(), "said": said, "shapes": [part.shape.name for part in rows.sources]}


def entry_file(recipe: Recipe, encoder: Encoder, name: str = "rows.arrow") -> Path:
    """A file of the only entry, which is made."""
    read(recipe, encoder)
    (entry,) = entries()
    return entry / name


def test_the_second_time_is_a_hit(encoder: Encoder, path: Path, data_recipe: MakeRecipe) -> None:
    recipe = data_recipe("dpo", path)
    first, second = read(recipe, encoder), read(recipe, encoder)
    assert [rows.sources[0].cache.split()[0] for rows in (first, second)] == ["miss", "hit"]
    assert content(first) == content(second)
    assert first.sources[0].cache.split()[1] == f"{entries()[0].name[:12]},"
    assert [file.name for file in sorted(entries()[0].iterdir())] == ["ledger.json", "rows.arrow"]


def test_a_hit_reads_no_row(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = data_recipe("dpo", path)
    read(recipe, encoder)
    monkeypatch.setattr(encode.sources, "read", None)
    assert not missed(recipe, encoder)


# --- what makes an entry another one ---

CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_length": ({}, {"max_length": 999}),
    "overlong": ({}, {"overlong": "truncate_prompt"}),
    "format": ({"format": "prompt-chosen-rejected"}, {}),
    "columns": ({"columns": {"prompt": "prompt"}}, {}),
    "take": ({"take": 2}, {}),
    "tie_margin": ({"tie_margin": 0.5}, {}),
    "rejected": ({"rejected": "random"}, {}),
}
UNCHANGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "weight": ({"weight": 0.5}, {}),
    "eval_fraction": ({}, {"eval_fraction": 0.5}),
    "max_dropped": ({}, {"max_dropped": 0.9}),
    "seed": ({}, {"seed": 43}),
}


@pytest.mark.parametrize(("source", "settings"), CHANGED.values(), ids=CHANGED.keys())
def test_what_makes_other_rows(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, source: dict[str, Any], settings: dict[str, Any]
) -> None:
    read(data_recipe("dpo", path), encoder)
    changed = data_recipe("dpo", path, source, **settings)
    assert missed(changed, encoder)
    assert not missed(changed, encoder)
    assert not missed(data_recipe("dpo", path), encoder)
    assert len(entries()) == 2


@pytest.mark.parametrize(("source", "settings"), UNCHANGED.values(), ids=UNCHANGED.keys())
def test_what_makes_no_other_rows(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, source: dict[str, Any], settings: dict[str, Any]
) -> None:
    read(data_recipe("dpo", path), encoder)
    assert not missed(data_recipe("dpo", path, source, **settings), encoder)


def test_the_seed_makes_other_rows_where_it_picks_them(encoder: Encoder, path: Path, data_recipe: MakeRecipe) -> None:
    recipes = [data_recipe("dpo", path, {"rejected": "random"}, seed=seed) for seed in (1, 2, 1)]
    assert [missed(recipe, encoder) for recipe in recipes] == [True, True, False]


def test_a_changed_file_makes_other_rows(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    found = []
    for rows in (ROWS, [pair("Tee?"), *ROWS[1:]], ROWS[::-1], ROWS):
        found.append(missed(data_recipe("dpo", write_rows(rows)), encoder))
    assert found == [True, True, True, False]


def test_the_folder_of_a_file_does_not_matter(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Places name the file alone, so a moved set is the same; under another name it has other places."""
    read(data_recipe("dpo", path), encoder)
    (tmp_path / "moved").mkdir()
    assert not missed(data_recipe("dpo", Path(shutil.copy(path, tmp_path / "moved"))), encoder)
    renamed = data_recipe("dpo", Path(shutil.copy(path, tmp_path / "other.jsonl")))
    assert missed(renamed, encoder)
    assert read(renamed, encoder).place(0) == "other.jsonl:1"


def test_a_template_or_tokenizer_makes_other_rows(
    make_tokenizer: MakeTokenizer, path: Path, data_recipe: MakeRecipe
) -> None:
    def build(family: str, template: str, *extra: str, more: str = "") -> Encoder:
        tokenizer = make_tokenizer(family)
        tokenizer.add_tokens(list(extra))
        tokenizer.chat_template = catalog.template(template) + more
        return tokens.encoder(tokenizer)

    recipe = data_recipe("dpo", path)
    variants = [
        build("mistral", "zephyr"),
        build("mistral", "chatml"),
        build("mistral", "zephyr", more="{# another #}"),
        build("qwen2", "zephyr"),
        build("mistral", "zephyr", "[mask]"),
    ]
    assert [missed(recipe, encoder) for encoder in variants] == [True] * 5
    assert not missed(recipe, build("mistral", "zephyr"))


def test_padding_makes_no_other_rows(make_tokenizer: MakeTokenizer, path: Path, data_recipe: MakeRecipe) -> None:
    """Generation pads its prompts with the same tokenizer, which remembers that."""
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = catalog.template("chatml")
    encoder = tokens.encoder(tokenizer)
    read(data_recipe("dpo", path), encoder)
    tokenizer(["Tea?", "A longer one?"], padding=True)
    assert not missed(data_recipe("dpo", path), encoder)


@pytest.mark.parametrize("name", ["rows.py", "tokens.py", "encode.py", "files.py"])
def test_our_own_code_makes_other_rows(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = data_recipe("dpo", path)
    read(recipe, encoder)
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: plain(self) + (b"#" if self.name == name else b""))
    assert missed(recipe, encoder)


# --- entries that are not what they should be ---

DAMAGE: dict[str, Callable[[Path], object]] = {
    "no table": lambda entry: (entry / "rows.arrow").unlink(),
    "no ledger": lambda entry: (entry / "ledger.json").unlink(),
    "empty table": lambda entry: (entry / "rows.arrow").write_bytes(b""),
    "empty ledger": lambda entry: (entry / "ledger.json").write_bytes(b""),
    "half a ledger": lambda entry: (entry / "ledger.json").write_bytes((entry / "ledger.json").read_bytes()[:-9]),
    "no table but text": lambda entry: (entry / "rows.arrow").write_text("a text\n" * 99),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_mended(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, damage: Callable[[Path], object]
) -> None:
    recipe = data_recipe("dpo", path)
    first = content(read(recipe, encoder))
    damage(entries()[0])
    again = read(recipe, encoder)
    assert again.sources[0].cache.startswith("miss ")
    assert content(again) == first
    assert not missed(recipe, encoder)


def test_a_table_cut_off_anywhere_is_mended(encoder: Encoder, path: Path, data_recipe: MakeRecipe) -> None:
    recipe = data_recipe("dpo", path)
    file = entry_file(recipe, encoder)
    whole = file.read_bytes()
    for size in range(0, len(whole) - 8, 61):
        file.write_bytes(whole[:size])
        assert missed(recipe, encoder), size


def test_a_table_cut_off_before_its_rows_is_mended(encoder: Encoder, path: Path, data_recipe: MakeRecipe) -> None:
    """A stream may end behind any batch, so that nothing but the ledger tells that there were more."""
    recipe = data_recipe("dpo", path)
    file = entry_file(recipe, encoder)
    whole = file.read_bytes()
    begin = pyarrow.ipc.open_stream(whole).schema.serialize().to_pybytes()
    assert whole.startswith(begin)
    file.write_bytes(begin)
    assert missed(recipe, encoder)


def test_bytes_that_are_no_text_are_mended(encoder: Encoder, path: Path, data_recipe: MakeRecipe) -> None:
    recipe = data_recipe("dpo", path)
    file = entry_file(recipe, encoder)
    file.write_bytes(file.read_bytes().replace(b'{"prompt": [{"role"', b"\xff" * 19))
    assert missed(recipe, encoder)


@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_a_stale_entry_is_noticed(encoder: Encoder, path: Path, data_recipe: MakeRecipe, column: str) -> None:
    recipe = data_recipe("dpo", path)
    file = entry_file(recipe, encoder)
    first = content(read(recipe, encoder))
    table = pyarrow.ipc.open_stream(file.read_bytes()).read_all()
    changed = [[*ids[:-1], ids[-1] + 1] for ids in table[column].to_pylist()]
    table = table.set_column(
        table.column_names.index(column),
        table.schema.field(column),
        pyarrow.array(changed, table.schema.field(column).type),
    )
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    again = read(recipe, encoder)
    assert again.sources[0].cache.startswith("miss ")
    assert content(again) == first


def test_an_entry_of_other_words_is_noticed(encoder: Encoder, path: Path, data_recipe: MakeRecipe) -> None:
    recipe = data_recipe("dpo", path)
    file = entry_file(recipe, encoder)
    file.write_bytes(file.read_bytes().replace(b"Stones.", b"Stoner."))
    assert missed(recipe, encoder)


# --- writing ---


def test_a_failed_encoding_leaves_nothing(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    recipe = data_recipe("dpo", write_rows([*ROWS, {**pair("Tea?"), "chosen": 3}]))
    with pytest.raises(DataError):
        read(recipe, encoder)
    assert entries() == []


def test_an_interrupted_encoding_leaves_nothing(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encode.workers, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(data_recipe("dpo", path), encoder)
    assert entries() == []


def fail(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_cache_that_cannot_be_written(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = data_recipe("dpo", path)
    monkeypatch.setattr(cache.tempfile, "TemporaryDirectory", fail)
    with pytest.raises(MachineError) as error:
        read(recipe, encoder)
    assert error.value.exit_code == 4
    assert str(error.value).startswith(f"{cache.folder()}: cannot be written: Permission denied — ")
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="cannot be written: Not a directory"):
        read(recipe, encoder)


def test_a_hit_in_a_cache_that_cannot_be_written(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = data_recipe("dpo", path)
    read(recipe, encoder)
    for module, name in ((os, "utime"), (os, "mkdir"), (cache.tempfile, "TemporaryDirectory")):
        monkeypatch.setattr(module, name, fail)
    assert not missed(recipe, encoder)


def test_another_run_was_faster(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It made the entry between our look at the cache and our writing."""
    recipe = data_recipe("dpo", path)
    first = content(read(recipe, encoder))
    monkeypatch.setattr(encode, "_holds", lambda *_: False)
    monkeypatch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)
    assert content(read(recipe, encoder)) == first


def test_entries_out_of_use_are_removed(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    recipes = [data_recipe("dpo", write_rows([pair(f"Tea {i}?")], f"{i}.jsonl")) for i in range(4)]
    made: list[Path] = []
    for recipe in recipes[:3]:
        read(recipe, encoder)
        made += [entry for entry in entries() if entry not in made]
    day = 24 * 3600
    for entry, days in zip(made, (31, 29, 31), strict=True):
        os.utime(entry, (time.time() - days * day,) * 2)
    read(recipes[2], encoder)  # used again today
    read(recipes[3], encoder)
    assert made[0] not in entries()
    assert {made[1], made[2]} <= set(entries())
    assert len(entries()) == 3


def test_an_entry_that_goes_while_old_ones_are_looked_for(
    encoder: Encoder, path: Path, data_recipe: MakeRecipe
) -> None:
    """Another run's unfinished entry is renamed between being listed and being looked at."""
    cache.folder().mkdir(parents=True)
    (cache.folder() / "gone").symlink_to("nowhere")
    assert missed(data_recipe("dpo", path), encoder)


# --- many processes ---


def test_a_job_works_in_another_process(encoder: Encoder, data_recipe: MakeRecipe, path: Path) -> None:
    """It is pickled, and gives the same there."""
    source = data_recipe("dpo", path).data.train[0]
    job = Job(encoder, "dpo", source, Limit(1024), 42, "prompt-chosen-rejected", {})
    rows = [RawRow(f"rows.jsonl:{i}", row) for i, row in enumerate([*ROWS, {**ROWS[0], "chosen": 3}], 1)]
    here, there = job(rows), pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(job))(rows)))
    assert (here.batch, here.ledger, here.errors) == (there.batch, there.ledger, there.errors)
    assert here.batch is not None
    assert here.batch["place"].to_pylist() == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    assert here.errors == [("rows.jsonl:5", "`chosen` is a number, expected a string")]


def test_chunks_and_processes_change_nothing(
    encoder: Encoder,
    write_rows: WriteRows,
    data_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    rows = [pair(f"Tea {i}?", "Leaves. " * (i % 5), f"Stones {i % 3}.") for i in range(60)]
    recipe = data_recipe("dpo", write_rows(rows))
    first = content(read(recipe, encoder))
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(encode, "_CHUNK", 7)
    monkeypatch.setattr(workers, "FEW", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    second = content(read(recipe, encoder))
    assert json.dumps(second) == json.dumps(first)
