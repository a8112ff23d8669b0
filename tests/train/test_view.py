"""An encoded row as runs of tokens: which are trained, in what order, and as what text."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from alignctl.formats.rows import Message, assistant, user
from alignctl.train import tokens, view
from alignctl.train.tokens import Encoder, Limit
from alignctl.train.view import Span

MakeEncoder = Callable[[str, str], Encoder]
TEMPLATES = ("alpaca", "chatml", "instruct", "mistral-instruct", "zephyr")
LIMIT = Limit(4096)


def pair(prompt: list[Message], chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def pair_sides(encoder: Encoder, row: dict[str, Any]) -> dict[str, list[Span]]:
    return view.sides(encoder, tokens.encode_one(encoder, tokens.pair(encoder, row, LIMIT)))


def row_spans(encoder: Encoder, row: dict[str, Any], limit: Limit = LIMIT) -> list[Span]:
    found = view.sides(encoder, tokens.encode_one(encoder, tokens.dialogue(encoder, row, limit)))
    assert list(found) == ["row"]
    return found["row"]


def joined(spans: list[Span]) -> list[int]:
    return [token for span in spans for token in span.ids]


TURNS = [user("Tea ?"), assistant("Leaves , yes ."), user("Coffee?")]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_pair_is_its_prompt_and_an_answer_on_either_side(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    found = pair_sides(encoder, pair(TURNS, "Beans  ,\n\tground .", "Café 漢字 🙂"))
    assert list(found) == ["chosen", "rejected"]
    stop = encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids[0])
    for spans, answer in zip(found.values(), ("Beans  ,\n\tground .", "Café 漢字 🙂"), strict=True):
        assert [span.supervised for span in spans] == [False, True]
        assert spans[0].ids == encoder.prompt_ids(TURNS)
        assert spans[0].text == encoder.render(TURNS, ask=True)
        assert spans[1].text.lstrip() == answer + stop
        assert encoder.render([*TURNS, assistant(answer)], ask=False).startswith(spans[0].text + spans[1].text)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_of_a_dialogue_is_a_span_of_its_own(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    messages = [*TURNS, assistant("Beans."), user("Milk?"), assistant("Cows.")]
    spans = row_spans(encoder, {"messages": messages})
    stop = encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids[0])
    assert [span.supervised for span in spans] == [False, True] * 3
    assert [span.text.strip() for span in spans[1::2]] == [m["content"] + stop for m in messages[1::2]]
    assert "".join(span.text for span in spans) == encoder.render(messages, ask=False).rstrip()
    for i, span in enumerate(spans[::2]):
        asked = joined(spans[: 2 * i]) + span.ids
        assert asked == encoder.prompt_ids(messages[: 2 * i + 1])


def test_plain_text_is_one_trained_span(encoder: Encoder) -> None:
    (span,) = row_spans(encoder, {"text": "Leaves , and\n water ."})
    assert span.supervised and span.text == "Leaves , and\n water ." + encoder.tokenizer.eos_token


def test_an_answer_cut_by_the_limit_ends_without_a_stop(encoder: Encoder) -> None:
    limit = Limit(40, "truncate_completion")
    spans = row_spans(encoder, {"messages": [user("Tea?"), assistant("Leaves. " * 30)]}, limit)
    assert [span.supervised for span in spans] == [False, True] and len(joined(spans)) == 40
    assert ("Leaves. " * 30).startswith(spans[1].text)


@pytest.mark.parametrize("seed", range(5))
def test_spans_are_the_longest_runs_and_lose_no_token(encoder: Encoder, seed: int) -> None:
    chance = random.Random(seed)
    ids = [chance.randrange(10, 200) for _ in range(50)]
    labels = [token if chance.random() < 0.7 else -100 for token in ids]
    spans = view.sides(encoder, {"input_ids": ids, "labels": labels})["row"]
    assert joined(spans) == ids
    assert [span.supervised for span in spans for _ in span.ids] == [label != -100 for label in labels]
    assert all(a.supervised != b.supervised for a, b in pairwise(spans))
