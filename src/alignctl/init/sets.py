"""The data sets of another tool's recipe as sources of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignctl.formats import PREFERENCE, SUPERVISED

Source = dict[str, Any]
Values = dict[str, Any]
_FILES = ("json", "csv", "parquet", "arrow", "text")  # builders of the datasets library, beside `data_files`
# What axolotl calls the shape of a set, by the last word of its `type`.
_SHAPES = {
    "intel": "orca",
    "argilla": "argilla",
    "ultra": "conversational",
    "default": "conversational",
    "prompt_pairs": "prompt-chosen-rejected",
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
}
_COLUMNS = {
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_prompt": "prompt",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_output": "output",
}
# LLaMA-Factory's names for what a column is, by what it is here.
_FACTORY = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "chosen": "chosen",
    "rejected": "rejected",
    "messages": "conversations",
    "system": "system",
}


@dataclass
class Sets:
    """Sources to train on and held-out ones, the keys that spoke of them, and what could not be carried over."""

    key: str
    keys: set[str]
    train: list[Source] = field(default_factory=list)
    eval: list[Source] = field(default_factory=list)
    fraction: float | None = None
    notes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def add(self, source: Source) -> None:
        """A source, on the side that the name of its split speaks of."""
        held = any(word in str(source.get("split", "")).lower() for word in ("test", "eval", "valid", "dev"))
        (self.eval if held else self.train).append({key: value for key, value in source.items() if value is not None})


def find(dialect: str, values: Values, file: Path) -> Sets:
    """The data sets in `values`, a recipe of `dialect`."""
    if dialect == "axolotl":
        return _axolotl(values)
    if dialect == "llamafactory":
        return _factory(values, file)
    if "dataset_mixer" in values:
        return _mixer(values)
    if isinstance(values.get("dataset_mixture"), dict):
        return _mixture("dataset_mixture", values["dataset_mixture"], values)
    if "dataset_name" in values:
        return _named(values)
    return _mixture("datasets", values, values)


def _mixer(values: Values) -> Sets:
    """The handbook's older way: every set with the same splits, and a fraction of each."""
    found = Sets("dataset_mixer", {"dataset_mixer", "dataset_splits", "dataset_configs"})
    given, configs = values["dataset_mixer"], _names(values.get("dataset_configs"))
    for number, (path, fraction) in enumerate(given.items() if isinstance(given, dict) else []):
        name = configs[number] if number < len(configs) else None
        for split in _names(values.get("dataset_splits")) or ["train", "test"]:
            found.add({"path": str(path), "name": name, "split": split})
        if fraction != 1:
            found.left[f"dataset_mixer.{path}"] = f"a fraction of {fraction}; `take` gives a number of rows here"
    return found


def _mixture(key: str, mixture: Values, values: Values) -> Sets:
    """A list of sets, in the handbook and in TRL."""
    found = Sets(key, {key, "test_split_size", "streaming"})
    for number, each in enumerate(_dicts(mixture.get("datasets"))):
        path = each.get("id") or each.get("path")
        for file in _files(path, each.get("data_files")):
            found.add({"path": file, "name": each.get("config") or each.get("name"), "split": each.get("split")})
        if each.get("weight", 1) not in (None, 1):
            what = f"a fraction of {each['weight']}; `take` gives a number of rows here"
            found.left[f"{key}.datasets[{number}].weight"] = what
    size = mixture.get("test_split_size")
    if isinstance(size, float) and size < 1:
        found.fraction = size
    elif size is not None:
        found.left[f"{key}.test_split_size"] = "a number of rows; data.eval_fraction takes a share of the prompts here"
    return found


