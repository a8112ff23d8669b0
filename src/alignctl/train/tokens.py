"""From canonical rows to token ids: what is trained is what is asked later.

The same code renders prompts for training, evaluation and generation. A prompt is rendered with the template's
generation prompt and tokenized on its own, exactly as it will be when the model is asked; an answer is the rest of the
rendered conversation, cut after its first stop token. So the prompt's ids are a true prefix of both sequences, there is
at most one BOS, and every answer ends in one supervised token on which generation stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alignctl.errors import Problem, RecipeError
from alignctl.formats import Canonical, Message

_PROBE = "7f3a"


class Dropped(Exception):
    """A row that breaks a rule; `reason` is its name in the ledger."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a template, and what was found out about the two."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    has_system: bool
    adds_bos: bool

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The conversation as text; `ask` appends what makes the model answer."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        bos = self.tokenizer.bos_token
        return bos + text if self.adds_bos and not text.startswith(bos) else text

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text; nothing is added to it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Ids that the model is asked with.

        Raises:
            Dropped: the roles do not alternate, or the last word is not the user's.
        """
        turns = self.alternating(prompt)
        if turns[-1]["role"] != "user":
            raise Dropped("roles do not alternate")
        return self.encode(self.render(turns, ask=True))

    def alternating(self, messages: Sequence[Message]) -> list[Message]:
        """`messages` as the template wants them: a system message it does not know is folded into the first user turn.

        Raises:
            Dropped: the roles do not alternate user, assistant, user, …
        """
        system = [m["content"] for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        misplaced = any(m["role"] == "system" for m in messages[1:])
        expected = ["user", "assistant"] * len(turns)
        if misplaced or not turns or any(m["role"] != role for m, role in zip(turns, expected, strict=False)):
            raise Dropped("roles do not alternate")
        if not system:
            return turns
        if self.has_system:
            return [{"role": "system", "content": system[0]}, *turns]
        if not system[0].strip():
            return turns
        return [{"role": "user", "content": f"{system[0]}\n\n{turns[0]['content']}"}, *turns[1:]]

    def answer_ids(self, prompt: Sequence[Message], prompt_ids: list[int], answer: Message) -> list[int]:
        """Ids of `answer` after `prompt`, ending in exactly one stop token.

        Raises:
            Dropped: the answer is empty, or holds a stop token before its end.
        """
        if not answer["content"].strip():
            raise Dropped("empty answer")
        turns = self.alternating(prompt)
        asked = self.render(turns, ask=True)
        whole = self.render([*turns, answer], ask=False)
        if not whole.startswith(asked):
            raise Dropped("template renders the prompt differently with an answer")
        ids = self._after(prompt_ids, whole, whole[len(asked) :])
        return self._ended(ids)

    def _after(self, prompt_ids: list[int], whole: str, rest: str) -> list[int]:
        """Ids of `rest` behind `prompt_ids`; where tokens merge over the seam, `rest` is tokenized on its own."""
        ids = self.encode(whole)
        if ids[: len(prompt_ids)] == prompt_ids:
            return ids[len(prompt_ids) :]
        return self.encode(rest)

    def _ended(self, ids: list[int]) -> list[int]:
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        if not stops:
            return [*ids, self.stop_ids[0]]
        tail = self.tokenizer.decode(ids[stops[0] + 1 :], skip_special_tokens=True)
        if len(stops) > 1 or tail.strip():
            raise Dropped("stop token inside the answer")
        if stops[0] == 0:
            raise Dropped("empty answer")
        return ids[: stops[0] + 1]


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Probe `tokenizer` and its chat template.

    Raises:
        RecipeError: there is no template, it does not work, or nothing in it ends an answer.
    """
    if not tokenizer.chat_template:
        raise RecipeError(
            Problem(
                "model.chat_template",
                "the tokenizer has no chat template of its own",
                "name one: chatml, zephyr, mistral-instruct, instruct, alpaca, or a .jinja file",
            )
        )
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return Encoder(tokenizer, _stop_ids(tokenizer), _has_system(tokenizer), adds_bos)


