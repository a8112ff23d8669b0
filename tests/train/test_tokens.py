"""From conversations to ids: what is trained is what is asked, and every answer ends in one stop token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignctl.formats import Canonical, Dropped, Message
from alignctl.formats.rows import assistant, user
from alignctl.recipe import catalog
from alignctl.train import tokens
from alignctl.train.tokens import Encoded, Encoder, Ids, Limit

MakeEncoder = Callable[[str, str], Encoder]

FAMILIES = ("phi-2", "mistral", "smollm", "qwen2")
TEMPLATES = ("alpaca", "chatml", "instruct", "mistral-instruct", "zephyr")
EOS = {"phi-2": "<|endoftext|>", "mistral": "</s>", "smollm": "<|im_end|>", "qwen2": "<|im_end|>"}
SPECIAL = ("<|", "<s>", "</s>")


def system(content: str) -> Message:
    return {"role": "system", "content": content}


PROMPTS: dict[str, list[Message]] = {
    "single turn": [user("What is tea?")],
    "system": [system("Be short."), user("What is tea?")],
    "three turns": [
        user("What is tea?"),
        assistant("Leaves in water."),
        user(" And\n\ncoffee? "),
        assistant("Beans\tin water…"),
        user("Und Kräutertee 🌿?"),
    ],
    "system and two turns": [system("Be short.\n"), user("Tea?"), assistant("Leaves."), user("Coffee?")],
}
ANSWERS = (
    "Leaves.",
    "  two leading spaces",
    "\n\nblank lines first",
    "trailing space ",
    "ends with a line\n",
    "🌿 é ß",
)


def decode(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stop_text(template: str, family: str) -> str:
    """What ends an answer in `template` on the tokenizer of `family`."""
    return "<|im_end|>" if template == "chatml" else EOS[family]


def lead_of(encoder: Encoder) -> str:
    """What stands between the text that asks and the answer itself."""
    return " " if "' ' + message['content']" in str(encoder.tokenizer.chat_template) else ""


def rendered_to_stop(encoder: Encoder, turns: list[Message], stop: str) -> str:
    """What the tokenizer's own template makes of `turns`, up to and including the last stop token."""
    text = encoder.tokenizer.apply_chat_template(turns, tokenize=False)
    return text[: text.rindex(stop) + len(stop)]


def folded(encoder: Encoder, turns: list[Message]) -> list[Message]:
    """`turns` with the system message in the first user turn, where the template needs that and it is not empty."""
    if turns[0]["role"] != "system" or encoder.has_system:
        return turns
    if not turns[0]["content"].strip():
        return turns[1:]
    return [user(turns[0]["content"] + "\n\n" + turns[1]["content"]), *turns[2:]]


def pair(encoder: Encoder, prompt: list[Message], chosen: str, rejected: str) -> dict[str, Ids]:
    """The ids of a preference row of any length."""
    row = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return tokens.encode_one(encoder, tokens.pair(encoder, row, Limit(10**6)))


def dialogue(encoder: Encoder, turns: list[Message]) -> dict[str, Ids]:
    """The ids and labels of a row for SFT of any length."""
    return tokens.encode_one(encoder, tokens.dialogue(encoder, {"messages": turns}, Limit(10**6)))


def check_text(encoder: Encoder, prompt: list[Message], answer: str) -> Ids:
    """Prompt and answer are the rendered conversation but for blanks behind it; the answer's ids."""
    encoded = pair(encoder, prompt, answer, f"{answer.strip()} or not")
    turns = folded(encoder, prompt)
    asked = encoder.tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    whole = encoder.tokenizer.apply_chat_template([*turns, assistant(answer)], tokenize=False)
    text = decode(encoder, encoded["prompt_ids"] + encoded["chosen_ids"])
    assert encoded["prompt_ids"] == encoder.prompt_ids(prompt) == asked
    assert whole.startswith(text)
    assert not whole[len(text) :].strip()
    return encoded["chosen_ids"]