def _named(values: Values) -> Sets:
    """TRL's one set; its test split is read where the recipe evaluates."""
    keys = {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"}
    found = Sets("dataset_name", keys)
    about = {"path": str(values["dataset_name"]), "name": values.get("dataset_config")}
    train = values.get("dataset_train_split", "train")
    found.train.append({k: v for k, v in (about | {"split": train}).items() if v is not None})
    strategy = values.get("eval_strategy", values.get("evaluation_strategy", "no"))
    test = values.get("dataset_test_split", "test" if strategy not in ("no", False) else None)
    if test is not None:
        found.eval.append({k: v for k, v in (about | {"split": test}).items() if v is not None})
    return found


def _axolotl(values: Values) -> Sets:
    found = Sets("datasets", {"datasets", "test_datasets"})
    for key, into in (("datasets", found.train), ("test_datasets", found.eval)):
        for each in _dicts(values.get(key)):
            for path in _files(each.get("path"), each.get("data_files"), each.get("ds_type")):
                into.append(_axolotl_source(path, each, found))
    return found


def _axolotl_source(path: str, each: Values, found: Sets) -> Source:
    columns = {ours: each[theirs] for theirs, ours in _COLUMNS.items() if each.get(theirs) not in (None, ours)}
    if each.get("field_messages") is not None:
        found.left[f"{path}: field_messages"] = (
            f"{each['field_messages']!r} is found by the shape of the rows, or named in `columns`"
        )
    given = each.get("type")
    shape = _SHAPES.get(given.rpartition(".")[2]) if isinstance(given, str) else None
    if given is not None and shape is None:
        found.left[f"{path}: type"] = f"{given!r:.60} is not known here; the shape is found from the rows"
    elif given is not None:
        found.notes.append(f"{given} there would be {_what(shape)}; the shape is found from the rows")
    source = {"path": path, "name": each.get("name"), "split": each.get("split"), "columns": columns or None}
    return {key: value for key, value in source.items() if value is not None}


def _what(shape: str | None) -> str:
    return next(f"{known.name} ({known.what})" for known in (*PREFERENCE, *SUPERVISED) if known.name == shape)


def _factory(values: Values, file: Path) -> Sets:
    """Names that LLaMA-Factory's dataset_info.json gives a meaning, which is looked for beside the recipe."""
    keys = {"dataset", "eval_dataset", "dataset_dir", "max_samples"}
    found = Sets("dataset", keys)
    folder = Path(str(values.get("dataset_dir", "data")))
    place = next((p for p in (file.parent / folder, folder, file.parent) if (p / "dataset_info.json").is_file()), None)
    known = _info(place / "dataset_info.json") if place else {}
    for key, into in (("dataset", found.train), ("eval_dataset", found.eval)):
        for name in _names(values.get(key)):
            into.append(_factory_source(name, known.get(name), place, values.get("max_samples"), found))
    if values.get("max_samples") is not None:
        found.notes.append("take: max_samples")
    return found


def _factory_source(name: str, about: Any, place: Path | None, most: Any, found: Sets) -> Source:
    source: Source = {"path": name}
    if not isinstance(about, dict) or place is None:
        found.notes.append(f"{name} is a name of LLaMA-Factory's dataset_info.json: give the file or the hub name")
        found.left[f"dataset: {name}"] = "kept as a hub name: no dataset_info.json beside the recipe says what it is"
    elif about.get("hf_hub_url"):
        source = {"path": about["hf_hub_url"], "name": about.get("subset"), "split": about.get("split")}
    elif about.get("file_name"):
        source = {"path": str((place / about["file_name"]).resolve())}
    if isinstance(about, dict) and isinstance(about.get("columns"), dict):
        given = {_FACTORY[what]: theirs for what, theirs in about["columns"].items() if what in _FACTORY and theirs}
        source["columns"] = {ours: theirs for ours, theirs in given.items() if ours != theirs} or None
    source["take"] = most
    return {key: value for key, value in source.items() if value is not None}


def _info(file: Path) -> Values:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _names(given: Any) -> list[str]:
    names = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else []
    return [str(name).strip() for name in names]


def _dicts(given: Any) -> list[Values]:
    return [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []


def _files(path: Any, files: Any, kind: Any = None) -> list[str]:
    """The paths of one entry: a hub name, or files where it names a builder and its files."""
    if files and (path in _FILES or kind in _FILES):
        return [str(file) for file in (files if isinstance(files, list) else [files])]
    return [str(path)] if path else []
