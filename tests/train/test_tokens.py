"""From conversations to ids: what is trained is what is asked, and every answer ends in one stop token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignctl.errors import RecipeError
from alignctl.formats import Message
from alignctl.recipe import catalog
from alignctl.train import tokens
from alignctl.train.tokens import Dropped, Encoder

MakeTokenizer = Callable[[str], PreTrainedTokenizerBase]
MakeEncoder = Callable[[str, str], Encoder]

FAMILIES = ("phi-2", "mistral", "smollm", "qwen2")
TEMPLATES = ("alpaca", "chatml", "instruct", "mistral-instruct", "zephyr")
EOS = {"phi-2": "<|endoftext|>", "mistral": "</s>", "smollm": "<|im_end|>", "qwen2": "<|im_end|>"}
SPECIAL = ("<|", "<s>", "</s>")


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


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

TURNS = [user("Tea?"), assistant("Leaves."), user("Coffee?"), assistant("Beans.")]
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
RENDERED = {
    "alpaca": PREAMBLE + "### Instruction:\nTea?\n\n### Response:\nLeaves.</s>\n\n"
    "### Instruction:\nCoffee?\n\n### Response:\nBeans.</s>\n\n",
    "chatml": "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\nLeaves.<|im_end|>\n"
    "<|im_start|>user\nCoffee?<|im_end|>\n<|im_start|>assistant\nBeans.<|im_end|>\n",
    "instruct": "Instruct: Tea?\nOutput: Leaves.</s>\nInstruct: Coffee?\nOutput: Beans.</s>\n",
    "mistral-instruct": "<s>[INST] Tea? [/INST] Leaves.</s>[INST] Coffee? [/INST] Beans.</s>",
    "zephyr": "<|user|>\nTea?</s>\n<|assistant|>\nLeaves.</s>\n<|user|>\nCoffee?</s>\n<|assistant|>\nBeans.</s>\n",
}
ASKED = {
    "alpaca": PREAMBLE + "### Instruction:\nTea?\n\n### Response:\nLeaves.</s>\n\n"
    "### Instruction:\nCoffee?\n\n### Response:\n",
    "chatml": "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\nLeaves.<|im_end|>\n"
    "<|im_start|>user\nCoffee?<|im_end|>\n<|im_start|>assistant\n",
    "instruct": "Instruct: Tea?\nOutput: Leaves.</s>\nInstruct: Coffee?\nOutput:",
    "mistral-instruct": "<s>[INST] Tea? [/INST] Leaves.</s>[INST] Coffee? [/INST]",
    "zephyr": "<|user|>\nTea?</s>\n<|assistant|>\nLeaves.</s>\n<|user|>\nCoffee?</s>\n<|assistant|>\n",
}
ASKED_WITH_SYSTEM = {
    "alpaca": "Be short.\n\n### Instruction:\nTea?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n",
    "instruct": "Instruct: Be short.\n\nTea?\nOutput:",
    "mistral-instruct": "<s>[INST] Be short.\n\nTea? [/INST]",
    "zephyr": "<|system|>\nBe short.</s>\n<|user|>\nTea?</s>\n<|assistant|>\n",
}


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


def check_answer(encoder: Encoder, prompt: list[Message], answer: str, stop: str) -> None:
    """Prompt and answer are the rendered conversation, with one stop token, at the end, and one BOS at most."""
    prompt_ids = encoder.prompt_ids(prompt)
    answer_ids = encoder.answer_ids(prompt, prompt_ids, assistant(answer))
    whole = rendered_to_stop(encoder, [*folded(encoder, prompt), assistant(answer)], stop)
    asked = encoder.tokenizer.apply_chat_template(
        folded(encoder, prompt), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids == asked
    assert decode(encoder, prompt_ids + answer_ids) == whole
    assert decode(encoder, answer_ids) == lead_of(encoder) + answer + stop
    assert [i for i in answer_ids if i in encoder.stop_ids] == answer_ids[-1:]
    bos = encoder.tokenizer.bos_token_id
    assert bos is None or (prompt_ids + answer_ids)[:2] != [bos, bos]


def runs(encoded: dict[str, list[int]]) -> list[list[int]]:
    """The stretches of ids that carry loss, in order."""
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    groups = groupby(pairs, key=lambda pair: pair[1] != -100)
    return [[label for _, label in group] for kept, group in groups if kept]


def check_dialogue(encoder: Encoder, turns: list[Message], stop: str) -> None:
    """Every assistant turn carries loss up to its stop token, and nothing else does."""
    encoded = tokens.dialogue(encoder, {"messages": turns}, 10**6)
    lead = lead_of(encoder)
    expected = [lead + turn["content"] + stop for turn in turns if turn["role"] == "assistant"]
    assert [decode(encoder, run) for run in runs(encoded)] == expected
    assert all(label in (-100, i) for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True))
    assert decode(encoder, encoded["input_ids"]) == rendered_to_stop(encoder, folded(encoder, turns), stop)


def length(pair: dict[str, list[int]]) -> int:
    """Tokens of the prompt and of the longer answer."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def reason(encoder: Encoder, prompt: list[Message], chosen: str, rejected: str, max_length: int = 1024) -> str:
    """Why the pair is dropped."""
    row = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    with pytest.raises(Dropped) as dropped:
        tokens.pair(encoder, row, max_length)
    assert str(dropped.value) == dropped.value.reason
    return dropped.value.reason