def check_answer(encoder: Encoder, prompt: list[Message], answer: str, stop: str) -> None:
    """Prompt and answer are the rendered conversation, with one stop token, at the end, and one BOS at most."""
    answer_ids = check_text(encoder, prompt, answer)
    assert decode(encoder, answer_ids) == lead_of(encoder) + answer + stop
    assert [i for i in answer_ids if i in encoder.stop_ids] == answer_ids[-1:]
    bos = encoder.tokenizer.bos_token_id
    assert bos is None or (encoder.prompt_ids(prompt) + answer_ids)[:2] != [bos, bos]


def runs(encoded: dict[str, list[int]]) -> list[list[int]]:
    """The stretches of ids that carry loss, in order."""
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    groups = groupby(pairs, key=lambda pair: pair[1] != -100)
    return [[label for _, label in group] for kept, group in groups if kept]


def check_dialogue(encoder: Encoder, turns: list[Message], stop: str) -> None:
    """Every assistant turn carries loss up to its stop token, and nothing else does."""
    encoded = dialogue(encoder, turns)
    lead = lead_of(encoder)
    expected = [lead + turn["content"] + stop for turn in turns if turn["role"] == "assistant"]
    assert [decode(encoder, run) for run in runs(encoded)] == expected
    assert all(label in (-100, i) for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True))
    assert decode(encoder, encoded["input_ids"]) == rendered_to_stop(encoder, folded(encoder, turns), stop)


def reason(encoder: Encoder, prompt: list[Message], chosen: str, rejected: str) -> str:
    """Why the pair is dropped."""
    with pytest.raises(Dropped) as dropped:
        pair(encoder, prompt, chosen, rejected)
    assert str(dropped.value) == dropped.value.reason
    return dropped.value.reason


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_answer_are_the_conversation(
    make_encoder: MakeEncoder, template: str, family: str, prompt: list[Message]
) -> None:
    for answer in ANSWERS:
        check_answer(make_encoder(family, template), prompt, answer, stop_text(template, family))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_assistant_turn_is_supervised(
    make_encoder: MakeEncoder, template: str, family: str, prompt: list[Message]
) -> None:
    turns = [*prompt, assistant("That is all.")]
    check_dialogue(make_encoder(family, template), turns, stop_text(template, family))


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_three_sequences_of_a_pair(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    prompt = PROMPTS["system and two turns"]
    encoded = pair(encoder, prompt, "Beans.", "Stones.")
    assert list(encoded) == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert encoded["prompt_ids"] == encoder.prompt_ids(prompt)
    lead = " " if template in ("instruct", "mistral-instruct") else ""
    stop = stop_text(template, "mistral")
    assert decode(encoder, encoded["chosen_ids"]) == f"{lead}Beans.{stop}"
    assert decode(encoder, encoded["rejected_ids"]) == f"{lead}Stones.{stop}"


# --- the BOS ---


@pytest.mark.parametrize("template", ["alpaca", "instruct", "mistral-instruct", "zephyr"])
def test_one_bos_where_the_tokenizer_adds_one(
    plain_tokenizer: Callable[..., PreTrainedTokenizerBase], template: str
) -> None:
    tokenizer = plain_tokenizer(adds_bos=True)
    tokenizer.chat_template = catalog.template(template)
    encoder = tokens.encoder(tokenizer)
    prompt = PROMPTS["three turns"]
    encoded = pair(encoder, prompt, "Leaves.", "Stones.")
    ids = encoded["prompt_ids"] + encoded["chosen_ids"]
    bos = tokenizer.bos_token_id
    assert encoder.adds_bos
    assert [i for i, token in enumerate(ids) if token == bos] == [0]
    expected = rendered_to_stop(encoder, [*prompt, assistant("Leaves.")], "</s>").removeprefix("<s>")
    assert decode(encoder, ids) == "<s>" + expected


# --- roles ---


NOT_ALTERNATING: dict[str, list[Message]] = {
    "nothing": [],
    "system alone": [system("Be short.")],
    "answer first": [assistant("Hello."), user("Tea?")],
    "two questions": [user("Tea?"), user("Coffee?")],
    "two answers": [user("Tea?"), assistant("Leaves."), assistant("More leaves."), user("Coffee?")],
    "two system messages": [system("Be short."), system("Be kind."), user("Tea?")],
    "system in the middle": [user("Tea?"), assistant("Leaves."), system("Be short."), user("Coffee?")],
    "system at the end": [user("Tea?"), system("Be short.")],
}


@pytest.mark.parametrize("template", ["zephyr", "instruct"])
@pytest.mark.parametrize("turns", NOT_ALTERNATING.values(), ids=NOT_ALTERNATING.keys())
def test_roles_that_do_not_alternate(make_encoder: MakeEncoder, template: str, turns: list[Message]) -> None:
    encoder = make_encoder("mistral", template)
    with pytest.raises(Dropped, match=r"^roles do not alternate$"):
        encoder.prompt_ids(turns)
    assert reason(encoder, turns, "Leaves.", "Stones.") == "roles do not alternate"
    with pytest.raises(Dropped, match=r"^roles do not alternate$"):
        dialogue(encoder, [*turns, assistant("Leaves.")])


def test_a_prompt_that_ends_with_an_answer_does_not_alternate(make_encoder: MakeEncoder) -> None:
    prompt = [user("Tea?"), assistant("Leaves.")]
    assert reason(make_encoder("mistral", "zephyr"), prompt, "Yes.", "No.") == "roles do not alternate"


# --- answers ---


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ["", " ", "\n\t \n"])
def test_an_empty_answer(make_encoder: MakeEncoder, template: str, answer: str) -> None:
    encoder = make_encoder("mistral", template)
    assert reason(encoder, [user("Tea?")], answer, "Stones.") == "empty answer"
    assert reason(encoder, [user("Tea?")], "Leaves.", answer) == "empty answer"
    for turns in ([user("Tea?"), assistant(answer)], [user("a"), assistant(answer), user("b"), assistant("c")]):
        with pytest.raises(Dropped, match=r"^empty answer$"):
            dialogue(encoder, turns)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["Leaves.{}Stones.", "Leaves.{}", "Leaves.{} \n", "{}{}Stones.", "{}Leaves."])
