"""From canonical rows to token ids: what is trained is what is asked later.

The same code renders prompts for training, evaluation and generation. A prompt is rendered with the template's
generation prompt and tokenized on its own, exactly as it will be when the model is asked; an answer is the rest of the
rendered conversation, cut after its first stop token. So the prompt's ids are a true prefix of both sequences, there is
at most one BOS, and every answer ends in one supervised token on which generation stops, unless the recipe asks for
answers to be cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError
from transformers import PreTrainedTokenizerBase

from alignctl.errors import Problem, RecipeError
from alignctl.formats import Canonical, Dropped, Message

_PROBE = "7f3a"
OVERLONG = "longer than max_length"
PROMPT_CUT = "oldest turns of the prompt left out"
ANSWER_CUT = "answer cut, without its end token"
TURNS_CUT = "last turns left out"
UNANSWERED = "last question left out: it has no answer"
RENDERED_ANEW = "template renders the prompt differently with an answer"
ALIKE_WITHIN = "chosen equals rejected within max_length"

# A row's rules ask for texts to be tokenized and get their ids, so that many rows share one call of the tokenizer.
Ids = list[int]
Asking = Generator[list[str], list[Ids], "Encoded"]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a template, and what was found out about the two."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    has_system: bool
    adds_bos: bool
    special: re.Pattern[str]

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The conversation as text; `ask` appends what makes the model answer."""
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        except OverflowError as error:  # a loop that the sandbox does not allow
            raise TemplateRuntimeError(str(error)) from error
        return self.begun(text)

    def begun(self, text: str) -> str:
        """`text` with the BOS token before it, where the tokenizer puts one and `text` does not begin with it."""
        bos = self.tokenizer.bos_token
        return bos + text if self.adds_bos and not text.lstrip().startswith(bos) else text

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids of rendered texts; nothing is added to them."""
        out: list[Ids] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return out

    def prompt_ids(self, prompt: Sequence[Message]) -> Ids:
        """Ids that the model is asked with.

        Raises:
            Dropped: the roles do not alternate, or the last word is not the user's.
        """
        return self.encode([self.render(self.question(prompt), ask=True)])[0]

    def question(self, prompt: Sequence[Message]) -> list[Message]:
        """`prompt` as the template wants it, ending with the user's turn.

        Raises:
            Dropped: the roles do not alternate, or the last word is not the user's.
        """
        turns = self.alternating(prompt)
        if turns[-1]["role"] != "user":
            raise Dropped("roles do not alternate")
        return turns

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

    def answered(self, turns: Sequence[Message], asked: str, answer: Message) -> str:
        """The rendered conversation with `answer` behind the rendered question `asked`.

        Raises:
            Dropped: the answer is empty, or the template renders the question differently before it.
        """
        if not answer["content"].strip():
            raise Dropped("empty answer")
        whole = self.render([*turns, answer], ask=False)
        if not whole.startswith(asked):
            raise Dropped(RENDERED_ANEW)
        return whole

    def last_special(self, text: str) -> int:
        """Where the last special token in `text` begins, or 0: what follows one is tokenized on its own."""
        return max((match.start() for match in self.special.finditer(text)), default=0)

    def ended(self, ids: Ids) -> Ids:
        """An answer's ids up to its stop token, which is put there if the template has none.

        Raises:
            Dropped: the answer is empty, or holds a stop token before its end.
        """
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
    return Encoder(tokenizer, _stop_ids(tokenizer), _has_system(tokenizer), adds_bos, _special(tokenizer))


def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds a special token in text."""
    names = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    return re.compile("|".join(re.escape(name) for name in names if name.strip()) or r"(?!)")


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
    special = special_ids(tokenizer)
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


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that are no text: the tokenizer's special ones and those added to it."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


@dataclass(frozen=True)
class Limit:
    """How long a row may be, and what happens to a longer one.

    `overlong` is the recipe's `data.overlong`; `longest_token` is the most characters that one token stands for, so
    that a text of more than `max_length * longest_token` characters is known to be too long without reading it.
    """

    max_length: int
    overlong: str = "drop"
    longest_token: int = 2**31

    def excludes(self, text: str) -> bool:
        """Whether `text` is too long by its characters alone, and is not to be cut."""
        return self.overlong != "truncate_completion" and len(text) > self.max_length * self.longest_token


