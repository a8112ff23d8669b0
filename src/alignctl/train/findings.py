"""What is wrong, or easily mistaken, with data that can be read: one finding a question, each with its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pyarrow.compute

from alignctl import rundir
from alignctl.recipe.schema import Recipe
from alignctl.statistics import wilson
from alignctl.train.data import Rows
from alignctl.train.ledger import FIRST, Places
from alignctl.train.tokenizer import template_hash
from alignctl.train.tokens import ALIKE_WITHIN, ANSWER_CUT, PROMPT_CUT, RENDERED_ANEW, TURNS_CUT, UNANSWERED, Encoder

SAMPLE = 2000
WORDS = 2000
FEWEST = 40
ALIKE = 0.95
# Text that a chat template writes; in JSON a line break stands as \n.
_RENDERED = (
    r"<\|im_(start|end)\|>|\[/?INST\]|<\|(user|assistant|system|end|eot_id|start_header_id)\|>|<(start|end)_of_turn>"
    r"|### (Instruction|Response|Human|Assistant):"
    r"|(\"content\": \"|\\n\\n)(Human|Assistant): |(\"content\": \"|\\n)(USER|ASSISTANT): "
)
_LOST = (
    (
        RENDERED_ANEW,
        "template.prefix",
        "what the model would be asked with is not what it would be trained behind, so these rows are dropped",
        "take a template that writes a conversation from its start, whatever follows",
    ),
    (
        ALIKE_WITHIN,
        "answers.alike_within_limit",
        "nothing of what differs is left within the limit, so these rows are dropped",
        "raise data.max_length",
    ),
)
_CUTS = {
    PROMPT_CUT: ("rows.prompt_cut", "the model does not see all that was said before", "raise data.max_length"),
    ANSWER_CUT: (
        "rows.answer_cut",
        "a model that is trained on answers without an end learns not to stop",
        "raise data.max_length, or data.overlong: drop",
    ),
    TURNS_CUT: ("rows.turns_cut", "only the first answers of the conversation are trained", "raise data.max_length"),
    UNANSWERED: ("rows.unanswered", "what comes after the last answer is not trained on", "nothing, or mend the rows"),
}


@dataclass(frozen=True)
class Finding:
    """One question to the data and its answer; `rows` are those that it is about, and `warns` tells good from bad."""

    name: str
    said: str
    warns: bool = False
    rows: int = 0
    first: tuple[str, ...] = ()
    meaning: str = ""
    way_out: str = ""


def examine(recipe: Recipe, encoder: Encoder, train: Rows, held_out: Rows | None) -> list[Finding]:
    """Every finding about the training rows, the held-out rows and the template."""
    found = [*_template(recipe, encoder, train)]
    if not len(train):
        return found
    found += [*_texts(encoder, train), *_repeats(train), *_cuts(train)]
    if recipe.method != "sft":
        found += [*_scores(train), *_answers(train), *_shortcuts(train, recipe.training.seed)]
    return [*found, *_held_out(train, held_out)]


def _rows(name: str, places: Places, total: int, what: str, meaning: str, way_out: str) -> Finding:
    """A finding that warns when there is a row for it."""
    if not places.rows:
        return Finding(name, f"none: {what}")
    said = f"{places.rows:,} of {total:,} rows ({places.rows / total:.1%}): {what}"
    return Finding(name, said, True, places.rows, tuple(places.first), meaning, way_out)


def _template(recipe: Recipe, encoder: Encoder, train: Rows) -> Iterator[Finding]:
    parent = _parent_template(recipe)
    if parent is not None:
        same = parent == template_hash(encoder)
        yield Finding(
            "template.parent",
            f"the template is {'the one' if same else 'not the one'} that {recipe.model.adapter} was trained with",
            not same,
            meaning="" if same else "the adapter has learned to answer in another format than it would be asked in",
            way_out="" if same else "model.chat_template: the parent run's",
        )

    for reason, name, meaning, way_out in _LOST:
        places = train.ledger.dropped.get(reason, Places())
        yield _rows(name, places, len(train) + places.rows, reason, meaning, way_out)


def _parent_template(recipe: Recipe) -> str | None:
    """The hash of the template that the run behind `model.adapter` was trained with."""
    if recipe.model.adapter is None:
        return None
    folder = Path(recipe.model.adapter).expanduser()
    try:
        record = rundir.read_json(folder / "run.json") or rundir.read_json(folder.parent / "run.json")
    except ValueError:
        return None
    return record.get("template", {}).get("sha256")


def _texts(encoder: Encoder, rows: Rows) -> Iterator[Finding]:
    n = len(rows)
    if not encoder.has_system:
        yield _rows(
            "template.system",
            rows.places(_matching(rows, r'\{"role": "system"')),
            n,
            "a system message, which the template does not know",
            "the message is put before the first question, and must be put there when the model is used",
            "take a template with a system role, or leave it so",
        )
    yield _rows(
        "text.control_tokens",
        rows.places(rows.column("control")),
        n,
        "text with the tokenizer's special tokens in it",
        "they are read as the tokens that they name, so a user's text can end a turn or begin one",
        "take them out of the text",
    )
    yield _rows(
        "text.rendered",
        rows.places(_matching(rows, _RENDERED) & ~_matching(rows, r'^\{"text": ')),
        n,
        "text that looks rendered with a chat template already",
        "the template would be applied a second time, around the first",
        "give the plain messages; `format: hh` reads “Human: … Assistant: …” transcripts",
    )
    unknown = encoder.tokenizer.unk_token_id
    if unknown is not None and unknown not in encoder.stop_ids:
        yield _rows(
            "text.unknown",
            rows.places(_holding(rows, unknown)),
            n,
            f"characters that the tokenizer does not know ({encoder.tokenizer.unk_token})",
            "the model reads and learns the unknown token in their place",
            "take a model whose tokenizer knows the language, or clean the text",
        )


def _matching(rows: Rows, pattern: str) -> numpy.ndarray:
    return pyarrow.compute.match_substring_regex(rows.table["canonical"], pattern).to_numpy()[rows.order]


def _holding(rows: Rows, token: int) -> numpy.ndarray:
    """Which rows hold `token` in any of their ids."""
    out = numpy.zeros(rows.table.num_rows, dtype=bool)
    for name in rows.id_columns:
        start = 0
        for chunk in rows.table[name].chunks:
            where = pyarrow.compute.list_parent_indices(chunk).to_numpy()
            out[start + where[chunk.flatten().to_numpy() == token]] = True
            start += len(chunk)
    return out[rows.order]


def _repeats(rows: Rows) -> Iterator[Finding]:
    n = len(rows)
    meaning = "such a row counts twice in every epoch, and a model overfits to what it sees twice"
    yield _rows("rows.duplicate", rows.duplicates(), n, "the same as an earlier row", meaning, "remove them")
    what = "an earlier row but for case, punctuation and spacing"
    yield _rows("rows.near_duplicate", rows.near_duplicates(), n, what, meaning, "remove them")


def _cuts(rows: Rows) -> Iterator[Finding]:
    for reason, places in rows.cut().items():
        name, meaning, way_out = _CUTS[reason]
        yield _rows(name, places, len(rows), reason, meaning, way_out)


def _scores(rows: Rows) -> Iterator[Finding]:
    gap = rows.column("score_gap")
    if numpy.isnan(gap).all():
        return
    n = len(rows)
    meaning = "which answer is the chosen one was decided by chance, so the row teaches noise"
    yield _rows("scores.tie", rows.places(gap == 0), n, "equal scores on both sides", meaning, "data.*.tie_margin: 0")
    meaning = "the row teaches the opposite of what its scores say"
    way_out = "look at the rows; are the columns swapped?"
    yield _rows(
        "scores.reversed", rows.places(gap < 0), n, "the rejected answer has the higher score", meaning, way_out
    )


def _answers(rows: Rows) -> Iterator[Finding]:
    yield _rows(
        "answers.same_words",
        rows.same_words(),
        len(rows),
        "answers that differ in case, punctuation and spacing only",
        "that difference is all that the row teaches",
        "remove them, or look whether the difference is the one that you mean",
    )
    longest = numpy.maximum(rows.lengths("chosen_ids"), rows.lengths("rejected_ids"))
    yield _rows(
        "answers.alike",
        rows.places(rows.column("common") >= ALIKE * longest),
        len(rows),
        f"answers that share {ALIKE:.0%} of their tokens or more",
        "the little that differs gets all of the gradient, and log-probabilities of both fall together",
        "remove them, or look whether the difference is the one that you mean",
    )


def _shortcuts(rows: Rows, seed: int) -> Iterator[Finding]:
    """How well the chosen answer is known without reading it: by length, by its words, by its first token."""
    longer = numpy.sign(rows.lengths("chosen_ids") - rows.lengths("rejected_ids"))
    told = numpy.flatnonzero(longer)
    which, direction = ("longer", 1) if longer.sum() >= 0 else ("shorter", -1)
    yield _shortcut(
        Finding(
            "shortcut.length",
            f"the {which} answer is the chosen one",
            meaning=f"the model can learn to write {which} answers instead of better ones",
            way_out="dpo.loss_type: sigmoid_norm, dpo.ld_alpha, or pairs of like length",
        ),
        _Guess(rows, told, direction * longer[told]),
        0.65,
    )
    picked = numpy.sort(numpy.random.default_rng(seed).permutation(len(rows))[:SAMPLE])
    chosen, rejected, held_out = _sampled(rows, picked)
    if min(held_out.sum(), (~held_out).sum()) < FEWEST:
        yield Finding("shortcut.words", f"not measured: fewer than {FEWEST} pairs to learn from or to test on")
        return
    yield _shortcut(
        Finding(
            "shortcut.words",
            "which words it holds tells the chosen answer, of pairs held out from a linear classifier",
            meaning="the loss falls to zero on a few words; the preference behind them need not be learned",
            way_out="take rejected answers that are closer to the chosen ones, e.g. the model's own",
        ),
        _Guess(rows, picked[held_out], _by_words(chosen, rejected, held_out)),
        0.9,
    )
    yield _shortcut(
        Finding(
            "shortcut.first_token",
            "the first token tells the chosen answer, of pairs held out",
            meaning="the model needs to learn no more than how to begin",
            way_out="take rejected answers that begin like the chosen ones",
        ),
        _Guess(rows, picked[held_out], _by_first_token(chosen, rejected, held_out)),
        0.8,
    )


@dataclass(frozen=True)
class _Guess:
    """Which answer is the chosen one, guessed for the rows `which`: right above 0, wrong below, undecided at 0."""

    rows: Rows
    which: numpy.ndarray
    decisions: numpy.ndarray


def _shortcut(finding: Finding, guess: _Guess, limit: float) -> Finding:
    """`finding` with how often the guess is right; it warns when that is surely above `limit`."""
    n = len(guess.decisions)
    if not n:
        return Finding(finding.name, "not measured: no pair tells")
    right = guess.which[guess.decisions > 0]
    share = (len(right) + (guess.decisions == 0).sum() / 2) / n
    low, high = wilson(share * n, n)
    said = f"{share:.1%} ({low:.1%} to {high:.1%}, n {n:,}): {finding.said}"
    if low <= limit:
        return Finding(finding.name, said)
    first = tuple(guess.rows.place(i) for i in right[:FIRST])
    return replace(finding, said=said, warns=True, rows=len(right), first=first)


Sides = list[numpy.ndarray]


def _sampled(rows: Rows, picked: numpy.ndarray) -> tuple[Sides, Sides, numpy.ndarray]:
    """The answers of the rows `picked`, and which of them are held out: a fourth, by prompt."""
    part = rows.table.select(["chosen_ids", "rejected_ids", "key"]).take(rows.order[picked])
    sides = [[numpy.array(ids) for ids in part[name].to_pylist()] for name in ("chosen_ids", "rejected_ids")]
    return sides[0], sides[1], part["key"].to_numpy() % 4 == 0


def _by_words(chosen: Sides, rejected: Sides, held_out: numpy.ndarray) -> numpy.ndarray:
    """Guesses for the held-out pairs by a ridge classifier on which tokens occur on one side only."""
    learned = [ids for side in (chosen, rejected) for ids, out in zip(side, held_out, strict=True) if not out]
    seen, counts = numpy.unique(numpy.concatenate(learned), return_counts=True)
    known = numpy.sort(seen[numpy.argsort(-counts)][:WORDS])
    features = _presence(chosen, known) - _presence(rejected, known)
    x = features[~held_out]
    weights = numpy.linalg.solve(x.T @ x + 10 * numpy.eye(len(known)), x.sum(axis=0))
    decisions: numpy.ndarray = features[held_out] @ weights
    return decisions


def _presence(side: Sides, known: numpy.ndarray) -> numpy.ndarray:
    """`[pairs, tokens]`: 1 where an answer holds a known token."""
    where = numpy.full(1 + max(known.max(), *(ids.max() for ids in side)), len(known))
    where[known] = numpy.arange(len(known))
    out = numpy.zeros((len(side), len(known) + 1))
    for row, ids in zip(out, side, strict=True):
        row[where[ids]] = 1
    return out[:, :-1]


def _by_first_token(chosen: Sides, rejected: Sides, held_out: numpy.ndarray) -> numpy.ndarray:
    """Guesses for the held-out pairs by how often each first token stood on either side elsewhere."""
    first = numpy.array([[side[0] for side in pair] for pair in zip(chosen, rejected, strict=True)])
    tally = numpy.zeros(first.max() + 1)
    numpy.add.at(tally, first[~held_out, 0], 1)
    numpy.subtract.at(tally, first[~held_out, 1], 1)
    decisions: numpy.ndarray = tally[first[held_out, 0]] - tally[first[held_out, 1]]
    return decisions


def _held_out(train: Rows, held_out: Rows | None) -> Iterator[Finding]:
    if held_out is None or not len(held_out):
        yield Finding(
            "eval.size",
            "no rows are held out",
            True,
            meaning="nothing will tell whether training helped",
            way_out="data.eval_fraction: 0.05, or data.eval",
        )
        return
    n = len(held_out)
    low, high = wilson(n // 2, n)
    said = f"{n:,} held-out rows: an accuracy is known to ±{(high - low) / 2:.1%}"
    if n < 100:
        way_out = "hold out more rows"
        yield Finding("eval.size", said, True, n, (), "smaller differences than that cannot be seen", way_out)
    else:
        yield Finding("eval.size", said)
    lost = train.ledger.dropped.get("prompt is in the held-out rows", Places())
    meaning = "they are dropped, for a model that has trained on a question is not tested by it"
    what = "the prompt of a held-out row"
    yield _rows("eval.seen", lost, len(train) + lost.rows, what, meaning, "nothing, or other held-out rows")