def test_an_answer_with_the_stop_token(make_encoder: MakeEncoder, template: str, family: str, answer: str) -> None:
    encoder = make_encoder(family, template)
    for stop in {stop_text(template, family), EOS[family]}:
        content = answer.replace("{}", stop)
        assert reason(encoder, [user("Tea?")], content, "Stones.") == "stop token inside the answer"
        assert reason(encoder, [user("Tea?")], "Leaves.", content) == "stop token inside the answer"


def test_an_earlier_answer_with_the_stop_token(make_encoder: MakeEncoder) -> None:
    turns = [user("Tea?"), assistant("Leaves.</s>Stones."), user("Coffee?"), assistant("Beans.")]
    with pytest.raises(Dropped, match=r"^stop token inside the answer$"):
        dialogue(make_encoder("mistral", "zephyr"), turns)


@pytest.mark.parametrize("rejected", ["Leaves.", " Leaves.\n"])
def test_chosen_equals_rejected(make_encoder: MakeEncoder, rejected: str) -> None:
    assert reason(make_encoder("mistral", "zephyr"), [user("Tea?")], "Leaves.", rejected) == "chosen equals rejected"


def test_pairs_that_differ_in_case_alone_are_kept(make_encoder: MakeEncoder) -> None:
    encoded = pair(make_encoder("mistral", "zephyr"), [user("Tea?")], "Leaves.", "leaves.")
    assert encoded["chosen_ids"] != encoded["rejected_ids"]


