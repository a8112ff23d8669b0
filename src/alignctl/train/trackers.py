"""Experiment trackers (`logging.report_to`), each through its own public API.

A tracker is handed the resolved recipe without its secrets, every line of metrics.jsonl, the held-out numbers before
and after training, the verdict, and where the run and its report are. None of them asks for a key; what they write
stays in the run folder unless the environment sends it elsewhere; and a tracker that fails is left out, never the run.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from transformers.utils import flatten_dict

from alignctl import secrets
from alignctl.errors import Interrupted, MachineError
from alignctl.evaluate import scores
from alignctl.recipe import tree
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir, read_json
from alignctl.train import needs

PROJECT = "alignctl"
Values = dict[str, Any]


class Tracker(Protocol):
    """One run in a tracker; `look` says how a person sees it."""

    look: str

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Numbers of a step."""

    def close(self, texts: dict[str, str], *, failed: bool) -> None:
        """The end of the run, with what is to be read of it."""


class TensorBoard:
    """Event files in `logs/tensorboard`; lines that a resumed run writes again are taken back."""

    def __init__(self, run: RunDir, config: Values, resumed: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "logs" / "tensorboard"
        self.look = f"tensorboard --logdir {run.path.parent}"
        self._writer = SummaryWriter(str(folder), purge_step=None if resumed is None else resumed + 1)
        self._writer.add_text("recipe", f"```yaml\n{tree.dump(config)}```")

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, texts: dict[str, str], *, failed: bool) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, text)
        self._writer.close()


class Trackio:
    """A local database: of the run, or of `TRACKIO_DIR`, where runs can be seen side by side."""

    def __init__(self, run: RunDir, config: Values, resumed: int | None) -> None:
        folder = os.environ.setdefault("TRACKIO_DIR", str((run / "logs" / "trackio").absolute()))
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.look = f"TRACKIO_DIR={folder} trackio show --project {project}"
        resume = "never" if resumed is None else "allow"
        trackio.init(project, run.path.name, config=config, resume=resume, embed=False)
        self._trackio = trackio

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._trackio.log(numbers, step=step)

    def close(self, texts: dict[str, str], *, failed: bool) -> None:
        said = "\n".join(f"- {name}: {text}" for name, text in texts.items())
        self._trackio.log({"outcome": self._trackio.Markdown(said)})
        self._trackio.finish()


class Wandb:
    """A run of Weights & Biases: on this machine, unless there is a key or a mode in the environment."""

    def __init__(self, run: RunDir, config: Values, resumed: int | None) -> None:
        import wandb

        if not os.environ.get("WANDB_API_KEY"):
            os.environ.setdefault("WANDB_MODE", "offline")
        # What it gathers by itself holds the command line, which may hold a secret.
        settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.path.name,
            id=run.record.get("tracker", {}).get("id") if resumed is not None else None,
            resume="allow",
            config=config,
            dir=str((run / "logs").absolute()),
            settings=settings,
        )
        self.id = self._run.id
        self.look = self._run.url or f"wandb sync {Path(self._run.dir).parent}"
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def close(self, texts: dict[str, str], *, failed: bool) -> None:
        self._run.summary.update(texts)
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """An MLflow run: in a database of the run, or where `MLFLOW_TRACKING_URI` points."""

    MOST = 100  # parameters that MLflow takes at once

    def __init__(self, run: RunDir, config: Values, resumed: int | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        folder = (run / "logs" / "mlflow").absolute()
        if "MLFLOW_TRACKING_URI" not in os.environ:
            folder.mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        self.look = f"mlflow ui --backend-store-uri {mlflow.get_tracking_uri()}"
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        before = run.record.get("tracker", {}).get("id") if resumed is not None else None
        self.id = mlflow.start_run(run_id=before, run_name=run.path.name).info.run_id
        self._mlflow = mlflow
        params = list(_flat(config).items()) if before is None else []
        for start in range(0, len(params), self.MOST):
            mlflow.log_params(dict(params[start : start + self.MOST]))

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(numbers, step=step)

    def close(self, texts: dict[str, str], *, failed: bool) -> None:
        self._mlflow.set_tags(texts)
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


BUILD: dict[str, Callable[[RunDir, Values, int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


class Tracking:
    """The run's tracker, if it has one; when it fails, one line says so and it is left out from there."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._tracker: Tracker | None = None

    def open(self, run: RunDir, resumed: int | None) -> None:
        """Begin, or go on behind step `resumed`."""
        if self._name == "none":
            return
        config = tree.read(run / "recipe.yaml").values
        with self._harmless():
            self._tracker = BUILD[self._name](run, config, resumed)
            run.update(tracker={"name": self._name, "id": getattr(self._tracker, "id", None)})
            self._say(f"{self._name}: {self._tracker.look}")

    def row(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl, under the names that transformers gives."""
        renamed = {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in row.items() if k != "step"}
        self.log(renamed, row["step"])

    def held_out(self, run: RunDir, when: str, step: int) -> None:
        """What was measured `before` or `after` training."""
        found = read_json(run / "logs" / f"{when}.json") if self._tracker is not None else {}
        if found:
            numbers = {"loss": found["loss"], **scores.from_lists(found["scores"]).summary()}
            self.log({f"heldout/{name}": value for name, value in numbers.items()}, step)

    def log(self, values: Values, step: int) -> None:
        """The numbers among `values`."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        with self._harmless():
            if self._tracker is not None:
                self._tracker.log(finite, step)

    def close(self, run: RunDir, *, failed: bool) -> None:
        """The end, with what is known of it."""
        with self._harmless():
            if self._tracker is not None:
                self._tracker.close(_texts(run), failed=failed)

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever a tracker raises, the run goes on)
            self._tracker = None
            said = " ".join((str(error) or "no message").split())
            self._say(f"note: {self._name} failed and is left out from here on: {type(error).__name__}: {said}")


def check(recipe: Recipe) -> None:
    """Whether the recipe's tracker is there.

    Raises:
        MachineError: it is not installed.
    """
    if missing := needs.tracker(recipe.logging.report_to):
        raise MachineError(missing)


@contextlib.contextmanager
def tracking(recipe: Recipe, run: RunDir, say: Callable[[str], None], resumed: int | None) -> Iterator[Tracking]:
    """The tracker of a run, closed when the block inside ends, however it ends."""
    tracker = Tracking(recipe.logging.report_to, say)
    tracker.open(run, resumed)
    try:
        yield tracker
    except (Exception, Interrupted):
        tracker.close(run, failed=True)
        raise
    tracker.close(run, failed=False)


def _texts(run: RunDir) -> dict[str, str]:
    """What is to be read at the end: the verdict with its interval, the run, and its report where there is one."""
    summary = read_json(run / "summary.json")
    out = {"run": str(run.path.absolute())}
    if (run / "report.html").is_file():
        out["report"] = str((run / "report.html").absolute())
    if summary:
        out["verdict"] = str(summary["verdict"])
    if "difference" in summary:
        low, high = summary["difference_interval"]
        out["difference"] = (
            f"{summary['measure']} {summary['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
        )
    return {name: secrets.hide(text) for name, text in out.items()}


def _flat(config: Values) -> dict[str, str]:
    """A recipe as dotted keys and texts."""
    return {key: str(value) for key, value in flatten_dict(config, delimiter=".").items()}
