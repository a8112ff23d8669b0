"""The state of a chat: what is asked, what the conversation goes on from, and the pairs."""

from __future__ import annotations

from typing import Any

import pytest

from alignctl.errors import RecipeError
from alignctl.proof.chat import Reply, Session, Turn, numbers


def replies(*texts: str) -> list[Reply]:
    return [Reply("tuned", text, "stopped") for text in texts]


def asked(session: Session, question: str, *texts: str) -> Session:
    session.add(session.prompt(question), replies(*texts))
    return session


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_prompt_holds_the_system_message_and_all_that_came_before() -> None:
    session = asked(Session("Be kind."), "Hello?", "Hello.")
    assert session.prompt("Tea?") == [
        said("system", "Be kind."),
        said("user", "Hello?"),
        said("assistant", "Hello."),
        said("user", "Tea?"),
    ]
    assert Session().prompt("Tea?") == [said("user", "Tea?")]


def test_the_conversation_goes_on_from_the_last_answer_or_the_kept_one() -> None:
    session = asked(Session(), "Tea?", "No.", "Yes.")
    assert session.prompt("")[1] == said("assistant", "Yes.")
    session.pair(1, 2)
    assert session.prompt("")[1] == said("assistant", "No.")
    session.last().replies += replies("Perhaps.")
    assert session.prompt("")[1] == said("assistant", "No.")


def test_a_pair_is_a_preference_row() -> None:
    session = asked(asked(Session("Be kind."), "Hello?", "Hello."), "Tea?", "No.", "Yes.", "Milk?")
    assert session.pair(2, 1) == {
        "prompt": session.turns[1].asked,
        "chosen": [said("assistant", "Yes.")],
        "rejected": [said("assistant", "No.")],
    }
    assert [m["role"] for m in session.turns[1].asked] == ["system", "user", "assistant", "user"]


def test_a_pair_is_asked_with_what_was_asked_then() -> None:
    """A system message that was set later was not before the models' eyes."""
    session = asked(Session(), "Tea?", "No.", "Yes.")
    session.system = "Be kind."
    assert session.pair(2, 1)["prompt"] == [said("user", "Tea?")]


@pytest.mark.parametrize(
    ("kept", "rejected", "what"),
    [(0, 1, "no answer 0"), (1, 5, "no answer 5"), (1, 3, "same"), (1, 1, "same"), (2, 4, "answer 4 is empty")],
)
def test_what_is_no_pair_is_refused(kept: int, rejected: int, what: str) -> None:
    session = asked(Session(), "Tea?", "No.", "Yes.", " No. ", " ")
    with pytest.raises(RecipeError, match=what):
        session.pair(kept, rejected)
    assert session.last().kept == -1


def test_before_the_first_question_nothing_can_be_done_with_it() -> None:
    for act in (Session().last, Session().undo, lambda: Session().pair(1, 2)):
        with pytest.raises(RecipeError, match="nothing has been asked"):
            act()


def test_undo_and_reset() -> None:
    session = asked(asked(Session("Be kind."), "Hello?", "Hello."), "Tea?", "Yes.")
    assert session.undo() == "Tea?"
    assert [m["content"] for m in session.prompt("Milk?")] == ["Be kind.", "Hello?", "Hello.", "Milk?"]
    session.reset()
    assert [m["content"] for m in session.prompt("Milk?")] == ["Be kind.", "Milk?"]


@pytest.mark.parametrize(("words", "found"), [(["2", "1"], (2, 1)), (["1", "3", "more.jsonl"], (1, 3))])
def test_which_answers_are_meant(words: list[str], found: tuple[int, int]) -> None:
    assert numbers(words, Turn([], replies("a", "b", "c"))) == found


@pytest.mark.parametrize("words", [[], ["2"], ["two", "1"], ["2", "-1"]])
def test_which_answers_are_meant_is_never_guessed(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="must be told"):
        numbers(words, Turn([], replies("a", "b")))


def test_one_answer_is_no_pair() -> None:
    given: Any = Turn([], replies("a"))
    with pytest.raises(RecipeError, match="needs two answers"):
        numbers([], given)