def test_a_dialogue_without_an_answer(make_encoder: MakeEncoder) -> None:
    with pytest.raises(Dropped, match=r"^no assistant turn$"):
        dialogue(make_encoder("mistral", "zephyr"), [user("Tea?")])


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_question_after_the_last_answer_is_left_out(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    turns = PROMPTS["system and two turns"][:-1]
    limit = Limit(1024)
    rows = [tokens.dialogue(encoder, {"messages": m}, limit) for m in (turns, [*turns, user("Milk?")])]
    without, more = tokens.encode_rows(encoder, rows)
    assert isinstance(without, Encoded)
    assert without.cut == ""
    assert more == Encoded(without.ids, "last question left out: it has no answer")


# --- tokens that merge over the seam of prompt and answer ---


@pytest.fixture(scope="session")
def merging(plain_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> Encoder:
    """A tokenizer for which the line end before an answer and those at its start are one token."""
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = catalog.template("zephyr")
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    return tokens.encoder(tokenizer)


@pytest.mark.parametrize("answer", ["\nLeaves.", "\n\nLeaves.", "\n\n\nLeaves."])
def test_merged_tokens_leave_the_prompt_as_it_is_asked(merging: Encoder, answer: str) -> None:
    check_answer(merging, [user("Tea?")], answer, "</s>")


@pytest.mark.parametrize("answer", ["\nLeaves.", "\n\nLeaves.", "\n\n\nLeaves."])
def test_merged_tokens_in_a_last_turn(merging: Encoder, answer: str) -> None:
    check_dialogue(merging, [user("Tea?"), assistant("Leaves."), user("Coffee?"), assistant(answer)], "</s>")


@pytest.mark.parametrize("answer", ["\n\nLeaves.", "\n\n\nLeaves."])
def test_merged_tokens_in_an_earlier_turn_drop_the_row(merging: Encoder, answer: str) -> None:
    turns = [user("Tea?"), assistant(answer), user("Coffee?"), assistant("Beans.")]
    with pytest.raises(Dropped, match=r"^an earlier answer's tokens merge with its prompt$"):
        dialogue(merging, turns)


def test_an_earlier_turn_whose_tokens_do_not_merge_is_supervised(merging: Encoder) -> None:
    check_dialogue(merging, [user("Tea?"), assistant("\nLeaves."), user("Coffee?"), assistant("Beans.")], "</s>")


@pytest.fixture(scope="session")
def spaced() -> Callable[[str], Encoder]:
    """Encoders that put a space before a text given on its own, in the manner of SentencePiece."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [chr(i) for i in range(128)]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    core.train_from_iterator(["Leaves\n\nare tea"] * 3, trainer)

    def build(template: str) -> Encoder:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = catalog.template(template)
        assert tokenizer.convert_ids_to_tokens(tokenizer("Leaves")["input_ids"])[0].startswith("▁")
        return tokens.encoder(tokenizer)

    return build


@pytest.mark.parametrize("template", ["alpaca", "instruct", "mistral-instruct", "zephyr"])
@pytest.mark.parametrize("answer", ["Leaves.", " Leaves.", "  \n Leaves."])
def test_no_space_slips_in_before_an_answer(spaced: Callable[[str], Encoder], template: str, answer: str) -> None:
    check_text(spaced(template), [user("Tea?")], answer)


@pytest.mark.parametrize("template", ["alpaca", "zephyr"])
def test_no_space_slips_in_before_a_merged_answer(spaced: Callable[[str], Encoder], template: str) -> None:
    check_text(spaced(template), [user("Tea?")], "\nLeaves.")


# --- any text ---


def harmless(text: str) -> bool:
    return not any(mark in text for mark in SPECIAL)


characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t.:#[]<>|'🌿é")
texts = st.text(characters, max_size=30).filter(harmless)
answers = texts.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """A system message or none, and one to four turns that end with an answer."""
    turns = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [user(draw(texts)), assistant(draw(answers))]
    return turns


many = settings(max_examples=120, deadline=None, derandomize=True)


@many
@given(family=st.sampled_from(FAMILIES), template=st.sampled_from(TEMPLATES), turns=conversations())
def test_any_prompt_and_answer(make_encoder: MakeEncoder, family: str, template: str, turns: list[Message]) -> None:
    check_answer(make_encoder(family, template), turns[:-1], turns[-1]["content"], stop_text(template, family))


@many
@given(family=st.sampled_from(FAMILIES), template=st.sampled_from(TEMPLATES), turns=conversations())
def test_any_dialogue(make_encoder: MakeEncoder, family: str, template: str, turns: list[Message]) -> None:
    check_dialogue(make_encoder(family, template), turns, stop_text(template, family))


@many
@given(question=texts, lead=st.text("\n ", max_size=5), answer=answers)
def test_any_merged_answer(merging: Encoder, question: str, lead: str, answer: str) -> None:
    check_answer(merging, [user(question)], lead + answer, "</s>")


@many
@given(template=st.sampled_from(TEMPLATES), turns=conversations())
def test_any_system_message_is_folded_once(make_encoder: MakeEncoder, template: str, turns: list[Message]) -> None:
    encoder = make_encoder("mistral", template)
    once = encoder.alternating(turns)
    assert encoder.alternating(once) == once
    assert [m["role"] for m in once if m["role"] != "system"] == ["user", "assistant"] * (len(once) // 2)


marked = st.lists(texts | st.sampled_from(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "\n"]), max_size=5).map("".join)


@many
@given(
    family=st.sampled_from([*FAMILIES, "plain"]),
    template=st.sampled_from(TEMPLATES),
    question=marked,
    lead=st.text("\n ", max_size=3),
    answer=answers,
)
def test_the_ids_are_those_of_the_whole_text(
    make_encoder: MakeEncoder, merging: Encoder, family: str, template: str, question: str, lead: str, answer: str
) -> None:
    """Only what follows the last special token is tokenized with the answer, which must not show."""
    encoder = merging if family == "plain" else make_encoder(family, template)
    turns = [user(question), assistant(lead + answer)]
    encoded = pair(encoder, turns[:1], turns[1]["content"], "No, it is not.")
    asked, whole = encoder.render(turns[:1], ask=True), encoder.render(turns, ask=False)
    prompt_ids, whole_ids, answer_ids = encoder.encode([asked, whole, whole[len(asked) :]])
    n = len(prompt_ids)
    expected = whole_ids[n:] if whole_ids[:n] == prompt_ids else answer_ids
    assert encoded["prompt_ids"] == prompt_ids
    assert encoded["chosen_ids"] == expected[: len(encoded["chosen_ids"])]
    assert not decode(encoder, expected[len(encoded["chosen_ids"]) :]).strip()


@settings(many, max_examples=40)
@given(template=st.sampled_from(TEMPLATES), rows=st.lists(st.tuples(conversations(), st.just("") | texts), max_size=8))
def test_many_rows_at_once_are_as_one_by_one(
    make_encoder: MakeEncoder, template: str, rows: list[tuple[list[Message], str]]
) -> None:
    encoder, limit = make_encoder("mistral", template), Limit(90, "truncate_prompt")

    def rules() -> list[tokens.Asking]:
        pairs = [{"prompt": t[:-1], "chosen": t[-1:], "rejected": [assistant(other)]} for t, other in rows]
        said: list[Canonical] = [{"messages": t} for t, _ in rows] + [{"text": other} for _, other in rows]
        return [tokens.pair(encoder, row, limit) for row in pairs] + [tokens.dialogue(encoder, r, limit) for r in said]

    together = tokens.encode_rows(encoder, rules())
    alone = [tokens.encode_rows(encoder, [rule])[0] for rule in rules()]
    assert list(map(repr, together)) == list(map(repr, alone))
    assert len(together) == 3 * len(rows)


@many
@given(family=st.sampled_from(FAMILIES), text=answers)
def test_any_plain_text(make_encoder: MakeEncoder, family: str, text: str) -> None:
    encoder = make_encoder(family, "chatml")
    encoded = tokens.encode_one(encoder, tokens.dialogue(encoder, {"text": text}, Limit(1024)))
    assert decode(encoder, encoded["input_ids"]) == text + EOS[family]
    assert encoded["labels"] == encoded["input_ids"]