def test_every_built_in_template_is_tested() -> None:
    assert catalog.templates() == sorted(TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_of_a_conversation(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    assert encoder.render(TURNS, ask=False) == RENDERED[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_that_asks(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    assert encoder.render(TURNS[:3], ask=True) == ASKED[template]
    assert decode(encoder, encoder.prompt_ids(TURNS[:3])) == ASKED[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_that_asks_with_a_system_message(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    assert decode(encoder, encoder.prompt_ids([system("Be short."), user("Tea?")])) == ASKED_WITH_SYSTEM[template]


def test_a_template_for_a_bos_works_without_one(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("qwen2", "mistral-instruct")
    assert encoder.render(TURNS[:2], ask=False) == "[INST] Tea? [/INST] Leaves.<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_the_probe_finds(make_encoder: MakeEncoder, family: str, template: str) -> None:
    encoder = make_encoder(family, template)
    stops = [stop_text(template, family), EOS[family]]
    assert encoder.tokenizer.convert_ids_to_tokens(list(encoder.stop_ids)) == list(dict.fromkeys(stops))
    assert encoder.has_system == (template in ("alpaca", "chatml", "zephyr"))
    assert not encoder.adds_bos


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
    row = {"prompt": prompt, "chosen": [assistant("Beans.")], "rejected": [assistant("Stones.")]}
    encoded = tokens.pair(encoder, row, 1024)
    prompt_ids = encoder.prompt_ids(prompt)
    assert encoded == {
        "prompt_ids": prompt_ids,
        "chosen_ids": encoder.answer_ids(prompt, prompt_ids, assistant("Beans.")),
        "rejected_ids": encoder.answer_ids(prompt, prompt_ids, assistant("Stones.")),
    }
    lead = " " if template in ("instruct", "mistral-instruct") else ""
    stop = stop_text(template, "mistral")
    assert decode(encoder, encoded["chosen_ids"]) == f"{lead}Beans.{stop}"
    assert decode(encoder, encoded["rejected_ids"]) == f"{lead}Stones.{stop}"


def test_supervised_counts_the_tokens_with_loss() -> None:
    assert tokens.supervised({"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}) == 4
    assert tokens.supervised({"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}) == 2


# --- templates and tokenizers that do not go together ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", ["<|eot_id|>", "<end_of_turn>", "###"])
def test_a_turn_end_that_is_no_token_is_refused(make_tokenizer: MakeTokenizer, family: str, end: str) -> None:
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = catalog.template("chatml").replace("<|im_end|>", end)
    with pytest.raises(RecipeError) as error:
        tokens.encoder(tokenizer)
    assert error.value.exit_code == 2
    assert str(error.value).startswith(f"model.chat_template: ends a turn with {end!r}, which is no single token")


def test_chatml_needs_its_tokens(plain_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = catalog.template("chatml")
    with pytest.raises(RecipeError, match=r"ends a turn with '<\|im_end\|>'"):
        tokens.encoder(tokenizer)


@pytest.mark.parametrize("template", ["alpaca", "instruct", "mistral-instruct", "zephyr"])
def test_the_others_need_only_an_eos(plain_tokenizer: Callable[..., PreTrainedTokenizerBase], template: str) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = catalog.template(template)
    assert tokens.encoder(tokenizer).stop_ids == (tokenizer.eos_token_id,)


BAD_TEMPLATES = {
    "none": (None, "has no chat template of its own — name one: chatml, zephyr, mistral-instruct, instruct, alpaca, "),
    "broken": ("{% for m in messages %}", "cannot render a conversation: "),
    "raises": ("{{ raise_exception('not today') }}", "cannot render a conversation: not today"),
    "loses the answer": ("{{ messages[0]['content'] }}", "loses the assistant's text"),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES.keys())
def test_a_template_that_does_not_work(make_tokenizer: MakeTokenizer, template: str | None, message: str) -> None:
    tokenizer = make_tokenizer("mistral")
    tokenizer.chat_template = template
    with pytest.raises(RecipeError) as error:
        tokens.encoder(tokenizer)
    assert message in str(error.value)
    assert error.value.problems[0].where == "model.chat_template"


BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def test_nothing_that_ends_an_answer(plain_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = plain_tokenizer(eos=None)
    tokenizer.chat_template = BARE
    with pytest.raises(RecipeError, match="nothing ends an answer"):
        tokens.encoder(tokenizer)


def test_the_eos_is_added_where_the_template_ends_no_answer(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("mistral")
    tokenizer.chat_template = BARE
    encoder = tokens.encoder(tokenizer)
    ids = encoder.answer_ids([user("Tea?")], encoder.prompt_ids([user("Tea?")]), assistant("Leaves."))
    assert decode(encoder, ids) == "assistant: Leaves.\n</s>"


def test_a_stop_token_inside_where_the_template_ends_no_answer(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("mistral")
    tokenizer.chat_template = BARE
    encoder = tokens.encoder(tokenizer)
    assert reason(encoder, [user("Tea?")], "Leaves.</s>More.", "Stones.") == "stop token inside the answer"


def test_a_template_that_changes_the_prompt_afterwards(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("mistral")
    tokenizer.chat_template = "{{ messages | length }}" + catalog.template("zephyr")
    encoder = tokens.encoder(tokenizer)
    with pytest.raises(Dropped, match="template renders the prompt differently with an answer"):
        encoder.answer_ids([user("Tea?")], encoder.prompt_ids([user("Tea?")]), assistant("Leaves."))


# --- the BOS ---


@pytest.mark.parametrize("template", ["alpaca", "instruct", "mistral-instruct", "zephyr"])
def test_one_bos_where_the_tokenizer_adds_one(
    plain_tokenizer: Callable[..., PreTrainedTokenizerBase], template: str
) -> None:
    tokenizer = plain_tokenizer(adds_bos=True)
    tokenizer.chat_template = catalog.template(template)
    encoder = tokens.encoder(tokenizer)
    prompt = PROMPTS["three turns"]
    ids = encoder.prompt_ids(prompt)
    ids += encoder.answer_ids(prompt, ids, assistant("Leaves."))
    bos = tokenizer.bos_token_id
    assert encoder.adds_bos
    assert [i for i, token in enumerate(ids) if token == bos] == [0]
    expected = rendered_to_stop(encoder, [*prompt, assistant("Leaves.")], "</s>").removeprefix("<s>")
    assert decode(encoder, ids) == "<s>" + expected


@pytest.mark.parametrize("template", ["alpaca", "instruct", "zephyr"])
def test_no_bos_where_neither_adds_one(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    assert encoder.tokenizer.bos_token_id not in encoder.prompt_ids(PROMPTS["three turns"])


@pytest.mark.parametrize("family", ["phi-2", "mistral", "smollm"])
def test_the_bos_of_the_template_stands_first(make_encoder: MakeEncoder, family: str) -> None:
    encoder = make_encoder(family, "mistral-instruct")
    bos = encoder.tokenizer.bos_token_id
    assert [i for i, token in enumerate(encoder.prompt_ids(PROMPTS["single turn"])) if token == bos] == [0]


# --- roles ---


@pytest.mark.parametrize("template", ["instruct", "mistral-instruct"])
def test_a_system_message_goes_into_the_first_user_turn(make_encoder: MakeEncoder, template: str) -> None:
    turns = [system("Be short."), user("Tea?"), assistant("Leaves."), user("Coffee?")]
    expected = [user("Be short.\n\nTea?"), assistant("Leaves."), user("Coffee?")]
    assert make_encoder("mistral", template).alternating(turns) == expected


@pytest.mark.parametrize("template", ["alpaca", "chatml", "zephyr"])
def test_a_system_message_stays_where_it_is_known(make_encoder: MakeEncoder, template: str) -> None:
    turns = [system("Be short."), user("Tea?"), assistant("Leaves."), user("Coffee?")]
    assert make_encoder("mistral", template).alternating(turns) == turns


@pytest.mark.parametrize("template", ["instruct", "mistral-instruct"])
def test_an_empty_system_message_adds_nothing(make_encoder: MakeEncoder, template: str) -> None:
    assert make_encoder("mistral", template).alternating([system(""), user("Tea?")]) == [user("Tea?")]


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
        tokens.dialogue(encoder, {"messages": [*turns, assistant("Leaves.")]}, 1024)


def test_a_prompt_that_ends_with_an_answer_does_not_alternate(make_encoder: MakeEncoder) -> None:
    prompt = [user("Tea?"), assistant("Leaves.")]
    row = {"prompt": prompt, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
    with pytest.raises(Dropped, match=r"^roles do not alternate$"):
        tokens.pair(make_encoder("mistral", "zephyr"), row, 1024)


# --- answers ---


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ["", " ", "\n\t \n"])
def test_an_empty_answer(make_encoder: MakeEncoder, template: str, answer: str) -> None:
    encoder = make_encoder("mistral", template)
    assert reason(encoder, [user("Tea?")], answer, "Stones.") == "empty answer"
    assert reason(encoder, [user("Tea?")], "Leaves.", answer) == "empty answer"
    for turns in ([user("Tea?"), assistant(answer)], [user("a"), assistant(answer), user("b"), assistant("c")]):
        with pytest.raises(Dropped, match=r"^empty answer$"):
            tokens.dialogue(encoder, {"messages": turns}, 1024)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["Leaves.{}Stones.", "Leaves.{}", "Leaves.{} \n", "Leaves.{}{}Stones."])
def test_an_answer_with_the_stop_token(make_encoder: MakeEncoder, template: str, family: str, answer: str) -> None:
    encoder = make_encoder(family, template)
    for stop in {stop_text(template, family), EOS[family]}:
        content = answer.replace("{}", stop)
        assert reason(encoder, [user("Tea?")], content, "Stones.") == "stop token inside the answer"
        assert reason(encoder, [user("Tea?")], "Leaves.", content) == "stop token inside the answer"


def test_an_earlier_answer_with_the_stop_token(make_encoder: MakeEncoder) -> None:
    turns = [user("Tea?"), assistant("Leaves.</s>Stones."), user("Coffee?"), assistant("Beans.")]
    with pytest.raises(Dropped, match=r"^stop token inside the answer$"):
        tokens.dialogue(make_encoder("mistral", "zephyr"), {"messages": turns}, 1024)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_that_starts_with_the_stop_token(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    assert reason(encoder, [user("Tea?")], "</s>Leaves.", "Stones.") == "stop token inside the answer"


@pytest.mark.parametrize("rejected", ["Leaves.", " Leaves.\n"])
def test_chosen_equals_rejected(make_encoder: MakeEncoder, rejected: str) -> None:
    assert reason(make_encoder("mistral", "zephyr"), [user("Tea?")], "Leaves.", rejected) == "chosen equals rejected"


def test_pairs_that_differ_in_case_alone_are_kept(make_encoder: MakeEncoder) -> None:
    row = {"prompt": [user("Tea?")], "chosen": [assistant("Leaves.")], "rejected": [assistant("leaves.")]}
    encoded = tokens.pair(make_encoder("mistral", "zephyr"), row, 1024)
    assert encoded["chosen_ids"] != encoded["rejected_ids"]


@pytest.mark.parametrize(("chosen", "rejected"), [("Leaves " * 9, "No."), ("No.", "Leaves " * 9)])
def test_a_pair_is_as_long_as_its_longer_side(make_encoder: MakeEncoder, chosen: str, rejected: str) -> None:
    encoder = make_encoder("mistral", "zephyr")
    row = {"prompt": [user("Tea?")], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    encoded = tokens.pair(encoder, row, 1024)
    assert tokens.pair(encoder, row, length(encoded)) == encoded
    assert reason(encoder, row["prompt"], chosen, rejected, length(encoded) - 1) == "longer than max_length"


def test_a_dialogue_that_is_too_long(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("mistral", "zephyr")
    encoded = tokens.dialogue(encoder, {"messages": TURNS}, 1024)
    longest = len(encoded["input_ids"])
    assert tokens.dialogue(encoder, {"messages": TURNS}, longest) == encoded
    with pytest.raises(Dropped, match=r"^longer than max_length$"):
        tokens.dialogue(encoder, {"messages": TURNS}, longest - 1)


def test_a_dialogue_without_an_answer(make_encoder: MakeEncoder) -> None:
    with pytest.raises(Dropped, match=r"^no assistant turn$"):
        tokens.dialogue(make_encoder("mistral", "zephyr"), {"messages": [user("Tea?")]}, 1024)


def test_a_question_after_the_last_answer_is_left_out(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("mistral", "zephyr")
    more = [*TURNS, user("Milk?")]
    assert tokens.dialogue(encoder, {"messages": more}, 1024) == tokens.dialogue(encoder, {"messages": TURNS}, 1024)


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
        tokens.dialogue(merging, {"messages": turns}, 1024)


def test_an_earlier_turn_whose_tokens_do_not_merge_is_supervised(merging: Encoder) -> None:
    check_dialogue(merging, [user("Tea?"), assistant("\nLeaves."), user("Coffee?"), assistant("Beans.")], "</s>")


@pytest.mark.parametrize("template", ["alpaca", "instruct", "mistral-instruct", "zephyr"])
@pytest.mark.parametrize("answer", ["Leaves.", " Leaves.", "  \n Leaves."])
def test_no_space_slips_in_before_an_answer(template: str, answer: str) -> None:
    """Tokenizers in the manner of SentencePiece put a space before a text that they are given on its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [chr(i) for i in range(128)]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    core.train_from_iterator(["Leaves are tea"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = catalog.template(template)
    encoder = tokens.encoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Leaves")["input_ids"])[0].startswith("▁")
    ids = encoder.prompt_ids([user("Tea?")])
    ids += encoder.answer_ids([user("Tea?")], ids, assistant(answer))
    assert decode(encoder, ids) == rendered_to_stop(encoder, [user("Tea?"), assistant(answer)], "</s>")


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
@given(template=st.sampled_from(TEMPLATES), turns=conversations(), other=answers, max_length=st.integers(8, 120))
def test_any_pair_fits_or_is_dropped(
    make_encoder: MakeEncoder, template: str, turns: list[Message], other: str, max_length: int
) -> None:
    encoder = make_encoder("mistral", template)
    row: dict[str, Any] = {"prompt": turns[:-1], "chosen": [turns[-1]], "rejected": [assistant(other)]}
    try:
        encoded = tokens.pair(encoder, row, max_length)
    except Dropped as dropped:
        same = turns[-1]["content"].strip() == other.strip()
        assert dropped.reason == ("chosen equals rejected" if same else "longer than max_length")
        assert same or length(tokens.pair(encoder, row, 10**6)) > max_length
    else:
        assert length(encoded) <= max_length


@many
@given(template=st.sampled_from(TEMPLATES), turns=conversations())
def test_any_system_message_is_folded_once(make_encoder: MakeEncoder, template: str, turns: list[Message]) -> None:
    encoder = make_encoder("mistral", template)
    once = encoder.alternating(turns)
    assert encoder.alternating(once) == once
    assert [m["role"] for m in once if m["role"] != "system"] == ["user", "assistant"] * (len(once) // 2)
