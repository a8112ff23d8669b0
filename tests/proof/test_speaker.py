"""Answers of a run's models: the ids they are asked with, where they end, and what has no room."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignctl.errors import RecipeError
from alignctl.evaluate import generation
from alignctl.formats import Message
from alignctl.proof import trained
from alignctl.proof.speaker import BASE, TUNED, Question, Speaker

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Say 3 and tea."},
    {"role": "assistant", "content": "tea 3 rain"},
    {"role": "user", "content": "Say 4 and rain."},
]


@pytest.fixture(scope="module")
def speaker(finished: Callable[..., Path]) -> Speaker:
    run = trained.opened(finished("dpo"))
    return Speaker(run, run.load(), temperature=0, max_new_tokens=12)


def narrow(speaker: Speaker, monkeypatch: pytest.MonkeyPatch, context: int) -> None:
    config = speaker.models.tuned.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", context)


def length(speaker: Speaker, messages: list[Message]) -> int:
    return len(speaker.run.encoder.prompt_ids(messages))


def test_a_question_has_the_ids_of_training(speaker: Speaker) -> None:
    found = speaker.question(TALK)
    assert found == Question(TALK, 0, speaker.run.encoder.prompt_ids(TALK))


@pytest.mark.parametrize("by", [TUNED, BASE])
def test_a_greedy_answer_is_the_one_that_evaluation_gets(speaker: Speaker, by: str) -> None:
    asked, pieces = speaker.question(TALK), []
    reply = speaker.answer(by, asked, pieces.append, threading.Event())
    encoder = speaker.run.encoder
    with speaker._model(by) as model:
        (found,) = generation.answer(model, encoder.tokenizer, [asked.ids], encoder.stop_ids, 12, batch_size=1)
    assert (reply.text, reply.end == "stopped") == (found.text, found.stopped)
    assert len(pieces) > 1 and "".join(pieces).strip() == reply.text != ""


def test_the_base_answers_without_the_adapter(speaker: Speaker) -> None:
    ids = torch.tensor([speaker.question(TALK).ids])
    found = []
    for by in (TUNED, BASE, TUNED):
        with speaker._model(by) as model, torch.no_grad():
            found.append(model(input_ids=ids, use_cache=False).logits)
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1])


def test_a_seed_gives_the_same_answers_again(speaker: Speaker) -> None:
    warm, asked = replace(speaker, temperature=5.0), speaker.question(TALK)

    def two() -> list[str]:
        torch.manual_seed(7)
        return [warm.answer(TUNED, asked, lambda piece: None, threading.Event()).text for _ in range(2)]

    first, second = two(), two()
    assert first == second and first[0] != first[1]


def test_an_answer_ends_on_a_stop_token_which_is_not_shown(speaker: Speaker) -> None:
    """Every token is a stop token: the first one that is made ends the answer."""
    encoder = replace(speaker.run.encoder, stop_ids=tuple(range(len(speaker.run.encoder.tokenizer))))
    run = trained.Trained(speaker.run.run, speaker.run.recipe, speaker.run.machine)
    run.__dict__["encoder"] = encoder
    pieces: list[str] = []
    reply = replace(speaker, run=run).answer(TUNED, speaker.question(TALK), pieces.append, threading.Event())
    assert (reply.text, reply.end, "".join(pieces)) == ("", "stopped", "")


def test_an_answer_can_be_interrupted(speaker: Speaker) -> None:
    stop = threading.Event()
    long = replace(speaker, max_new_tokens=400)
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            stop.set()

    reply = long.answer(TUNED, speaker.question(TALK), write, stop)
    assert reply.end == "interrupted" and len(speaker.run.encoder.encode([reply.text])[0]) < 10


def test_the_oldest_turns_make_room(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [TALK[0], TALK[3]]
    narrow(speaker, monkeypatch, length(speaker, TALK) + 12)
    assert speaker.question(TALK).left_out == 0
    narrow(speaker, monkeypatch, length(speaker, TALK) + 11)
    found = speaker.question(TALK)
    assert (found.messages, found.left_out) == (short, 2) and len(found.ids) == length(speaker, short)


def test_a_question_alone_gets_a_shorter_answer(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(speaker, monkeypatch, length(speaker, TALK[:2]) + 2)
    asked = speaker.question(TALK[:2])
    reply = speaker.answer(TUNED, asked, lambda piece: None, threading.Event())
    assert reply.end == "cut" and len(speaker.run.encoder.encode([reply.text])[0]) <= 2


def test_a_question_without_room_is_refused(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(speaker, monkeypatch, length(speaker, TALK[:2]))
    with pytest.raises(RecipeError, match="the model takes"):
        speaker.question(TALK[:2])


def test_all_weights_are_loaded_once_where_one_model_talks(finished: Callable[..., Path]) -> None:
    found = trained.opened(finished("orpo", lora=None)).load(start=False)
    assert found.other is None
