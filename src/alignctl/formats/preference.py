"""Shapes of preference sets: one function a shape, from a raw row to a canonical one."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

from alignctl.formats import rows
from alignctl.formats.rows import Canonical, Dropped, Format, Message, Row, RowError, assistant, messages, text, user

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# In the order of trust: UltraFeedback's overall score is known to hold tens that were ones.
SCORES = ("score", "fine-grained_score", "overall_score", "rating", "helpfulness")
_ANSWERS = ("response", "content", "text", "answer")
_GIVEN = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


def _pair(prompt: list[Message], chosen: str, rejected: str) -> Canonical:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def _strings(row: Row) -> Canonical:
    return _pair(rows.with_system(row, [user(text(row, "prompt"))]), text(row, "chosen"), text(row, "rejected"))


def _conversations(row: Row) -> Canonical:
    """Answers as message lists; `prompt` is a list, a string that repeats a user's turn, or absent."""
    chosen, rejected = messages(row, "chosen"), messages(row, "rejected")
    if not isinstance(row.get("prompt"), list | str | None):
        raise RowError(f"`prompt` is {rows.kind(row['prompt'])}, expected a string or a list of messages")
    prompt = messages(row, "prompt") if isinstance(row.get("prompt"), list) else []
    history = _history(chosen, rejected)
    if prompt and history[: len(prompt)] != prompt:
        history = [*prompt, *history]
    if not history:
        history = [user(text(row, "prompt"))]
    elif isinstance(row.get("prompt"), str) and not _repeats(row["prompt"], history):
        raise Dropped("prompt is not in the conversation")
    return {"prompt": rows.with_system(row, history), "chosen": [chosen[-1]], "rejected": [rejected[-1]]}


