"""From what two models made of the rows to the numbers of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy

from alignctl.evaluate import generation, numbers, scores
from alignctl.evaluate.generation import Answer
from alignctl.evaluate.numbers import Kind, Number
from alignctl.evaluate.scores import PairScores, RowScores
from alignctl.proof.measure import Measured
from alignctl.recipe.schema import Recipe

ACCURACY = Kind("reward_accuracy", "reward accuracy", "preferences", "share", "higher")
MARGIN = Kind("reward_margin", "reward margin", "preferences", "nats", "higher")
NORMALISED = Kind("normalised_accuracy", "accuracy by log-prob per token", "preferences", "share", "higher")
NORMALISED_MARGIN = Kind("normalised_margin", "margin by log-prob per token", "preferences", "nats", "higher")
CHOSEN = Kind("chosen_logps_per_token", "chosen log-prob per token", "likelihood", "nats", "higher")
REJECTED = Kind("rejected_logps_per_token", "rejected log-prob per token", "likelihood", "nats")
NLL = Kind("nll", "negative log-likelihood per token", "likelihood", "nats", "lower")
KL = Kind("kl_per_answer", "KL per answer", "drift", "nats")
KL_TOKEN = Kind("kl_per_token", "KL per token", "drift", "nats")
FORGETTING = Kind("general_perplexity", "perplexity of general text", "forgetting", "perplexity", "lower")
RATIO = Kind("length_ratio", "length ratio", "answers", "ratio")


@dataclass(frozen=True)
class Compared:
    """Both models on the same rows; `groups` and `asked` number the prompts of the rows and of the answers."""

    recipe: Recipe
    pairs: bool
    reference: Measured
    tuned: Measured
    groups: numpy.ndarray
    asked: numpy.ndarray

    @property
    def beta(self) -> float:
        """What an implicit reward is multiplied with."""
        section = self.recipe.dpo or self.recipe.orpo
        return 1.0 if section is None else section.beta

    def numbers(self) -> Iterator[Number]:
        """Every number, in order."""
        yield from self._preferences() if self.pairs else self._likelihood()
        yield from self._drift()
        yield from self._answers()
        general = self.tuned.general
        texts = numpy.arange(general.sums.shape[1])
        before, after, tokens = self.reference.general.sums[0], general.sums[0], general.counts[0]
        yield numbers.perplexity(FORGETTING, before, after, tokens, texts)

    def _likelihood(self) -> Iterator[Number]:
        yield numbers.paired(NLL, -self.reference.rows.per_token[0], -self.tuned.rows.per_token[0], self.groups)

    def _preferences(self) -> Iterator[Number]:
        gains = self.beta * (self.tuned.rows.sums - self.reference.rows.sums)
        margins = gains[0] - gains[1]
        yield numbers.against(ACCURACY, 0.5, scores.right(margins), self.groups)
        yield numbers.against(MARGIN, 0.0, margins, self.groups)
        before, after = self.reference.rows.per_token, self.tuned.rows.per_token
        sides = [each[0] - each[1] for each in (before, after)]
        yield numbers.paired(NORMALISED, scores.right(sides[0]), scores.right(sides[1]), self.groups)
        yield numbers.paired(NORMALISED_MARGIN, sides[0], sides[1], self.groups)
        for kind, side in ((CHOSEN, 0), (REJECTED, 1)):
            yield numbers.paired(kind, before[side], after[side], self.groups)

    def _drift(self) -> Iterator[Number]:
        """KL(tuned ‖ reference) on the tuned model's own answers: the mean of log tuned(y) - log reference(y)."""
        if self.tuned.drawn is None or self.reference.drawn is None or not len(self.asked):
            return
        apart = (self.tuned.drawn.sums - self.reference.drawn.sums)[0]
        yield numbers.paired(KL, None, apart, self.asked)
        yield numbers.ratio(KL_TOKEN, self.tuned.drawn.counts[0], apart, self.asked)

    def _answers(self) -> Iterator[Number]:
        if not len(self.asked):
            return
        reference, tuned = self.reference.answers, self.tuned.answers
        for kind, measure in ANSWERS:
            yield numbers.paired(kind, _each(measure, reference), _each(measure, tuned), self.asked)
        before, after = (_each(lambda answer: answer.tokens, answers) for answers in (reference, tuned))
        if before.sum():
            yield numbers.ratio(RATIO, before, after, self.asked)

    def method_scores(self) -> tuple[PairScores | RowScores, PairScores | RowScores]:
        """Reference and tuned model by the method's own reward, as training scores its held-out rows."""
        if not self.pairs:
            return tuple(RowScores(-m.rows.per_token[0]) for m in (self.reference, self.tuned))  # type: ignore[return-value]
        out = []
        for model in (self.reference, self.tuned):
            gain = model.rows.sums - self.reference.rows.sums
            rewards = self.beta * (model.rows.per_token if self.recipe.orpo is not None else gain)
            out.append(PairScores(*rewards, *model.rows.per_token))
        return out[0], out[1]


def _each(measure: Callable[[Answer], float], answers: Sequence[Answer]) -> numpy.ndarray:
    return numpy.array([float(measure(answer)) for answer in answers])


ANSWERS: tuple[tuple[Kind, Callable[[Answer], float]], ...] = (
    (Kind("tokens", "tokens per answer", "answers", "tokens"), lambda a: a.tokens),
    (Kind("stop_rate", "answers that stop", "answers", "share", "higher"), lambda a: a.stopped),
    (Kind("distinct_1", "different words", "answers", "share"), lambda a: generation.distinct(a.text, 1)),
    (Kind("distinct_2", "different word pairs", "answers", "share", "higher"), lambda a: generation.distinct(a.text)),
    (
        Kind("repetition_4", "repeated four-word runs", "answers", "share", "lower"),
        lambda a: generation.repeats(a.text),
    ),
    (Kind("refusals", "answers that refuse", "answers", "share"), lambda a: generation.refuses(a.text)),
)


def drawn_numbers(answers: Sequence[Answer], asked: numpy.ndarray) -> Iterator[Number]:
    """Numbers of answers that only the tuned model has: those that were drawn from it."""
    for kind, measure in ANSWERS if answers else ():
        named = replace(kind, name=f"drawn_{kind.name}", label=f"{kind.label}, drawn")
        yield numbers.paired(named, None, _each(measure, answers), asked)