@dataclass(frozen=True)
class Encoded:
    """The ids of a row by column, and what was cut to make it fit (empty: nothing)."""

    ids: dict[str, Ids]
    cut: str = ""


def encode_rows(encoder: Encoder, rows: Iterable[Asking]) -> list[Encoded | Dropped]:
    """Run the rules of many rows at once; rows that break one come back as `Dropped`."""
    asking = dict(enumerate(rows))
    out: dict[int, Encoded | Dropped] = {}
    answers: dict[int, list[Ids] | None] = dict.fromkeys(asking)
    while asking:
        texts: dict[int, list[str]] = {}
        for i, row in list(asking.items()):
            try:
                texts[i] = next(row) if answers[i] is None else row.send(answers[i] or [])
            except StopIteration as done:
                out[i] = done.value
            except Dropped as dropped:
                out[i] = dropped
            if i in out:
                del asking[i]
        ids = iter(encoder.encode([text for part in texts.values() for text in part]) if texts else [])
        answers = {i: [next(ids) for _ in part] for i, part in texts.items()}
    return [out[i] for i in sorted(out)]


def pair(encoder: Encoder, row: Canonical, limit: Limit) -> Asking:
    """The rules of a preference row; its columns are `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        Dropped: the row breaks a rule.
    """
    answers = row["chosen"][-1], row["rejected"][-1]
    if answers[0]["content"].strip() == answers[1]["content"].strip():
        raise Dropped("chosen equals rejected")
    prompt, cut = row["prompt"], ""
    while True:
        turns = encoder.question(prompt)
        asked = encoder.render(turns, ask=True)
        wholes = [encoder.answered(turns, asked, answer) for answer in answers]
        if not any(map(limit.excludes, wholes)):
            prompt_ids, sides = yield from _sides(encoder, asked, wholes)
            if len(prompt_ids) + max(map(len, sides)) <= limit.max_length:
                break
            if limit.overlong == "truncate_completion":
                sides, cut = _cut(prompt_ids, sides, limit), ANSWER_CUT
                break
        prompt, cut = without_oldest(prompt, limit), PROMPT_CUT
    if sides[0] == sides[1]:
        raise Dropped(ALIKE_WITHIN if cut == ANSWER_CUT else "chosen equals rejected")
    return Encoded({"prompt_ids": prompt_ids, "chosen_ids": sides[0], "rejected_ids": sides[1]}, cut)


def _sides(encoder: Encoder, asked: str, wholes: list[str]) -> Generator[list[str], list[Ids], tuple[Ids, list[Ids]]]:
    """Ids of the question, and of each answer after it; where tokens merge over the seam, an answer is on its own."""
    start = encoder.last_special(asked)
    prompt_ids, seam, *found = yield [asked, asked[start:], *(whole[start:] for whole in wholes)]
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and prompt_ids[:2] == [bos, bos]:
        raise Dropped("two BOS tokens")
    n = len(seam)
    merged = [i for i, ids in enumerate(found) if ids[:n] != seam]
    # Behind a special token, for a tokenizer may put a space before the start of a text.
    end = encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids[0])
    alone = iter((yield [end + wholes[i][len(asked) :] for i in merged]) if merged else [])
    sides = [next(alone)[1:] if i in merged else ids[n:] for i, ids in enumerate(found)]
    return prompt_ids, [encoder.ended(side) for side in sides]


def _cut(prompt_ids: Ids, sides: list[Ids], limit: Limit) -> list[Ids]:
    room = limit.max_length - len(prompt_ids)
    if room < 1:
        raise Dropped("prompt leaves no room for an answer")
    return [side[:room] for side in sides]


