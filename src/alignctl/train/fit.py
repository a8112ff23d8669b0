"""Run a recipe: prepare, train, save, summarise."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from alignctl import rundir, secrets
from alignctl.errors import DivergedError, Interrupted, MachineError, Problem, RecipeError
from alignctl.plan import report
from alignctl.recipe.load import Loaded
from alignctl.recipe.schema import Recipe
from alignctl.report import html
from alignctl.rundir import STAND_IN, RunDir, read_json
from alignctl.train import (
    card,
    data,
    dpo,
    facts,
    findings,
    guards,
    heldout,
    machine,
    orpo,
    outcome,
    packing,
    planned,
    preflight,
    reference,
    sft,
    standin,
    trackers,
    trl_seam,
    verify,
)
from alignctl.train.batches import Balanced
from alignctl.train.data import Rows
from alignctl.train.display import Display
from alignctl.train.gates import Gates
from alignctl.train.guards import Signals
from alignctl.train.parts import Parts, models_of
from alignctl.train.parts import engine as engine_of
from alignctl.train.preflight import Built
from alignctl.train.record import NOTE, Checkpoints, Metrics, flush
from alignctl.train.tokenizer import load_encoder
from alignctl.train.trackers import Tracking
from alignctl.train.translate import refused, translated

BUILD: dict[str, Callable[[Recipe, Parts], Trainer]] = {"sft": sft.build, "dpo": dpo.build, "orpo": orpo.build}
# Gates whose answer is known at the end.
LATER = ("finite", "moved", "labels", "drift", "easy", "noise", "length", "answers", "saved", "reload")
PACKAGES = ("alignctl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class Job:
    """One run, assembled: what trains, on what, and where it is written."""

    recipe: Recipe
    parts: Parts
    trainer: Trainer
    train: Rows
    eval: Rows | None
    run: RunDir
    display: Display
    gates: Gates

    def measure(self, when: str) -> None:
        """Score the held-out rows and answer the held-out prompts; kept in the run folder under `when`."""
        if self.eval is None or (self.run / "logs" / f"{when}.json").exists():
            return
        reference = rundir.read_json(self.run / "logs" / "before.json").get("reference")
        with self.display.waiting(f"held-out rows {when} training"):
            found = heldout.score(self.trainer, self.recipe, self.eval, reference)
            answers = heldout.answers(self.trainer, self.recipe, self.parts.encoder, self.eval)
        if not math.isfinite(found.loss):
            raise DivergedError(
                Problem(f"held-out rows {when} training", f"the loss is {found.loss}", "lower training.learning_rate")
            )
        values = {"loss": found.loss, "scores": found.scores.as_lists(), "reference": found.reference}
        values["answers"] = [vars(answer) for answer in answers]
        rundir.write_json(self.run / "logs" / f"{when}.json", values)


def fit(loaded: Loaded, run: RunDir, display: Display, *, smoke: bool, resume: Path | None) -> None:
    """Train `loaded` into `run`; `resume` is a checkpoint to go on from.

    Raises:
        AlignctlError: whatever went wrong that a user can mend.
    """
    signals = Signals()
    began = time.monotonic()
    with signals.caught(), translated(run):
        trackers.check(loaded.recipe)
        job = assemble(loaded, run, display, smoke=smoke, resume=resume)
        with trackers.tracking(job.recipe, run, display.say, _step(resume)) as tracker:
            train(job, signals, resume, tracker)
            note_memory(job)
            with verify.begin(run) if job.gates.on("reload") else contextlib.nullcontext() as reloading:
                measure_after(job)
                tracker.held_out(run, "after", job.trainer.state.global_step)
                finish(job, began, reloading)


def _step(checkpoint: Path | None) -> int | None:
    return None if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def assemble(loaded: Loaded, run: RunDir, display: Display, *, smoke: bool, resume: Path | None = None) -> Job:
    """Everything up to the first step: device, stand-ins, tokens, ledger, trainer."""
    where = machine.detect()
    if smoke:
        recipe, line = standin.stand_in(loaded.recipe, run / STAND_IN)
        display.say(line)
        recipe = _computable(recipe, where)
        loaded = replace(loaded, recipe=recipe)
    recipe = loaded.recipe
    precision = where.precision(recipe.model.dtype)
    rundir.write_text(run / "recipe.yaml", loaded.text())
    with display.waiting("reading and tokenizing rows"):
        with refused():
            encoder = load_encoder(recipe)
        train_rows, eval_rows = data.prepare(recipe, encoder)
    parts = [("train", train_rows), ("eval", eval_rows)]
    ledger = {name: rows.summary() for name, rows in parts if rows is not None}
    found = [] if smoke else findings.examine(recipe, encoder, train_rows, eval_rows)
    rundir.write_json(run / "ledger.json", ledger | {"findings": [asdict(finding) for finding in found]})
    held_out = eval_rows.dataset() if eval_rows else None
    built = Parts(where, precision, encoder, train_rows.dataset(), held_out, run.path)
    with display.waiting(f"loading {recipe.model.name_or_path}"), refused():
        trainer = BUILD[recipe.method](recipe, built)
    gates = Gates(recipe, run, display.say)
    if resume is not None:
        preflight.same_rows(run, _fingerprints(ledger), gates)
    engine = _engine(recipe, built, trainer, gates)
    if _balances(recipe, packed=engine["packed"]):
        sizes = train_rows.sizes().tolist()
        trl_seam.install_sampler(trainer, Balanced(sizes, *_update(recipe), recipe.training.seed))
    if recipe.dpo is not None and recipe.dpo.precompute_ref_log_probs:
        with display.waiting("the reference's log-probabilities"):
            engine["reference_cache"] = _precompute(trainer, precision, train_rows, eval_rows)
    plan = planned.plan(recipe, built, trainer, train_rows)
    run.update(
        **facts.record(recipe, built, trainer),
        memory=report.record(plan) if plan is not None else {},
        engine=engine,
        versions=_versions(),
        git=_git(),
        data=_fingerprints(ledger),
    )
    display.facts(facts.table(recipe, built, trainer, train_rows, eval_rows) | {"engine": facts.engine(engine)})
    with display.waiting("gates"):
        preflight.examine(Built(recipe, built, trainer, train_rows, gates), resumed=resume is not None)
    display.gates(gates.results)
    warnings = [f"{finding.name}: {finding.said}; {finding.meaning}" for finding in found if finding.warns]
    for notice in [*facts.notices(recipe, built), *warnings]:
        display.say(f"note: {notice}")
    return Job(recipe, built, trainer, train_rows, eval_rows, run, display, gates)


def _precompute(trainer: Trainer, precision: torch.dtype, train: Rows, held_out: Rows | None) -> str:
    """Give training and held-out rows their reference log-probabilities; says where the first came from."""
    trainer.train_dataset, said = reference.precompute(trainer, train, precision)
    if held_out is not None:
        trainer.eval_dataset, _ = reference.precompute(trainer, held_out, precision)
    trainer.precompute_ref_logps = True
    return said


def _update(recipe: Recipe) -> tuple[int, int]:
    """Rows of a forward pass, and passes of an update."""
    return recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps


def _balances(recipe: Recipe, *, packed: bool) -> bool:
    """Whether the rows of an update are dealt to its passes by their tokens."""
    wanted = recipe.training.group_by_length
    if "train_sampling_strategy" in recipe.trl or recipe.training.gradient_accumulation_steps == 1:
        return False
    return packed if wanted == "auto" else wanted


def _engine(recipe: Recipe, parts: Parts, trainer: Trainer, gates: Gates) -> dict[str, Any]:
    """Whether batches are packed, with the first one computed both ways; as run.json holds it.

    Raises:
        DivergedError: packed and padded differ by more than rounding.
        RecipeError: the recipe wants packing, and the model or the device has no attention for it.
    """
    kind = engine_of(recipe, trainer)
    if kind != "packed":
        if gates.on("packed"):
            gates.passed("packed", f"batches are padded: {kind}")
        return {"packed": False, "why": kind}
    if not gates.on("packed"):
        return {"packed": True}
    count = min(recipe.training.per_device_train_batch_size, len(parts.train))
    batch = trainer.data_collator([parts.train[i] for i in range(count)])
    ids, mask = (batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask"))
    try:
        with trainer.accelerator.autocast():
            found = packing.compare(trainer.model, ids, mask, parts.precision)
    except RuntimeError as error:
        if machine.out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if recipe.training.packed is True:
            raise RecipeError(Problem("training.packed", f"cannot be: {said}", "training.packed=auto")) from error
        for model in models_of(trainer):
            packing.uninstall(model)
        gates.passed("packed", f"batches are padded: packed attention fails here: {said}")
        return {"packed": False, "why": f"packed attention fails here: {said}"}
    said = f"the first batch packed and padded differ by {found.worst:.1e}"
    if not found.worst <= found.limit:
        way_out, said = "training.packed=off, and report it", f"{said}, more than rounding ({found.limit:g})"
        gates.stopped("packed", said, way_out, value=found.worst, limit=found.limit)
    gates.passed("packed", said, value=found.worst, limit=found.limit)
    return {"packed": True, **asdict(found)}


def _computable(recipe: Recipe, where: machine.Machine) -> Recipe:
    """A smoke run computes in what the machine has."""
    try:
        where.precision(recipe.model.dtype)
    except MachineError:
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "auto"})})
    return recipe


def train(job: Job, signals: Signals, resume: Path | None, tracker: Tracking) -> None:
    """Measure, and train; `tracker` is told.

    Raises:
        Interrupted: a signal came; the checkpoint is saved.
    """
    checkpoints = Checkpoints(job.run, job.recipe.training.save_total_limit)
    shown = Metrics(job.run, job.parts.machine, len(job.train), job.display.step, tracker.row)
    watching = guards.callbacks(job.trainer, job.recipe, job.train, job.gates)
    if resume is not None and job.gates.on("resume"):
        watching.append(guards.Resumed(read_json(resume / NOTE), job.gates))
    job.measure("before")
    _ask_labels(job)
    if resume is None:
        tracker.held_out(job.run, "before", 0)
    if job.eval is not None:
        watching += _probe(job, job.eval)
    else:
        for name in outcome.HELD_OUT:
            if job.gates.on(name):
                job.gates.passed(name, "not measured: no rows are held out")
    for callback in (*watching, shown, checkpoints, signals):
        job.trainer.add_callback(callback)
    try:
        trl_seam.end_at_the_last_step(job.trainer)
        with job.display.training("rows" if job.recipe.method == "sft" else "pairs"):
            job.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        checkpoints.tidy()
    if signals.received is not None:
        last = job.run.checkpoints()[-1].name
        raise Interrupted(
            signals.received,
            Problem(
                str(job.run.path),
                f"stopped by a signal; checkpoint {last} is saved",
                f"{job.run.record['command']} --resume",
            ),
        )


def _ask_labels(job: Job) -> None:
    """The gate `labels`, of the held-out pairs or, where too few are held out, of training pairs."""
    if job.eval is not None and len(job.eval) >= outcome.FEWEST:
        outcome.judge_before(job.run, job.gates)
    elif job.recipe.method != "sft" and "labels" not in job.gates.results:  # a resumed run has its answer
        rows, which = outcome.asked_of(job.train, job.recipe.training.seed)
        with job.display.waiting("some training rows before training"):
            chosen, rejected = heldout.likelihoods(job.trainer, rows)
        outcome.labels(chosen, rejected, which, job.gates)


def note_memory(job: Job) -> None:
    """Put the measured peak beside the planned one; on a GPU, say when they are far apart.

    On a CPU the resident memory holds libraries and freed blocks too, so that nothing follows from it.
    """
    memory = job.run.record.get("memory")
    if not memory:
        return
    memory = memory | {"measured_gib": round(job.parts.machine.peak_memory_gib(), 3)}
    job.run.update(memory=memory)
    if job.parts.machine.kind == "cuda" and (said := report.missed(memory)):
        job.display.say(f"note: {said}")


def measure_after(job: Job) -> None:
    """The held-out rows after training, and the gates that ask what they mean."""
    job.measure("after")
    if job.eval is not None:
        outcome.judge_after(job.run, job.eval, job.gates)


def _probe(job: Job, held_out: Rows) -> list[TrainerCallback]:
    """Answers at every evaluation, where the recipe evaluates while it trains."""
    before = outcome.answers(job.run, "before")
    if not job.recipe.training.eval_steps or not before or not job.gates.on("answers"):
        return []
    return [
        guards.Answers(lambda: heldout.answers(job.trainer, job.recipe, job.parts.encoder, held_out), before, job.gates)
    ]


def finish(job: Job, began: float, reloading: subprocess.Popen[str] | None) -> None:
    """Save the model, write what came out, look at what was saved, and only then call the run finished."""
    verify.note_live(job.trainer, job.train, job.parts.encoder, job.parts.precision, job.run)
    save(job)
    summary, samples = outcome.outcome(job.recipe, job.run, job.eval)
    rundir.write_json(job.run / "summary.json", summary)
    rundir.write_jsonl(job.run / "samples.jsonl", samples)
    rundir.write_text(job.run / "model" / "README.md", card.text(job.recipe, job.run.record, summary))
    with job.display.waiting("looking at the saved model"):
        check_saved(job, reloading)
    shutil.rmtree(job.run / STAND_IN, ignore_errors=True)
    seconds = round(time.monotonic() - began, 1)
    job.run.update(status="finished", ended=rundir.now(), seconds=seconds)
    job.display.gates({name: job.gates.results[name] for name in job.gates.results if name in LATER})
    page = html.made(job.run.path)
    facts.closing(job.display, job.run, summary, samples, seconds)
    job.display.say(page)


def check_saved(job: Job, reloading: subprocess.Popen[str] | None) -> None:
    """The gates `saved` and `reload`.

    Raises:
        VerifyError: the saved model is not the trained one.
    """
    if job.gates.on("saved"):
        verify.scan(job.run, job.gates)
    if reloading is not None:
        _forget_optimizer(job.trainer)
        if job.parts.machine.kind == "cuda":
            torch.cuda.empty_cache()
        verify.reload(job.run, job.gates, reloading)


def _forget_optimizer(trainer: Trainer) -> None:
    """Its memory is for the model that is loaded beside this one."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    trainer.accelerator.free_memory()


def save(job: Job) -> None:
    """Write `model/` whole or not at all: weights or adapter, tokenizer, template, generation config."""
    beside = job.run / "model.writing"
    try:
        _write_model(job, beside)
        beside.rename(job.run / "model")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_model(job: Job, beside: Path) -> None:
    model = job.trainer.accelerator.unwrap_model(job.trainer.model)
    if job.recipe.trains_adapter:
        model.save_pretrained(beside, selected_adapters=["default"])
        model.generation_config.save_pretrained(beside)
    else:
        model.save_pretrained(beside)
    job.parts.encoder.tokenizer.save_pretrained(beside)
    secrets.sweep(beside)
    flush(beside)


def _fingerprints(ledger: dict[str, Any]) -> dict[str, Any]:
    return {name: {"rows": part["kept"], "fingerprint": part.get("fingerprint")} for name, part in ledger.items()}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def _git() -> str | None:
    """The commit of the current folder, where it is in a repository."""
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None