def _history(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages before the last, which must be the same on both sides.

    Raises:
        Dropped: they are not, or the last message is not the assistant's.
    """
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise Dropped("the last turn is not the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("chosen and rejected have different histories")
    return chosen[:-1]


def _repeats(prompt: str, history: list[Message]) -> bool:
    return any(prompt.split() == message["content"].split() for message in history)


def is_transcript(value: object) -> bool:
    """Whether `value` is a `Human: … Assistant: …` text, or a first question as HH writes it, after two line breaks."""
    if not isinstance(value, str):
        return False
    return value.startswith("\n\nHuman:") or (value.startswith("Human:") and "\n\nAssistant:" in value)


def transcript(value: str, found: str) -> list[Message]:
    """The turns of a `Human: … Assistant: …` text; it is cut before speakers only, never inside a turn."""
    head, *parts = _TURN.split(rows.as_text(value, found))
    if head.strip() or not parts:
        raise RowError(f"{found} not a transcript, expected text that begins with “Human:”")
    return [
        {"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _transcripts(row: Row) -> Canonical:
    """HH: whole transcripts on both sides, or a transcript up to `Assistant:` as `prompt` and two answers."""
    if row.get("prompt") is not None and not _are_transcripts(row):
        turns = _asked_turns(row)
        return _pair(turns, text(row, "chosen").strip(), text(row, "rejected").strip())
    chosen, rejected = (transcript(text(row, c), f"`{c}` is") for c in ("chosen", "rejected"))
    history = _history(chosen, rejected)
    if row.get("prompt") is not None and not _begins(text(row, "prompt"), history):
        raise Dropped("prompt is not in the conversation")
    return {"prompt": history, "chosen": [chosen[-1]], "rejected": [rejected[-1]]}


def _begins(prompt: str, history: list[Message]) -> bool:
    """Whether `prompt`, a transcript or one question, is what `history` says."""
    return _asked_turns({"prompt": prompt}) == history if is_transcript(prompt) else _repeats(prompt, history)


def _asked_turns(row: Row) -> list[Message]:
    """The turns of a transcript in `prompt`, without the `Assistant:` that it may end with."""
    turns = transcript(text(row, "prompt"), "`prompt` is")
    return turns[:-1] if turns[-1] == assistant("") else turns


def _question(row: Row) -> Canonical:
    column = "input" if row.get("input") is not None and row.get("question") is None else "question"
    return _pair(rows.with_system(row, [user(text(row, column))]), text(row, "chosen"), text(row, "rejected"))


def _sharegpt(row: Row) -> Canonical:
    """`conversations`, and each answer as a message."""
    history = rows.with_system(row, messages(row, "conversations"))
    chosen, rejected = (rows.as_message(row.get(c), f"`{c}`") for c in ("chosen", "rejected"))
    if chosen["role"] != "assistant" or rejected["role"] != "assistant":
        raise Dropped("the last turn is not the assistant's")
    return {"prompt": history, "chosen": [chosen], "rejected": [rejected]}


def _alpaca(row: Row) -> Canonical:
    return _pair(rows.instruction(row), text(row, "chosen"), text(row, "rejected"))


def _argilla(row: Row) -> Canonical:
    chosen, rejected = text(row, "chosen_response"), text(row, "rejected_response")
    if row.get("instruction") is None:
        return _pair(rows.with_system(row, [user(text(row, "input"))]), chosen, rejected)
    return _pair(rows.instruction(row), chosen, rejected)


def _stackexchange(row: Row) -> Canonical:
    return _pair([user(text(row, "question"))], text(row, "response_j"), text(row, "response_k"))


def _saferlhf(row: Row) -> Canonical:
    better = row["better_response_id"]
    if better not in (0, 1, "0", "1") or isinstance(better, bool):
        raise RowError(f"`better_response_id` is {better!r:.40}, expected 0 or 1")
    answers = [text(row, "response_0"), text(row, "response_1")]
    return _pair([user(text(row, "prompt"))], answers[int(better)], answers[1 - int(better)])


def _completions(row: Row) -> Canonical:
    """A prompt and its scored answers: `{"prompt", "answers": [{"content", "score"}]}`, for `best`."""
    if not isinstance(row["completions"], list):
        raise RowError(f"`completions` is {rows.kind(row['completions'])}, expected a list of answers")
    if isinstance(row.get("prompt"), list):
        turns = rows.with_system(row, messages(row, "prompt"))
    else:
        column = "instruction" if row.get("prompt") is None and row.get("instruction") is not None else "prompt"
        turns = rows.with_system(row, [user(text(row, column))])
    return {"prompt": turns, "answers": [_answer(item, i) for i, item in enumerate(row["completions"])]}


def _answer(item: object, i: int) -> dict[str, Any]:
    where = f"`completions[{i}]`"
    if not isinstance(item, Mapping):
        raise RowError(f"{where} is {rows.kind(item)}, expected an answer with its score")
    column, score = _given(item, _ANSWERS), _given(item, SCORES)
    if column is None or score is None:
        missing, known = ("an answer", _ANSWERS) if column is None else ("a score", SCORES)
        raise RowError(f"{where} has no {missing.split()[1]}, expected one of {', '.join(known)}")
    return {
        "content": rows.as_text(item[column], f"{where} has {column} that is"),
        "score": rows.number(item[score], f"{where} has {score} that is"),
    }


def _given(item: Row, columns: tuple[str, ...]) -> str | None:
    """The first of `columns` that `item` has a value in, or else has at all."""
    there = [column for column in columns if column in item]
    return next((column for column in there if item[column] is not None), there[0] if there else None)


def best(row: Canonical, rejected: str, tie_margin: float, seed: str) -> Canonical:
    """The best of a row's `answers` against the worst, or against a `random` one of those that are clearly worse.

    Raises:
        Dropped: no answer is worse than the best by more than `tie_margin`.
    """
    answers = sorted(row["answers"], key=lambda answer: -answer["score"])
    worse = [a for a in answers[1:] if answers[0]["score"] - a["score"] > tie_margin]
    if not worse:
        raise Dropped("tie")
    other = worse[-1] if rejected == "worst" else random.Random(seed).choice(worse)
    return _pair(row["prompt"], answers[0]["content"], other["content"])


def by_prompt(given: Iterable[tuple[str, Row]]) -> Iterable[tuple[str, Row]]:
    """Rows of one scored answer each as rows of `completions`, one a prompt, at the place of its first answer.

    Raises:
        RowError: the row read last has no answer or no score.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    score = None  # one column for the whole set: scores of two scales cannot be compared
    for place, row in given:
        values = found.setdefault(repr(_asked(row)), (place, {"completions": [], **_asked(row)}))[1]
        score = score or _given(row, SCORES) or SCORES[0]
        answer = {"response": text(row, "response"), "score": rows.number(row.get(score), f"`{score}` is")}
        values["completions"].append(answer)
    yield from found.values()


def _asked(row: Row) -> dict[str, Any]:
    return {column: row[column] for column in ("prompt", "system") if column in row}


def score_gap(row: Row) -> float | None:
    """The chosen answer's score minus the rejected one's, where the row gives both."""
    names = next((pair for pair in _GIVEN if all(row.get(column) is not None for column in pair)), None)
    if names is None:
        return None
    chosen, rejected = (rows.number(row[column], f"`{column}` is") for column in names)
    return chosen - rejected


def _is(kind: type | tuple[type, ...], *columns: str) -> Any:
    return lambda row: all(isinstance(row.get(column), kind) for column in columns)


def _are_transcripts(row: Row) -> bool:
    return is_transcript(row.get("chosen")) and is_transcript(row.get("rejected"))


def _has_transcript(row: Row) -> bool:
    return _are_transcripts(row) or is_transcript(row.get("prompt"))


PREFERENCE = (
    Format(
        "prompt-chosen-rejected",
        "prompt, chosen and rejected as strings",
        ("prompt", "chosen", "rejected"),
        lambda row: isinstance(row["chosen"], str) and not _has_transcript(row),
        _strings,
    ),
    Format(
        "conversational",
        "chosen and rejected as lists of messages",
        ("chosen", "rejected"),
        _is(list, "chosen", "rejected"),
        _conversations,
    ),
    Format(
        "hh",
        "“Human: … Assistant: …” transcripts",
        ("chosen", "rejected"),
        lambda row: isinstance(row["chosen"], str) and _has_transcript(row),
        _transcripts,
    ),
    Format(
        "orca",
        "question (or input), chosen and rejected",
        ("chosen", "rejected"),
        lambda row: (
            _is(str, "chosen", "rejected")(row)
            and (row.get("question") is not None or (row.get("input") is not None and row.get("instruction") is None))
        ),
        _question,
    ),
    Format(
        "sharegpt-ranking",
        "conversations, and chosen and rejected messages",
        ("conversations", "chosen", "rejected"),
        _is(dict, "chosen", "rejected"),
        _sharegpt,
    ),
    Format(
        "alpaca-ranking",
        "instruction, chosen and rejected",
        ("instruction", "chosen", "rejected"),
        _is(str, "chosen", "rejected"),
        _alpaca,
    ),
    Format(
        "argilla",
        "instruction (or input), chosen_response and rejected_response",
        ("chosen_response", "rejected_response"),
        lambda row: row.get("instruction") is not None or row.get("input") is not None,
        _argilla,
    ),
    Format(
        "stackexchange",
        "question, response_j (preferred) and response_k",
        ("question", "response_j", "response_k"),
        lambda row: True,
        _stackexchange,
    ),
    Format(
        "pku-saferlhf",
        "prompt, response_0, response_1 and better_response_id",
        ("prompt", "response_0", "response_1", "better_response_id"),
        lambda row: True,
        _saferlhf,
    ),
    Format(
        "completions",
        "a prompt with a list of scored completions",
        ("completions",),
        lambda row: isinstance(row["completions"], list) and (row.get("instruction") or row.get("prompt")) is not None,
        _completions,
    ),
    Format(
        "scored",
        "prompt, response and its score, a row an answer",
        ("prompt", "response"),
        lambda row: any(row.get(column) is not None for column in SCORES),
        _completions,
        per_answer=True,
    ),
)
