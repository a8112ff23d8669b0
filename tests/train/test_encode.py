"""What is found out about a tokenizer and a template, the text that they make; and what is said of a source's shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from alignctl.errors import DataError, RecipeError
from alignctl.formats import Dropped, Message
from alignctl.formats.rows import assistant, user
from alignctl.recipe import catalog
from alignctl.recipe.schema import Recipe
from alignctl.train import cache, data, tokens
from alignctl.train.data import Rows
from alignctl.train.tokens import Encoder, Ids, Limit

MakeTokenizer = Callable[[str], PreTrainedTokenizerBase]
MakeEncoder = Callable[[str, str], Encoder]
MakeRecipe = Callable[..., Recipe]
WriteRows = Callable[..., Path]
Row = dict[str, Any]

FAMILIES = ("phi-2", "mistral", "smollm", "qwen2")
TEMPLATES = ("alpaca", "chatml", "instruct", "mistral-instruct", "zephyr")
EOS = {"phi-2": "<|endoftext|>", "mistral": "</s>", "smollm": "<|im_end|>", "qwen2": "<|im_end|>"}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


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


def pair(encoder: Encoder, chosen: str) -> dict[str, Ids]:
    row = {"prompt": [user("Tea?")], "chosen": [assistant(chosen)], "rejected": [assistant("Stones.")]}
    return tokens.encode_one(encoder, tokens.pair(encoder, row, Limit(1024)))


def reason(encoder: Encoder, chosen: str) -> str:
    """Why the pair is dropped."""
    with pytest.raises(Dropped) as dropped:
        pair(encoder, chosen)
    return dropped.value.reason


def stop_text(template: str, family: str) -> str:
    """What ends an answer in `template` on the tokenizer of `family`."""
    return "<|im_end|>" if template == "chatml" else EOS[family]


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
    assert decode(encoder, pair(encoder, "Leaves.")["chosen_ids"]) == "assistant: Leaves.\n</s>"


def test_a_stop_token_inside_where_the_template_ends_no_answer(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("mistral")
    tokenizer.chat_template = BARE
    assert reason(tokens.encoder(tokenizer), "Leaves.</s>More.") == "stop token inside the answer"


def test_a_template_that_changes_the_prompt_afterwards(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("mistral")
    tokenizer.chat_template = "{{ messages | length }}" + catalog.template("zephyr")
    assert reason(tokens.encoder(tokenizer), "Leaves.") == "template renders the prompt differently with an answer"


# --- the BOS ---


@pytest.mark.parametrize("template", ["alpaca", "instruct", "zephyr"])
def test_no_bos_where_neither_adds_one(make_encoder: MakeEncoder, template: str) -> None:
    encoder = make_encoder("mistral", template)
    assert encoder.tokenizer.bos_token_id not in encoder.prompt_ids(TURNS[:3])


@pytest.mark.parametrize("family", ["phi-2", "mistral", "smollm"])
def test_the_bos_of_the_template_stands_first(make_encoder: MakeEncoder, family: str) -> None:
    encoder = make_encoder(family, "mistral-instruct")
    bos = encoder.tokenizer.bos_token_id
    assert [i for i, token in enumerate(encoder.prompt_ids(TURNS[:1])) if token == bos] == [0]


# --- where a system message goes ---


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


# --- special tokens in a text ---


def test_where_the_last_special_token_begins(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("mistral", "zephyr")
    assert encoder.last_special("no special token") == 0
    assert encoder.last_special("<s>a</s>b<s>c") == len("<s>a</s>b")
    assert encoder.last_special("a<s>b</s>") == len("a<s>b")


def test_special_tokens_are_found_in_text(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("mistral")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.add_tokens(["[mask]", "  "])
    tokenizer.chat_template = catalog.template("zephyr")
    found = tokens.encoder(tokenizer).special
    assert [bool(found.search(text)) for text in ("a<|tool|>", "a[mask]b", "<s>", "</s>")] == [True] * 4
    assert not any(found.search(text) for text in ("", "two  spaces", "<|tool", "mask", "<|user|>"))


# --- plain text ---


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("text", ["Leaves.", "<s>Leaves.", "Leaves.</s>", " \n🌿\n ", "a</s>b"])
def test_plain_text_is_trained_whole_and_ends(
    plain_tokenizer: Callable[..., PreTrainedTokenizerBase], adds_bos: bool, text: str
) -> None:
    tokenizer = plain_tokenizer(adds_bos=adds_bos)
    tokenizer.chat_template = catalog.template("zephyr")
    encoder = tokens.encoder(tokenizer)
    encoded = tokens.encode_one(encoder, tokens.dialogue(encoder, {"text": text}, Limit(1024)))
    bos = "<s>" if adds_bos or text.startswith("<s>") else ""
    expected = bos + text.removeprefix("<s>").removesuffix("</s>") + "</s>"
    assert decode(encoder, encoded["input_ids"]) == expected
    assert encoded["labels"] == encoded["input_ids"]


def test_plain_text_without_an_eos(plain_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = catalog.template("zephyr")
    encoder = tokens.encoder(tokenizer)
    tokenizer.eos_token = None
    encoded = tokens.encode_one(encoder, tokens.dialogue(encoder, {"text": "Tea."}, Limit(1024)))
    assert decode(encoder, encoded["input_ids"]) == "Tea."


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_plain_text(make_encoder: MakeEncoder, text: str) -> None:
    encoder = make_encoder("mistral", "zephyr")
    with pytest.raises(Dropped, match=r"^empty text$"):
        tokens.encode_one(encoder, tokens.dialogue(encoder, {"text": text}, Limit(1024)))


# --- the shape of a source ---

PAIR = {"prompt": "Tea?", "chosen": "Leaves.", "rejected": "Stones."}
CHAT = {"messages": [user("Tea?"), assistant("Leaves.")]}
TURNED = {side: [user("Tea?"), assistant(PAIR[side])] for side in ("chosen", "rejected")}


def prompts(rows: Rows) -> list[str]:
    """The last question of every row."""
    return [rows.canonical(i)["prompt"][-1]["content"] for i in range(len(rows))]


def refused(recipe: Recipe, encoder: Encoder) -> str:
    with pytest.raises(DataError) as error:
        data.prepare(recipe, encoder)
    return str(error.value)


def test_a_preference_file_for_sft_names_the_way_out(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    said = refused(data_recipe("sft", write_rows([PAIR])), encoder)
    assert said.startswith(
        "rows.jsonl:1: columns are `prompt` (a string), `chosen` (a string), `rejected` (a string), "
    )
    assert said.endswith("or the shape with `format:`; for a preference set, `answer: chosen`")
    assert refused(data_recipe("dpo", write_rows([{"tea": 1}])), encoder).endswith("or the shape with `format:`")


STRINGS, LISTS = "prompt, chosen and rejected as strings", "chosen and rejected as lists of messages"
SECOND_SHAPES: dict[str, tuple[str, list[Row], str, str]] = {
    "lists among strings": ("dpo", [PAIR, TURNED], STRINGS, LISTS),
    "strings among lists": ("orpo", [TURNED, PAIR], LISTS, STRINGS),
    "completion among messages": (
        "sft",
        [CHAT, {"prompt": "a", "completion": "b"}],
        "messages",
        "prompt and completion",
    ),
}


@pytest.mark.parametrize(("method", "rows", "first", "other"), SECOND_SHAPES.values(), ids=SECOND_SHAPES.keys())
def test_a_second_shape_in_a_file_names_its_row(
    encoder: Encoder,
    write_rows: WriteRows,
    data_recipe: MakeRecipe,
    method: str,
    rows: list[Row],
    first: str,
    other: str,
) -> None:
    said = refused(data_recipe(method, write_rows([rows[0], *rows])), encoder)
    assert said.startswith("rows.jsonl:3: ")
    found, _, way_out = said.partition(" — ")
    assert other in found
    assert first in way_out
    assert way_out.endswith("; mend or remove this one")


def test_text_that_is_no_unicode_names_its_row(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    """JSON can hold half an emoji, where somebody cut a text by its UTF-16 units."""
    recipe = data_recipe("dpo", write_rows([PAIR, {**PAIR, "chosen": "Cows \ud83d"}]), max_dropped=0.5)
    said = refused(recipe, encoder)
    assert said.startswith("rows.jsonl:2: `chosen` is no text: character 6 is half of a surrogate pair — ")


def test_up_to_three_rows_that_cannot_be_read_are_named(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    rows = [PAIR, {**PAIR, "chosen": ""}, *({**PAIR, "chosen": i} for i in range(5))]
    recipe = data_recipe("dpo", write_rows(rows), max_dropped=1.0)
    with pytest.raises(DataError) as error:
        data.read(recipe, encoder)
    assert [problem.where for problem in error.value.problems] == [f"rows.jsonl:{i}" for i in (3, 4, 5)]
    assert {problem.what for problem in error.value.problems} == {"`chosen` is a number, expected a string"}
    assert not list(cache.folder().iterdir())


def test_a_shape_that_is_named(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    path = write_rows([{**PAIR, "question": "Milk?"}])
    assert "the columns fit `format: prompt-chosen-rejected` (" in refused(data_recipe("dpo", path), encoder)
    for shape, prompt in (("orca", "Milk?"), ("prompt-chosen-rejected", "Tea?")):
        assert prompts(data.prepare(data_recipe("dpo", path, {"format": shape}), encoder)[0]) == [prompt]


def test_a_shape_of_the_other_method(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    path = write_rows([PAIR])
    said = refused(data_recipe("dpo", path, {"format": "messages"}), encoder)
    assert said == f"{path}: `format: messages` is not for dpo — see docs/data.md"
    recipe = data_recipe("sft", path, {"format": "prompt-chosen-rejected", "answer": "chosen"})
    assert len(data.prepare(recipe, encoder)[0]) == 1


def test_columns_under_other_names(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    rows = [{"q": f"Tea {i}?", "good": "Leaves.", "rejected": "Stones.", "prompt": "no"} for i in range(120)]
    source = {"columns": {"prompt": "q", "chosen": "good"}}
    train, _ = data.prepare(data_recipe("dpo", write_rows(rows), source), encoder)
    assert prompts(train) == [f"Tea {i}?" for i in range(120)]
    del rows[110]["good"]
    said = refused(data_recipe("dpo", write_rows(rows), source), encoder)
    assert said.startswith("rows.jsonl:111: `columns` names `good`, but the columns are q, rejected, prompt — ")


def test_a_missing_column_names_its_row(encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe) -> None:
    rows = [{"q": "Tea?", "chosen": "Leaves.", "rejected": "Stones."}, PAIR]
    said = refused(data_recipe("dpo", write_rows(rows), {"columns": {"prompt": "q"}}), encoder)
    assert said.startswith("rows.jsonl:2: `columns` names `q`, but the columns are prompt, chosen, rejected — ")


def test_the_chosen_answers_become_rows_for_sft(
    encoder: Encoder, write_rows: WriteRows, data_recipe: MakeRecipe
) -> None:
    path = write_rows([PAIR, {**PAIR, "system": "Be short."}])
    train, _ = data.prepare(data_recipe("sft", path, {"answer": "chosen"}), encoder)
    expected = [CHAT, {"messages": [system("Be short."), *CHAT["messages"]]}]
    assert [train.canonical(i) for i in range(2)] == expected
    assert train.ledger.formats == {"prompt, chosen and rejected as strings": 2}
    same, _ = data.prepare(data_recipe("sft", write_rows(expected, "messages.jsonl")), encoder)
    assert train.dataset().to_list() == same.dataset().to_list()
