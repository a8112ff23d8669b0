"""`alignctl eval`: the trained model beside its reference on rows that it was not trained on."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedModel

from alignctl import rundir
from alignctl.errors import Problem, RecipeError
from alignctl.evaluate import scores, verdict
from alignctl.evaluate.generation import Answer, read
from alignctl.evaluate.numbers import Number
from alignctl.evaluate.verdict import Verdict
from alignctl.proof import judges, kept, rows, table, tasks
from alignctl.proof.judges import Judge, Match, Score
from alignctl.proof.likelihood import Line, Scored
from alignctl.proof.measure import Drawn, Settings, draw, measure, prompts
from alignctl.proof.rows import Asked
from alignctl.proof.table import Compared
from alignctl.proof.trained import Models, Trained, opened
from alignctl.train import heldout
from alignctl.train.display import Display
from alignctl.train.tokenizer import template_hash

FOLDER = "evaluations"


@dataclass(frozen=True)
class Wanted:
    """What an evaluation is asked to do: which rows, which reference (`start`, `base` or a run's folder), how much."""

    data: str | None
    against: str
    samples: int | None
    max_new_tokens: int | None
    seed: int


@dataclass(frozen=True)
class Work:
    """One evaluation: the run, its rows, what its prompts are, and how models are asked."""

    trained: Trained
    asked: Asked
    wanted: Wanted
    settings: Settings
    lines: Sequence[tuple[Line, ...]]
    prompts: list[list[int]]

    @property
    def name(self) -> str:
        """The evaluation's file: the rows, and the reference where it is not what training started from."""
        against = self.wanted.against
        return self.asked.name if against == "start" else f"{self.asked.name}-against-{Path(against).name}"

    @property
    def against(self) -> dict[str, str]:
        """The reference, as an evaluation holds it."""
        named = {"start": self.trained.start_name, "base": self.trained.recipe.model.name_or_path}
        given = self.wanted.against
        return {"what": given, "name": named[given]} if given in named else {"what": "run", "name": given}


def prepare(trained: Trained, wanted: Wanted) -> Work:
    """Read the rows.

    Raises:
        AlignctlError: they cannot be read, or are none.
    """
    if wanted.against not in ("start", "base"):
        opened(Path(wanted.against))
    asked, evaluation = rows.read(trained, wanted.data), trained.recipe.evaluation
    training = trained.recipe.training
    settings = Settings(
        evaluation.samples if wanted.samples is None else wanted.samples,
        wanted.max_new_tokens or evaluation.max_new_tokens,
        wanted.seed,
        training.per_device_eval_batch_size or training.per_device_train_batch_size,
        trained.precision,
    )
    given = prompts(asked, trained.encoder, settings.samples)
    return Work(trained, asked, wanted, settings, asked.lines(), given)


def evaluate(work: Work, given: Sequence[Judge], tasks: Sequence[str], display: Display) -> dict[str, Any]:
    """Measure both models, ask the judges, and write the evaluation into the run's folder."""
    began = time.monotonic()
    both = _measured(work, tasks, display)
    compared = both.compared
    drawn = _drawn_answers(work, both.drawn)
    found = [*compared.numbers(), *table.drawn_numbers(drawn, compared.asked), *both.tasks]
    matches = _matches(work, compared)
    folder = work.trained.run / FOLDER
    folder.mkdir(exist_ok=True)
    judged = [judges.ask(judge, matches, folder, display) for judge in given]
    said = conclusion(compared, judged)
    settings = work.settings
    values = {
        "name": work.name,
        "made": rundir.now(),
        "seconds": round(time.monotonic() - began, 1),
        "data": work.asked.described() | {"overlap": work.asked.overlap},
        "against": work.against | {"rows_scored": "before training" if both.known else "now"},
        "settings": {"samples": len(work.prompts), "max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
        | {"dtype": str(settings.precision).removeprefix("torch.")},
        "verdict": said.word,
        "reason": said.reason,
        "numbers": [asdict(number) for number in found],
        "rows": _rows(compared, work.asked),
        "answers": _answers(work, compared, drawn),
        "judges": [asdict(score) for score in judged],
    }
    plain: dict[str, Any] = _without_nan(values)
    rundir.write_json(folder / f"{work.name}.json", plain)
    return plain


@dataclass(frozen=True)
class Both:
    """Reference and tuned model on the same rows, the answers drawn from the tuned one, and results of tasks.

    `known` says that the reference's scores of the rows are those that the run measured before its first step.
    """

    compared: Compared
    drawn: Drawn | None
    tasks: list[Number]
    known: bool


def _measured(work: Work, names: Sequence[str], display: Display) -> Both:
    """Measure the tuned model, and then its reference: the same model without its adapter, or one loaded after it."""
    with display.waiting(f"loading {work.trained.run.path}"):
        models = work.trained.load()
    encoder, settings = work.trained.encoder, work.settings
    with display.waiting("the trained model"):
        drawn = draw(models.tuned, encoder, work.prompts, settings) if work.prompts else None
        tuned = measure(models.tuned, encoder, work.lines, work.prompts, drawn, settings)
        results = [tasks.run(models.tuned, encoder, names)]
    with _reference(work, models, display) as model, display.waiting(f"the reference, {work.against['name']}"):
        known = _known(work, model)
        reference = measure(model, encoder, work.lines, work.prompts, drawn, settings, known)
        results.append(tasks.run(model, encoder, names))
    recipe, asked = work.trained.recipe, work.asked
    compared = Compared(recipe, asked.pairs, reference, tuned, asked.prompts, numpy.arange(len(work.prompts)))
    return Both(compared, drawn, tasks.numbers(*reversed(results)), known is not None)


def _known(work: Work, reference: PreTrainedModel) -> Scored | None:
    """The reference's scores of the rows as the run itself measured them, where `reference` still gives them."""
    run = work.trained.run
    if work.name != rows.HELD_OUT or run.record["machine"]["device"] != work.trained.machine.kind:
        return None
    pad, settings = work.trained.encoder.tokenizer.pad_token_id, work.settings
    found = kept.read(work.trained, work.lines)
    if found is None or not kept.agrees(found, reference, work.lines, pad, settings.precision, settings.batch_size):
        return None
    return found


@contextlib.contextmanager
def _reference(work: Work, models: Models, display: Display) -> Iterator[PreTrainedModel]:
    """Inside, the model that the tuned one is compared with.

    Raises:
        RecipeError: it is a run that reads other tokens.
    """
    against = work.wanted.against
    if against in ("start", "base"):
        with models.start() if against == "start" else models.base() as model:
            yield model
        return
    other = opened(Path(against))
    if template_hash(other.encoder) != template_hash(work.trained.encoder) or (
        other.encoder.tokenizer.get_vocab() != work.trained.encoder.tokenizer.get_vocab()
    ):
        what = f"reads other tokens than {work.trained.run.path}: another tokenizer or chat template"
        raise RecipeError(Problem(against, what, "evaluate each by itself, and `alignctl compare` them"))
    models.drop()
    with display.waiting(f"loading {against}"):
        loaded = other.load()
    yield loaded.tuned


def conclusion(compared: Compared, judged: Sequence[Score]) -> Verdict:
    """The verdict: what is broken first, then what the rows and the judges say."""
    tuned, broken = compared.tuned, []
    if not all(each.finite for each in (tuned.rows, tuned.general)):
        broken.append("log-probabilities are not finite")
        return verdict.conclude(broken, [])
    if compared.reference.answers and (said := verdict.collapsed(compared.reference.answers, tuned.answers)):
        broken.append(said)
    rise = _rise(compared)
    if rise > verdict.PERPLEXITY_RISE:
        broken.append(f"general text has become {rise:.1f} times less likely, a token")
    found = scores.verdict(*compared.method_scores(), compared.groups)
    voices = [verdict.preference(found), *(score.voice() for score in judged)]
    return verdict.conclude(broken, voices)


def _rise(compared: Compared) -> float:
    """How many times the perplexity of general text is the reference's."""
    before, after = compared.reference.general, compared.tuned.general
    return math.exp(min((before.sums.sum() - after.sums.sum()) / after.counts.sum(), 700.0))


def _drawn_answers(work: Work, drawn: Drawn | None) -> list[Answer]:
    encoder = work.trained.encoder
    return [read(encoder.tokenizer, ids, encoder.stop_ids) for ids in drawn.answers] if drawn else []


def _matches(work: Work, compared: Compared) -> list[Match]:
    """What a judge is asked: a prompt, and what both models answered."""
    questions = work.asked.questions(work.settings.samples)
    both = zip(compared.reference.answers, compared.tuned.answers, strict=True)
    return [
        Match(heldout.prompt(row), reference.text, tuned.text)
        for (_, row), (reference, tuned) in zip(questions, both, strict=True)
    ]


def _answers(work: Work, compared: Compared, drawn: Sequence[Answer]) -> list[dict[str, Any]]:
    questions = work.asked.questions(work.settings.samples)
    both = zip(compared.reference.answers, compared.tuned.answers, drawn, strict=True)
    return [
        {
            "prompt": heldout.prompt(row)[-1]["content"],
            "preferred": heldout.preferred(row),
            "reference": asdict(reference),
            "tuned": asdict(tuned),
            "drawn": asdict(sampled),
        }
        for (_, row), (reference, tuned, sampled) in zip(questions, both, strict=True)
    ]


def _rows(compared: Compared, asked: Asked) -> dict[str, Any]:
    """Row by row, in the order of the rows: what `alignctl compare` pairs."""
    out: dict[str, Any] = {"place": [asked.rows.place(i) for i in range(len(asked.rows))]}
    for model, measured in (("reference", compared.reference), ("tuned", compared.tuned)):
        found = measured.rows.per_token
        names = ("chosen_logps_per_token", "rejected_logps_per_token")
        out[model] = dict(zip(names, found.tolist(), strict=True)) if asked.pairs else {"nll": (-found[0]).tolist()}
    return out


def _without_nan(value: Any) -> Any:
    """`value` as JSON knows it: a number that is none is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
