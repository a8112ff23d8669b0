"""Which shape a set has: found from its first rows, or refused with what was found and what is known."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from alignctl import formats
from alignctl.formats import RowError
from alignctl.recipe.schema import FormatName

ask, good, bad = ({"role": role, "content": "a"} for role in ("user", "assistant", "assistant"))
answers = {"chosen": "b", "rejected": "c"}
lists = {"chosen": [ask, good], "rejected": [ask, bad]}
transcripts = {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}

PREFERENCE: dict[str, dict[str, Any]] = {
    "prompt-chosen-rejected": {"prompt": "a", **answers},
    "conversational": lists,
    "hh": transcripts,
    "orca": {"question": "a", **answers},
    "sharegpt-ranking": {"conversations": [ask], "chosen": good, "rejected": bad},
    "alpaca-ranking": {"instruction": "a", "input": "", **answers},
    "argilla": {"instruction": "a", "chosen_response": "b", "rejected_response": "c"},
    "stackexchange": {"question": "a", "response_j": "b", "response_k": "c"},
    "pku-saferlhf": {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0},
    "completions": {"instruction": "a", "completions": [{"response": "b", "score": 1}]},
    "scored": {"prompt": "a", "response": "b", "helpfulness": 3},
}
SFT: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ask, good]},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "text": {"text": "a"},
}


@pytest.mark.parametrize(("name", "row"), PREFERENCE.items(), ids=PREFERENCE.keys())
def test_each_preference_shape_is_detected_as_itself(name: str, row: dict[str, Any]) -> None:
    assert formats.detect([row], preference=True) is formats.named(name)


@pytest.mark.parametrize(("name", "row"), SFT.items(), ids=SFT.keys())
def test_each_shape_for_sft_is_detected_as_itself(name: str, row: dict[str, Any]) -> None:
    assert formats.detect([row], preference=False) is formats.named(name)


def test_the_schema_names_the_formats_that_there_are() -> None:
    names = get_args(FormatName)
    assert [formats.named(name).name for name in names] == list(names)
    assert [shape.name for shape in (*formats.PREFERENCE, *formats.SUPERVISED)] == list(names)
    assert [shape.name for shape in formats.PREFERENCE] == list(PREFERENCE)
    assert [shape.name for shape in formats.SUPERVISED] == list(SFT)


def test_shapes_say_what_they_are_in_different_words() -> None:
    said = [shape.what for shape in formats.PREFERENCE]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("row", [*PREFERENCE.values(), *SFT.values()], ids=[*PREFERENCE, *SFT])
@pytest.mark.parametrize("column", ["id", "model", "source", "metadata", "prompt_id", "lang", "score_chosen"])
def test_columns_that_nobody_reads_change_nothing(row: dict[str, Any], column: str) -> None:
    preference = row in PREFERENCE.values()
    plain = formats.detect([row], preference=preference)
    assert formats.detect([{column: "x", **row}], preference=preference) is plain


AMBIGUOUS: dict[str, tuple[dict[str, Any], bool, str]] = {
    "prompt and question": (
        {"prompt": "a", "question": "d", **answers},
        True,
        "the columns fit `format: prompt-chosen-rejected` (prompt, chosen and rejected as strings) and "
        "`format: orca` (question (or input), chosen and rejected); say which in the recipe",
    ),
    "prompt and instruction": (
        {"prompt": "a", "instruction": "d", **answers},
        True,
        "the columns fit `format: prompt-chosen-rejected` (prompt, chosen and rejected as strings) and "
        "`format: alpaca-ranking` (instruction, chosen and rejected); say which in the recipe",
    ),
    "transcripts and a question": (
        {"question": "a", **transcripts},
        True,
        "the columns fit `format: hh` (“Human: … Assistant: …” transcripts) and "
        "`format: orca` (question (or input), chosen and rejected); say which in the recipe",
    ),
    "a scored pair": (
        {"prompt": "a", **answers, "response": "d", "score": 3},
        True,
        "the columns fit `format: prompt-chosen-rejected` (prompt, chosen and rejected as strings) and "
        "`format: scored` (prompt, response and its score, a row an answer); say which in the recipe",
    ),
    "messages and text": (
        {"messages": [ask, good], "text": "a"},
        False,
        "the columns fit `format: messages` (messages) and `format: text` (plain text); say which in the recipe",
    ),
    "messages, prompt and completion": (
        {"messages": [ask, good], "prompt": "a", "completion": "b"},
        False,
        "the columns fit `format: messages` (messages) and `format: prompt-completion` (prompt and completion); "
        "say which in the recipe",
    ),
    "three of them": (
        {"messages": [ask, good], "conversations": [ask, good], "text": "a"},
        False,
        "the columns fit `format: messages` (messages) and `format: sharegpt` (conversations) and "
        "`format: text` (plain text); say which in the recipe",
    ),
}


@pytest.mark.parametrize(("row", "preference", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_columns_that_fit_two_shapes_are_refused(row: dict[str, Any], preference: bool, message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.detect([row], preference=preference)
    assert str(error.value) == message


@pytest.mark.parametrize(("row", "preference", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_the_recipe_may_name_any_of_them(row: dict[str, Any], preference: bool, message: str) -> None:
    known = formats.PREFERENCE if preference else formats.SUPERVISED
    named = [shape for shape in known if f"`format: {shape.name}`" in message and not shape.per_answer]
    assert all(formats.read(shape, row) for shape in named)


UNKNOWN: dict[str, tuple[dict[str, Any], bool, str]] = {
    "other columns": ({"query": "a", "stars": 3}, True, "`query` (a string), `stars` (a number)"),
    "one side": ({"prompt": "a", "chosen": "b"}, True, "`prompt` (a string), `chosen` (a string)"),
    "one side as a list": ({"chosen": [ask, good]}, True, "`chosen` (a list of an object)"),
    "rows for sft": ({"messages": [ask, good]}, True, "`messages` (a list of an object)"),
    "mixed kinds": (
        {"chosen": [ask, good], "rejected": "c"},
        True,
        "`chosen` (a list of an object), `rejected` (a string)",
    ),
    "scores without answers": ({"prompt": "a", "score": True}, True, "`prompt` (a string), `score` (true/false)"),
    "answers without scores": (
        {"prompt": "a", "response": "b", "score": None},
        True,
        "`prompt` (a string), `response` (a string), `score` (null)",
    ),
    "completions without a question": ({"completions": []}, True, "`completions` (an empty list)"),
    "no columns": ({}, True, "none"),
    "half a preference row": ({"prompt": "a", "chosen": "b"}, False, "`prompt` (a string), `chosen` (a string)"),
    "a column in a nest": ({"data": {"text": "a"}}, False, "`data` (an object)"),
    "no columns for sft": ({}, False, "none"),
}


@pytest.mark.parametrize(("row", "preference", "columns"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_columns_that_no_shape_has(row: dict[str, Any], preference: bool, columns: str) -> None:
    with pytest.raises(RowError) as error:
        formats.detect([row], preference=preference)
    said = str(error.value)
    assert said.startswith(f"columns are {columns}, ")
    known = formats.PREFERENCE if preference else formats.SUPERVISED
    assert all(shape.name in said or shape.what in said for shape in known)


@pytest.mark.parametrize("more", [{}, {"query": "a"}, {"conversations": [ask]}], ids=str)
def test_two_strings_without_a_prompt_get_a_hint(more: dict[str, Any]) -> None:
    with pytest.raises(RowError) as error:
        formats.detect([{**more, **answers}], preference=True)
    assert str(error.value).endswith(" (the column with the question is named by `columns: {prompt: …}`)")


BROKEN: dict[str, tuple[dict[str, Any], bool, str]] = {
    "null answer": ({"prompt": "a", **answers, "rejected": None}, True, "`rejected` is null, expected a value"),
    "null prompt": ({"prompt": None, **answers}, True, "`prompt` is null, expected a value"),
    "null side": ({**lists, "rejected": None}, True, "`rejected` is null, expected a value"),
    "number": ({"prompt": "a", "chosen": 3, "rejected": "c"}, True, "`chosen` is a number, expected a string"),
    "true": ({"prompt": "a", "chosen": True, "rejected": "c"}, True, "`chosen` is true/false, expected a string"),
    "null response": (
        {"instruction": "a", "chosen_response": "b", "rejected_response": None},
        True,
        "`rejected_response` is null, expected a value",
    ),
    "null messages": ({"messages": None}, False, "`messages` is null, expected a value"),
    "null completion": ({"prompt": "a", "completion": None}, False, "`completion` is null, expected a value"),
}


@pytest.mark.parametrize(("row", "preference", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_right_columns_with_a_broken_value_name_it(row: dict[str, Any], preference: bool, message: str) -> None:
    with pytest.raises(RowError) as error:
        formats.detect([row], preference=preference)
    assert str(error.value) == message


def test_a_preference_row_for_sft_gets_no_hint_about_its_prompt() -> None:
    with pytest.raises(RowError) as error:
        formats.detect([{"prompt": "a", **answers}], preference=False)
    assert "{prompt: …}" not in str(error.value)


def test_completions_that_are_no_list() -> None:
    with pytest.raises(RowError, match="`completions` is a number"):
        formats.detect([{"prompt": "a", "completions": 4}], preference=True)


def test_first_rows_with_nulls_do_not_fool_it() -> None:
    nulls = {"prompt": None, "chosen": None, "rejected": None}
    later = {"prompt": "a", **answers}
    assert formats.detect([nulls, {**later, "chosen": None}, later], preference=True).name == "prompt-chosen-rejected"
    assert formats.detect([nulls, {}, {"prompt": None, **lists}], preference=True).name == "conversational"
    assert formats.detect([{"messages": None, "text": "a"}], preference=False).name == "text"
    assert (
        formats.detect([{"question": None, "input": None, "instruction": "a", **answers}], preference=True).name
        == "alpaca-ranking"
    )


def test_the_first_row_with_a_shape_decides() -> None:
    assert formats.detect([{"id": 1}, lists, {"prompt": "a", **answers}], preference=True).name == "conversational"


@pytest.mark.parametrize(
    ("shape", "row", "other"),
    [
        ("prompt-chosen-rejected", lists, "conversational"),
        ("conversational", transcripts, "hh"),
        ("hh", {"prompt": "a", **answers}, "prompt-chosen-rejected"),
        ("scored", {"question": "a", **answers}, "orca"),
        ("messages", {"text": "a"}, "text"),
        ("alpaca", {"prompt": "a", "completion": "b"}, "prompt-completion"),
    ],
)
def test_a_second_shape_later_is_refused_by_its_name(shape: str, row: dict[str, Any], other: str) -> None:
    with pytest.raises(RowError, match="shape") as error:
        formats.read(formats.named(shape), row)
    assert f"{other} (" in str(error.value)
    assert formats.named(other).what in str(error.value)


def test_a_shape_for_sft_is_no_second_shape_of_a_preference_set() -> None:
    with pytest.raises(RowError) as error:
        formats.read(formats.named("prompt-chosen-rejected"), {"text": "a"})
    assert str(error.value) == "`prompt` is missing; columns are `text` (a string)"