def without_oldest(messages: list[Message], limit: Limit) -> list[Message]:
    """`messages` without their oldest question and answer; a system message stays.

    Raises:
        Dropped: the recipe wants no cut prompts, or one question is all that there is.
    """
    system = [m for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    if limit.overlong != "truncate_prompt" or len(turns) < 3:
        raise Dropped(OVERLONG)
    return [*system, *turns[2:]]


def dialogue(encoder: Encoder, row: Canonical, limit: Limit) -> Asking:
    """The rules of a row for SFT; its columns are `input_ids` and `labels`, -100 outside the assistant's turns.

    Plain text has no turns: all of it is trained, and its end.

    Raises:
        Dropped: the row breaks a rule.
    """
    if "text" in row:
        return (yield from _plain(encoder, row["text"], limit))
    messages = _answered(row["messages"])
    cut = "" if len(messages) == len(row["messages"]) else UNANSWERED
    while True:
        ids, labels = yield from _labelled(encoder, messages, limit)
        if ids and len(ids) <= limit.max_length:
            break
        if limit.overlong == "truncate_completion":
            ids, labels, cut = _cut_off(ids, labels, limit)
            break
        messages, cut = without_oldest(messages, limit), PROMPT_CUT
    return Encoded({"input_ids": ids, "labels": labels}, cut)


def _cut_off(ids: Ids, labels: Ids, limit: Limit) -> tuple[Ids, Ids, str]:
    """A conversation up to the limit, or to its last answer before it."""
    trained = [i for i, label in enumerate(labels[: limit.max_length]) if label != -100]
    if not trained:
        raise Dropped("prompt leaves no room for an answer")
    end = trained[-1] + 1
    return ids[:end], labels[:end], ANSWER_CUT if end == limit.max_length and labels[end] != -100 else TURNS_CUT


def _answered(messages: list[Message]) -> list[Message]:
    """`messages` up to the last answer."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Dropped("no assistant turn")
    return messages[: answers[-1] + 1]


def _labelled(
    encoder: Encoder, messages: list[Message], limit: Limit
) -> Generator[list[str], list[Ids], tuple[Ids, Ids]]:
    """Ids and labels of a whole conversation up to its last answer; nothing when it is too long to be tokenized."""
    turns = encoder.alternating(messages)
    answers = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
    asked = [encoder.render(turns[:i], ask=True) for i in answers]
    wholes = [encoder.answered(turns[:i], text, turns[i]) for i, text in zip(answers, asked, strict=True)]
    if limit.excludes(wholes[-1]):
        return [], []
    parts: list[tuple[Ids, Ids]] = []
    for text, whole in zip(asked, wholes, strict=True):
        prompt_ids, (answer,) = yield from _sides(encoder, text, [whole])
        parts.append((prompt_ids, answer))
    ids, labels = parts[-1][0] + parts[-1][1], [-100] * len(parts[-1][0]) + parts[-1][1]
    for prompt_ids, answer in parts[:-1]:
        start, end = len(prompt_ids), len(prompt_ids) + len(answer)
        if ids[:end] != prompt_ids + answer:
            raise Dropped("an earlier answer's tokens merge with its prompt")
        labels[start:end] = answer
    return ids, labels


def _plain(encoder: Encoder, text: str, limit: Limit) -> Asking:
    if not text.strip():
        raise Dropped("empty text")
    if limit.excludes(text):
        raise Dropped(OVERLONG)
    eos = encoder.tokenizer.eos_token_id
    (ids,) = yield [encoder.begun(text)]
    if not ids:
        raise Dropped("empty text")
    if eos is not None:
        end = len(ids) - ids[::-1].index(eos) if eos in ids else 0
        blank = not encoder.tokenizer.decode(ids[end:]).strip()  # as templates write it behind the last turn
        ids = ids[:end] if end and blank else [*ids, eos]
    if len(ids) <= limit.max_length:
        return Encoded({"input_ids": ids, "labels": list(ids)})
    if limit.overlong != "truncate_completion":
        raise Dropped(OVERLONG)
    cut = ids[: limit.max_length]
    return Encoded({"input_ids": cut, "labels": list(cut)}, ANSWER_CUT)


def encode_one(encoder: Encoder, asking: Asking) -> dict[str, Any]:
    """The ids of a single row.

    Raises:
        Dropped: the row breaks a rule.
    """
    (found,) = encode_rows(encoder, [asking])
    if isinstance(found, Dropped):
        raise found
    return found.ids
