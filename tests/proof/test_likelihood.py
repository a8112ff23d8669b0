"""Log-probabilities of answers, against plain softmax over plain logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignctl.evaluate import generation
from alignctl.proof import likelihood, measure, trained
from alignctl.proof.likelihood import Line, answered
from alignctl.proof.trained import Models

PAIRS = [
    (answered([5, 9, 12], [40, 41, 2]), answered([5, 9, 12], [40, 7, 8, 9, 2])),
    (answered([6, 6], [50, 2]), answered([6, 6], [51, 52, 53, 54, 55, 2])),
    (answered([5, 9, 12, 13], [60, 61, 2]), answered([5, 9, 12, 13], [62, 2])),
]


@pytest.fixture(scope="module")
def models(finished: Callable[..., Path]) -> Models:
    return trained.opened(finished("dpo")).load()


@pytest.fixture(scope="module")
def plain(workshop: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(workshop / "base", dtype=torch.float32).eval()


def by_hand(model: PreTrainedModel, line: Line) -> float:
    ids = torch.tensor([line.ids])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return sum(
        logps[i, token].item()
        for i, (token, label) in enumerate(zip(line.ids[1:], line.labels[1:], strict=True))
        if label != -100
    )


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_pairs_are_scored_as_by_hand(models: Models, plain: PreTrainedModel, batch_size: int) -> None:
    with models.start() as start:
        found = likelihood.score(start, PAIRS, 0, torch.float32, batch_size)
    expected = [[by_hand(plain, pair[side]) for pair in PAIRS] for side in (0, 1)]
    assert found.sums == pytest.approx(numpy.array(expected), abs=1e-4)
    assert found.counts.tolist() == [[3, 2, 3], [5, 6, 2]]
    assert found.per_token == pytest.approx(found.sums / found.counts)


def test_rows_with_several_answers_are_scored_where_they_are_labelled(models: Models, plain: PreTrainedModel) -> None:
    line = Line([5, 9, 40, 2, 6, 41, 2], [-100, -100, 40, 2, -100, 41, 2])
    with models.start() as start:
        found = likelihood.score(start, [(line,)], 0, torch.float32, 4)
    assert found.counts.tolist() == [[4]]
    assert found.sums[0, 0] == pytest.approx(by_hand(plain, line), abs=1e-4)


def test_numbers_that_are_none_are_seen() -> None:
    assert not likelihood.Scored(numpy.array([[1.0, numpy.nan]]), numpy.ones((1, 2))).finite


def test_general_text_is_scored_behind_its_first_token(finished: Callable[..., Path]) -> None:
    run = trained.opened(finished("dpo"))
    lines = measure.general(run.encoder)
    assert len(lines) == len(measure.general_texts()) == 24
    assert all(line.labels == [-100, *line.ids[1:]] for (line,) in lines)
    assert run.encoder.tokenizer.decode(lines[0][0].ids) == measure.general_texts()[0]


def test_drawn_answers_are_the_same_for_a_seed_and_leave_the_world_alone(
    models: Models, finished: Callable[..., Path]
) -> None:
    tokenizer = trained.opened(finished("dpo")).encoder.tokenizer
    before = torch.random.get_rng_state()
    once, again, other = (
        generation.generate(models.tuned, tokenizer, [[5, 9], [6, 7, 8]], [2], 6, 2, seed) for seed in (1, 1, 2)
    )
    assert once == again != other
    assert torch.equal(torch.random.get_rng_state(), before)
    greedy = generation.generate(models.tuned, tokenizer, [[5, 9], [6, 7, 8]], [2], 6, 2)
    assert greedy == generation.generate(models.tuned, tokenizer, [[5, 9], [6, 7, 8]], [2], 6, 1)


def test_an_answer_that_stops_is_read_without_its_stop_token(finished: Callable[..., Path]) -> None:
    tokenizer = trained.opened(finished("dpo")).encoder.tokenizer
    ids = tokenizer("tea", add_special_tokens=False)["input_ids"]
    assert generation.read(tokenizer, [*ids, 2], [2]) == generation.Answer("tea", len(ids), True)
    assert generation.read(tokenizer, ids, [2]) == generation.Answer("tea", len(ids), False)
    assert generation.read(tokenizer, [], [2]) == generation.Answer("", 0, False)
