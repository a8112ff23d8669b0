"""A saved model on the hub: which of its files go there, and what stays here and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from alignctl import secrets
from alignctl.errors import MachineError, Problem, RecipeError, VerifyError
from alignctl.recipe.schema import Recipe
from alignctl.rundir import NOTE, RunDir, digests, read_json
from alignctl.train import card

# What the hub's HTTP library raises when nobody answers, whichever library that is.
_NO_ANSWER: type[Exception] = HfHubHTTPError.__bases__[0]
_KINDS = (".safetensors", ".json", ".jinja", ".md", ".txt", ".model")
_STAYS = (
    ("checkpoints", "is for --resume"),
    ("logs", "holds rows of the data, and what the libraries said"),
    ("samples.jsonl", "holds rows of the data"),
    ("ledger.json", "names rows of the data"),
    ("recipe.yaml", "names folders of this machine"),
    ("run.json", "names folders of this machine"),
    ("metrics.jsonl", "the card has the outcome"),
    ("summary.json", "the card has the outcome"),
)


@dataclass(frozen=True)
class Parcel:
    """Files of one folder that are to be uploaded, and what is left out with the reason; `notes` are to be read."""

    folder: Path
    files: list[Path]
    left_out: dict[str, str]
    notes: list[str]

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def parcel(run: RunDir, recipe: Recipe, merged: Path | None) -> Parcel:
    """What is uploaded of a verified run: its model, or the folder in which that was merged.

    Raises:
        RecipeError: `merged` is no merged model of this run.
        VerifyError: a file of it is another one than was compared.
        MachineError: a secret of the environment stands in a file.
    """
    folder = run / "model" if merged is None else _merged(run, merged)
    files, left_out = [], {}
    for path in sorted(folder.iterdir()):
        why = _why_not(path)
        if why:
            left_out[path.name] = why
        else:
            files.append(path)
    for file in files:
        if secrets.found(file):
            what = "holds a secret of the environment"
            raise MachineError(Problem(str(file), what, "take it out of the file, and never use that secret again"))
    stays = {name: why for name, why in _STAYS if (run / name).exists()}
    if merged is not None:
        stays["model"] = "the merged model takes its place"
    return Parcel(folder, files, left_out | stays, _notes(recipe, merged))


def _merged(run: RunDir, folder: Path) -> Path:
    note = read_json(folder / NOTE)
    if not note.get("onto"):
        way_out = f"alignctl merge {run.path} {folder}"
        raise RecipeError(Problem(str(folder), "is no merged model", way_out))
    if note["adapter"] != digests(run / "model").get("adapter_model.safetensors"):
        what = f"was merged from another adapter than that of {run.path}"
        raise RecipeError(Problem(str(folder), what, "name the run that it was merged from, or merge anew"))
    found = digests(folder)
    changed = sorted(name for name, digest in note["files"].items() if found.get(name) != digest)
    if changed:
        what = f"{changed[0]} is not the file that was compared with the adapter"
        raise VerifyError(Problem(str(folder), what, "merge anew"))
    return folder


def _why_not(path: Path) -> str:
    """Why `path` stays here; empty when it does not."""
    if path.is_symlink() or not path.is_file():
        return "is a link or a folder"
    if path.name.startswith("."):
        return "is hidden"
    if path.suffix not in _KINDS:
        return "is neither weights in safetensors nor text that a model needs"
    return ""


def _notes(recipe: Recipe, merged: Path | None) -> list[str]:
    out = []
    base = recipe.model.name_or_path
    if merged is None and recipe.trains_adapter and not card.on_hub(base):
        out.append(f"the base {base} is not on the hub: who loads the adapter needs it; --merged uploads a whole model")
    local = [name for name in (base, *(source.path for source in recipe.data.train)) if Path(name).is_absolute()]
    if local:
        out.append(f"README.md names {local[0]}, a place of this machine")
    return out


def upload(given: Parcel, recipe: Recipe, repo: str, *, private: bool) -> str:
    """Upload in one commit; the address of what came of it.

    Raises:
        RecipeError: the repository is public and should not be.
        MachineError: the hub cannot be reached, or refuses.
    """
    api = HfApi(library_name="alignctl")
    try:
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(name).private:
            what = "exists and is public, and --private does not change that"
            raise RecipeError(Problem(name, what, "name another repository, or make it private on its settings page"))
        operations = [CommitOperationAdd(file.name, _content(file, recipe)) for file in given.files]
        message = f"{recipe.method.upper()} by alignctl"
        return str(api.create_commit(name, operations, commit_message=message).commit_url)
    except (_NO_ANSWER, OSError) as error:
        what = f"the hub refuses, or cannot be reached: {' '.join(str(error).split())}"
        raise MachineError(Problem(repo, what, "check the network, the name and what the token may do")) from error


def _content(file: Path, recipe: Recipe) -> Path | bytes:
    """What is uploaded of `file`: itself; but an adapter names its base as the recipe does, not by a folder here."""
    if file.name != "adapter_config.json":
        return file
    config = read_json(file)
    name = recipe.model.name_or_path
    config["base_model_name_or_path"] = Path(name).name if Path(name).expanduser().is_dir() else name
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
