"""`alignctl push`: a verified model to the hub, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from alignctl.cli import verify
from alignctl.errors import MachineError, Problem, RecipeError
from alignctl.recipe.load import load
from alignctl.rundir import RunDir
from alignctl.terminal import harmless

if TYPE_CHECKING:
    from alignctl.proof.publish import Parcel


def command(folder: Path, repo: str, merged: Path | None, *, private: bool, dry_run: bool) -> None:
    """Verify the run in `folder`, say what is uploaded, and upload it.

    Raises:
        RecipeError: the name cannot be one of a repository.
        MachineError: there is no token, or the hub refuses.
        VerifyError: the saved model is not the trained one; nothing was uploaded.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(Problem("REPO", str(error).splitlines()[0], "a name such as you/your-model")) from error
    if not dry_run and get_token() is None:
        what = "there is no token to log in with"
        raise MachineError(Problem("huggingface_hub", what, "hf auth login, or HF_TOKEN in the environment"))
    verify.command(folder)
    run = RunDir(folder)
    recipe = load(run / "recipe.yaml").recipe
    from alignctl.proof import publish

    parcel = publish.parcel(run, recipe, merged)
    where = f"{repo} ({'private' if private else 'as it is there, public if it is new'})"
    _show(parcel, where)
    if dry_run:
        typer.echo("nothing was uploaded: --dry-run")
        return
    typer.echo(harmless(f"uploaded: {publish.upload(parcel, recipe, repo, private=private)}"))


def _show(parcel: Parcel, where: str) -> None:
    rows = [(f"{file.stat().st_size:,}", file.name) for file in parcel.files]
    rows.append((f"{parcel.bytes:,}", f"bytes from {parcel.folder} to {where}"))
    width = max(len(size) for size, _ in rows)
    for size, name in rows:
        typer.echo(harmless(f"{size:>{width}}  {name}"))
    for name, why in parcel.left_out.items():
        typer.echo(harmless(f"left out: {name} {why}"))
    for note in parcel.notes:
        typer.echo(harmless(f"note: {note}"))