def _has_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    chat = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}]
    try:
        return _PROBE in tokenizer.apply_chat_template(chat, tokenize=False)
    except TemplateError:
        return False


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token that ends an answer in the template, then the tokenizer's EOS."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise RecipeError(
            Problem("model.chat_template", f"cannot render a conversation: {error}", "mend it")
        ) from error
    if _PROBE not in rendered:
        raise RecipeError(Problem("model.chat_template", "loses the assistant's text", "mend the template"))
    tail = rendered.rpartition(_PROBE)[2]
    special = _special_ids(tokenizer)
    ends = [i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special][:1]
    if tail.strip() and not ends:
        raise RecipeError(
            Problem(
                "model.chat_template",
                f"ends a turn with {tail.strip()!r}, which is no single token of this "
                "tokenizer, so generation could not stop on it",
                "use a template made of the tokenizer's tokens",
            )
        )
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not ends and not eos:
        raise RecipeError(Problem("model.chat_template", "nothing ends an answer", "use a tokenizer with an EOS token"))
    return tuple(dict.fromkeys([*ends, *eos]))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def pair(encoder: Encoder, row: Canonical, max_length: int) -> dict[str, list[int]]:
    """`{"prompt_ids", "chosen_ids", "rejected_ids"}` of a preference row.

    Raises:
        Dropped: the row breaks a rule.
    """
    chosen, rejected = row["chosen"][-1], row["rejected"][-1]
    if chosen["content"].strip() == rejected["content"].strip():
        raise Dropped("chosen equals rejected")
    prompt_ids = encoder.prompt_ids(row["prompt"])
    sides = {
        "chosen_ids": encoder.answer_ids(row["prompt"], prompt_ids, chosen),
        "rejected_ids": encoder.answer_ids(row["prompt"], prompt_ids, rejected),
    }
    if sides["chosen_ids"] == sides["rejected_ids"]:
        raise Dropped("chosen equals rejected")
    if len(prompt_ids) + max(map(len, sides.values())) > max_length:
        raise Dropped("longer than max_length")
    return {"prompt_ids": prompt_ids, **sides}


def dialogue(encoder: Encoder, row: Canonical, max_length: int) -> dict[str, list[int]]:
    """`{"input_ids", "labels"}` of a row for SFT; labels are -100 outside the assistant's turns.

    Raises:
        Dropped: the row breaks a rule.
    """
    turns = encoder.alternating(row["messages"])
    answers = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
    if not answers:
        raise Dropped("no assistant turn")
    last = answers[-1]
    ids = encoder.prompt_ids(turns[:last])
    labels = [-100] * len(ids)
    for i in answers[:-1]:
        _supervise(encoder, turns, i, ids, labels)
    final = encoder.answer_ids(turns[:last], ids, turns[last])
    if len(ids) + len(final) > max_length:
        raise Dropped("longer than max_length")
    return {"input_ids": ids + final, "labels": labels + final}


def _supervise(encoder: Encoder, turns: list[Message], i: int, ids: list[int], labels: list[int]) -> None:
    """Copy the ids of the earlier answer `turns[i]` into `labels`.

    Raises:
        Dropped: the conversation does not hold the answer's ids as they would be generated.
    """
    start = encoder.prompt_ids(turns[:i])
    answer = encoder.answer_ids(turns[:i], start, turns[i])
    end = len(start) + len(answer)
    if ids[:end] != start + answer:
        raise Dropped("an earlier answer's tokens merge with its prompt")
    labels[len(start) : end] = answer


def supervised(encoded: dict[str, Any]) -> int:
    """How many tokens of an encoded row carry loss."""
    if "labels" in encoded:
        return sum(label != -100 for label in encoded["labels"])
    return len(encoded["chosen_ids"]) + len(encoded["rejected_ids"])
