"""Faults planted in clean rows: each is found with its rows, and clean rows are not accused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignctl.recipe import catalog
from alignctl.recipe.schema import Recipe
from alignctl.train import data, findings, tokens
from alignctl.train.findings import Finding
from alignctl.train.tokenizer import template_hash
from alignctl.train.tokens import Encoder

Row = dict[str, Any]
Findings = dict[str, Finding]
Diagnose = Callable[..., Findings]
MakeEncoder = Callable[[str, str], Encoder]
MakeTokenizer = Callable[..., PreTrainedTokenizerBase]
WriteRows = Callable[..., Path]

VOCABULARY = "amber bread cloud dust ember field grass heron inlet jetty kettle lemon meadow nettle oak pepper quartz"
WORDS = VOCABULARY.split()
ALWAYS = """rows.duplicate rows.near_duplicate text.control_tokens text.rendered scores.tie scores.reversed eval.size
    eval.seen answers.same_words answers.alike shortcut.length shortcut.words shortcut.first_token"""
RENDERED = ("[INST] {} [/INST]", "<|user|>\n{}", "<|eot_id|>{}", "{}<end_of_turn>", "### Instruction:\n{}", "USER: {}")
RENDERED += ("{}\n\nHuman: And then?", "{}\nASSISTANT: ")
PLANTED = (4, 9, 20, 31)
FIRST = ("rows.jsonl:5", "rows.jsonl:10", "rows.jsonl:21")


def phrase(chance: random.Random, fewest: int = 6, most: int = 12) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(fewest, most))) + "."


def clean(n: int, seed: int = 1, name: str = "Q") -> list[Row]:
    """Pairs whose sides come from one distribution, each with a prompt of its own."""
    chance = random.Random(seed)
    prompts = [f"{name}{i}: " for i in range(n)]
    return [{"prompt": p + phrase(chance), "chosen": phrase(chance), "rejected": phrase(chance)} for p in prompts]


def planted(**changes: Callable[[str], str]) -> list[Row]:
    """Sixty clean pairs, four of which have these columns changed."""
    rows = clean(60)
    for i in PLANTED:
        rows[i] |= {column: change(rows[i][column]) for column, change in changes.items()}
    return rows


def chats(rows: list[Row]) -> list[Row]:
    return [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]}
        for r in rows
    ]


def places(*lines: int) -> tuple[str, ...]:
    return tuple(f"rows.jsonl:{line}" for line in lines)


def with_column(column: str, values: dict[int, Any], otherwise: Any) -> list[Row]:
    return [row | {column: values.get(i, otherwise)} for i, row in enumerate(clean(60))]


@pytest.fixture
def diagnose(write_rows: WriteRows, data_recipe: Callable[..., Recipe], encoder: Encoder) -> Diagnose:
    """The findings about a set of rows, by name."""

    def run(rows: list[Row], method: str = "dpo", by: Encoder = encoder, **changes: Any) -> Findings:
        if "held_out" in changes:
            changes["eval"] = [{"path": str(write_rows(changes.pop("held_out"), "eval.jsonl"))}]
        adapter = {"adapter": changes.pop("adapter", None)}
        recipe = data_recipe(method, write_rows(rows), **changes)
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=adapter)})
        found = findings.examine(recipe, by, *data.read(recipe, by))
        names = [finding.name for finding in found]
        assert len(names) == len(set(names))
        json.dumps([vars(finding) for finding in found])
        return {finding.name: finding for finding in found}

    return run


def warned(found: Findings) -> set[str]:
    return {name for name, finding in found.items() if finding.warns}


def share(finding: Finding) -> float:
    """The share of pairs that a classifier gets right, in percent."""
    return float(finding.said.split("% (")[0])


def is_found(found: Findings, name: str, rows: int = len(PLANTED), first: tuple[str, ...] = FIRST) -> None:
    """`name` alone warns, beside the size of the held-out part, and says what, where, why and the way out."""
    finding = found[name]
    assert finding.warns and finding.rows == rows and finding.first == first
    assert warned(found) == {name, "eval.size"}
    assert finding.said.startswith(f"{rows} of ") and finding.meaning and finding.way_out


# --- clean rows ---


@pytest.mark.parametrize("template", ["chatml", "mistral-instruct"])
def test_nothing_is_said_against_clean_pairs(make_encoder: MakeEncoder, diagnose: Diagnose, template: str) -> None:
    encoder = make_encoder("mistral", template)
    scores = {"score_chosen": 2, "score_rejected": 1}
    rows = [row | scores for row in clean(400)]
    found = diagnose(rows, by=encoder, held_out=clean(120, seed=2, name="E"))
    assert warned(found) == set()
    assert found.keys() >= set(ALWAYS.split())
    assert ("template.system" in found) == (template == "mistral-instruct")
    assert "template.parent" not in found and "text.unknown" not in found
    for finding in found.values():
        assert finding.said and (finding.rows, finding.first, finding.meaning, finding.way_out) == (0, (), "", "")


def test_pairs_are_no_matter_of_sft(diagnose: Diagnose) -> None:
    found = diagnose(chats(clean(60)), "sft")
    assert warned(found) == {"eval.size"}
    assert not {"scores.tie", "answers.alike", "shortcut.length", "shortcut.words"} & found.keys()


def test_no_row_left_is_no_error(diagnose: Diagnose) -> None:
    assert warned(diagnose([row | {"rejected": row["chosen"]} for row in clean(3)])) == set()


def test_no_held_out_row_left_is_no_error(diagnose: Diagnose) -> None:
    lost = [row | {"rejected": row["chosen"]} for row in clean(3, name="E")]
    assert diagnose(clean(5), held_out=lost)["eval.size"].warns


# --- texts ---


@pytest.mark.parametrize(
    ("column", "add"), [("prompt", " </s> now"), ("prompt", "<|im_end|>"), ("rejected", " <s>"), ("chosen", "<s>")]
)
def test_control_tokens(make_encoder: MakeEncoder, diagnose: Diagnose, column: str, add: str) -> None:
    """Under zephyr `<|im_end|>` ends nothing, and is still a token."""
    found = diagnose(planted(**{column: lambda text: text.replace(" ", f" {add} ", 1)}))
    rendered = {"text.rendered"} if "im_end" in add else set()
    assert warned(found) == {"text.control_tokens", "eval.size"} | rendered
    assert (found["text.control_tokens"].rows, found["text.control_tokens"].first) == (4, FIRST)


def test_the_end_of_another_template_is_no_control_token(diagnose: Diagnose) -> None:
    found = diagnose(planted(prompt=lambda text: f"{text} <|endoftext|> <end>"))
    assert warned(found) == {"eval.size"}


@pytest.mark.parametrize("form", RENDERED)
@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_rendered_text(diagnose: Diagnose, form: str, column: str) -> None:
    is_found(diagnose(planted(**{column: form.format})), "text.rendered")


@pytest.mark.parametrize("form", ["{} [inst]", "### Instructions\n{}", "The Human: {}", "user|>{}", "\n{} Assistant:"])
def test_text_that_is_not_rendered(diagnose: Diagnose, form: str) -> None:
    assert not diagnose(planted(prompt=form.format))["text.rendered"].warns


def test_a_quoted_speaker_is_not_rendered(diagnose: Diagnose) -> None:
    assert not diagnose(planted(prompt=lambda text: f'{text} He said: "Human: no"'))["text.rendered"].warns


@pytest.fixture(scope="session")
def ascii_tokenizer() -> MakeTokenizer:
    """A tokenizer that knows ASCII and nothing else."""

    def build(**special: str) -> PreTrainedTokenizerBase:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        alphabet = [chr(i) for i in range(32, 127)] + ["▁", "\n"]
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet)
        core.train_from_iterator(WORDS, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)
        tokenizer.chat_template = catalog.template("instruct")
        return tokenizer

    return build


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_unknown_characters(diagnose: Diagnose, ascii_tokenizer: MakeTokenizer, column: str) -> None:
    by = tokens.encoder(ascii_tokenizer(eos_token="</s>"))
    is_found(diagnose(planted(**{column: lambda text: f"{text} 茶"}), by=by), "text.unknown")
    assert not diagnose(planted(), by=by)["text.unknown"].warns


def test_an_unknown_token_that_ends_answers_says_nothing(diagnose: Diagnose, ascii_tokenizer: MakeTokenizer) -> None:
    assert "text.unknown" not in diagnose(planted(), by=tokens.encoder(ascii_tokenizer(eos_token="<unk>")))


def test_places_hold_over_many_batches_and_mixed_sources(
    write_rows: WriteRows, ascii_tokenizer: MakeTokenizer, data_recipe: Callable[..., Recipe]
) -> None:
    """Rows of two sources are shuffled, and tables have batches of 256 rows."""
    by = tokens.encoder(ascii_tokenizer(eos_token="</s>"))
    rows = {name: clean(n, seed, name) for seed, (name, n) in enumerate((("A", 700), ("B", 300)))}
    places = {"A.jsonl:300": "茶 [INST]", "A.jsonl:699": "茶 [INST]", "B.jsonl:257": "茶 [INST]"}
    for place, fault in places.items():
        name, _, line = place.partition(".jsonl:")
        rows[name][int(line) - 1]["rejected"] += fault
    train = [{"path": str(write_rows(part, f"{name}.jsonl"))} for name, part in rows.items()]
    recipe = Recipe.model_validate(data_recipe("dpo", Path("x")).model_dump() | {"data": {"train": train}})
    found = {f.name: f for f in findings.examine(recipe, by, *data.read(recipe, by))}
    for name in ("text.unknown", "text.rendered"):
        assert found[name].rows == 3 and set(found[name].first) == set(places)


# --- the template ---


def test_system_messages(make_encoder: MakeEncoder, diagnose: Diagnose) -> None:
    rows = with_column("system", dict.fromkeys(PLANTED, "Be short."), None)
    rows[0]["prompt"] += ' {"role": "system", "content": "x"}'
    is_found(diagnose(rows, by=make_encoder("mistral", "mistral-instruct")), "template.system")
    assert "template.system" not in diagnose(rows)


@pytest.mark.parametrize("adapter", ["run", "run/model", "run/"])
@pytest.mark.parametrize("same", [True, False])
def test_the_parents_template(tmp_path: Path, encoder: Encoder, diagnose: Diagnose, adapter: str, same: bool) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    used = {"name": "chatml", "sha256": template_hash(encoder) if same else "0" * 64}
    (tmp_path / "run/run.json").write_text(json.dumps({"status": "finished", "template": used}))
    finding = diagnose(clean(9), adapter=f"{tmp_path}/{adapter}")["template.parent"]
    assert finding.warns == (not same)
    assert ("is the one" in finding.said) == same and bool(finding.way_out) == (not same)


def test_an_adapter_without_a_run(tmp_path: Path, diagnose: Diagnose) -> None:
    (tmp_path / "adapter").mkdir()
    for adapter in (f"{tmp_path}/adapter", f"{tmp_path}/nothing", "someone/adapter"):
        assert "template.parent" not in diagnose(clean(9), adapter=adapter)


def test_a_parent_whose_record_is_damaged(tmp_path: Path, diagnose: Diagnose) -> None:
    (tmp_path / "run.json").write_text('{"status": "run')
    assert "template.parent" not in diagnose(clean(9), adapter=str(tmp_path))


def test_a_template_that_changes_its_mind(make_tokenizer: MakeTokenizer, diagnose: Diagnose) -> None:
    """Rows that a template renders anew are dropped, and said even though none is left."""
    tokenizer = make_tokenizer("mistral")
    head = "{% if messages|length > 1 and 'Q' in messages[0]['content'] %}more{% endif %}"
    tokenizer.chat_template = head + catalog.template("chatml")
    rows = clean(6)
    for lost in (6, 5):
        finding = diagnose(rows, by=tokens.encoder(tokenizer))["template.prefix"]
        assert finding.warns and finding.rows == lost and finding.first == places(7 - lost, 8 - lost, 9 - lost)
        rows[0]["prompt"] = "Tea?"


@pytest.mark.parametrize("method", ["dpo", "orpo", "sft"])
def test_repeated_rows(diagnose: Diagnose, method: str) -> None:
    """A row that stands three times repeats an earlier one twice."""
    rows = clean(60)
    loud = {column: rows[7][column].upper().replace(" ", " - ") + "!" for column in rows[7]}
    shape = chats if method == "sft" else list
    is_found(diagnose(shape([*rows, rows[3], rows[3], rows[8]]), method), "rows.duplicate", 3, places(61, 62, 63))
    is_found(diagnose(shape([*rows, loud]), method), "rows.near_duplicate", 1, places(61))
    found = diagnose(shape([*rows, rows[3], loud, loud]), method)
    assert (found["rows.duplicate"].first, found["rows.near_duplicate"].first) == (places(61, 63), places(62))
    assert warned(diagnose(shape([*rows, rows[3] | {"chosen": "Other.", "prompt": "Q99"}]), method)) == {"eval.size"}


def test_words_that_differ_in_a_vowel_sign_are_not_alike(diagnose: Diagnose) -> None:
    rows = [{"prompt": prompt, "chosen": "हाँ", "rejected": "ना"} for prompt in ("दिन", "दीन", "दान")]
    assert not diagnose(rows)["rows.near_duplicate"].warns


def test_rows_that_are_cut(diagnose: Diagnose) -> None:
    """Long histories lose their oldest or last turns, long answers their end, and a last question is not answered."""
    turns = [{"role": role, "content": "Tea? " * 9} for role in ("user", "assistant")]
    rows: list[Row] = [{"messages": [{"role": "user", "content": f"{i}"}, turns[1]]} for i in range(6)]
    unanswered = [*rows[:2], {"messages": [*rows[2]["messages"], turns[0]]}, *rows[3:]]
    is_found(diagnose(unanswered, "sft"), "rows.unanswered", 1, places(3))
    rows[4] = {"messages": [turns[0], turns[1], {"role": "user", "content": "Why?"}, turns[1]]}
    for cut, overlong in (("prompt", "truncate_prompt"), ("turns", "truncate_completion")):
        is_found(diagnose(rows, "sft", max_length=100, overlong=overlong), f"rows.{cut}_cut", 1, places(5))
    assert warned(diagnose(rows, "sft")) == {"eval.size"}
    long = planted(chosen=lambda text: text * 40)
    is_found(diagnose(long, max_length=300, overlong="truncate_completion"), "rows.answer_cut")


def test_answers_that_are_alike_within_the_limit(diagnose: Diagnose) -> None:
    rows = planted(chosen=lambda text: "word " * 300 + text, rejected=lambda text: "word " * 300 + text)
    is_found(diagnose(rows, max_length=200, overlong="truncate_completion"), "answers.alike_within_limit")


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")]
)
@pytest.mark.parametrize(("values", "name"), [((7, 7.0), "scores.tie"), ((-2, -1.5), "scores.reversed")])
def test_scores(diagnose: Diagnose, chosen: str, rejected: str, values: tuple[float, float], name: str) -> None:
    rows = with_column(chosen, dict.fromkeys(PLANTED, values[0]), 9)
    for i, row in enumerate(rows):
        row[rejected] = values[1] if i in PLANTED else 3
    is_found(diagnose(rows), name)
    rows[50][chosen] = None
    is_found(diagnose(rows), name)
    for row in rows:
        del row[rejected]
    assert not {"scores.tie", "scores.reversed"} & diagnose(rows).keys()


def test_answers_that_are_alike(diagnose: Diagnose) -> None:
    chance = random.Random(3)
    long = [phrase(chance, 60, 60).split() for _ in PLANTED]
    rows = clean(60)
    for i, words in zip(PLANTED, long, strict=True):
        other = [*words[:30], "zinc", *words[31:]]
        rows[i] |= {"chosen": " ".join(words), "rejected": " ".join(other)}
    is_found(diagnose(rows), "answers.alike")
    assert not diagnose(rows)["answers.same_words"].warns
    for i, words in zip(PLANTED, long, strict=True):
        rows[i] |= {"rejected": " ".join([*words[:20], *VOCABULARY.upper().split()[:6], *words[26:]])}
    assert not diagnose(rows)["answers.alike"].warns
    assert not diagnose([row | {"chosen": "Yes.", "rejected": "No."} for row in clean(9)])["answers.alike"].warns


# --- shortcuts ---


@pytest.mark.parametrize(
    ("rejected", "same"),
    [
        ("yes  IT is", True),
        ("Yes; it\n- *is*!", True),
        ("“Yes, it is.”", True),
        ("Yes, it is not.", False),
        ("Yes it i s.", False),
        ("Yés, it is.", False),
    ],
)
def test_answers_of_the_same_words(diagnose: Diagnose, rejected: str, same: bool) -> None:
    rows = clean(60)
    for i in PLANTED:
        rows[i] |= {"chosen": "Yes, it is.", "rejected": rejected}
    if same:
        is_found(diagnose(rows), "answers.same_words")
    assert diagnose(rows)["answers.same_words"].warns == same


def shuffled(rows: list[Row], seed: int = 4) -> list[Row]:
    """`rows` whose sides are swapped by chance."""
    chance = random.Random(seed)
    swap = {"chosen": "rejected", "rejected": "chosen"}
    return [{swap.get(k, k): v for k, v in row.items()} if chance.random() < 0.5 else row for row in rows]


SHORTCUTS: dict[str, Callable[[Row], Row]] = {
    "shortcut.length": lambda row: {"chosen": row["chosen"] + " And so on and on." * 3},
    "shortcut.words": lambda row: {"rejected": row["rejected"].replace(" ", " honestly ", 1)},
    "shortcut.first_token": lambda row: {"rejected": "Sorry, " + row["rejected"], "chosen": "Well, " + row["chosen"]},
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_shortcuts(diagnose: Diagnose, name: str) -> None:
    rows = [row | SHORTCUTS[name](row) for row in clean(400)]
    found = diagnose(rows)
    finding = found[name]
    assert finding.warns and share(finding) > 95 and finding.rows > 50 and len(finding.first) == 3
    assert finding.meaning and finding.way_out
    assert "shortcut.first_token" not in warned(found) - {name}
    by_chance = diagnose(shuffled(rows))
    assert warned(by_chance) == {"eval.size"}
    for other in SHORTCUTS:
        assert 30 < share(by_chance[other]) < 66


def test_shorter_answers_are_a_shortcut_too(diagnose: Diagnose) -> None:
    rows = [row | {"rejected": row["rejected"] * 3} for row in clean(60)]
    finding = diagnose(rows)["shortcut.length"]
    assert finding.warns and share(finding) == 100 and "the shorter answer" in finding.said
    assert "not measured" in diagnose([clean(1)[0] | {"chosen": "Tea.", "rejected": "Pea."}])["shortcut.length"].said
    assert "not measured" in diagnose(rows)["shortcut.words"].said


def test_prompts_do_not_leak_into_the_pairs_held_out(diagnose: Diagnose) -> None:
    """Every pair of random letters stands ten times with its prompt: learned by heart, all would be right."""
    chance = random.Random(5)
    rows = [{k: "".join(chance.sample(ascii_letters, 25)) for k in ("prompt", "chosen", "rejected")} for _ in range(40)]
    found = diagnose([row for row in rows for _ in range(10)])
    assert {"shortcut.words", "shortcut.first_token"} & warned(found) == set()
    assert share(found["shortcut.words"]) < 75 and share(found["shortcut.first_token"]) < 75


def test_how_many_rows_are_held_out(diagnose: Diagnose) -> None:
    finding = diagnose(clean(9))["eval.size"]
    assert finding.warns and "no rows are held out" in finding.said and "eval_fraction" in finding.way_out
    finding = diagnose(clean(60), held_out=clean(99, name="E"))["eval.size"]
    assert finding.warns and "99 held-out rows" in finding.said and "±9.7%" in finding.said
    assert not diagnose(clean(400), eval_fraction=0.25)["eval.size"].warns


def test_questions_that_are_held_out_too(diagnose: Diagnose) -> None:
    rows = clean(60)
    held_out = clean(100, seed=2, name="E")
    held_out += [rows[i] | {"prompt": "  " + rows[i]["prompt"].upper()} for i in PLANTED]
    found = diagnose(rows, held_out=held_out)
    assert warned(found) == {"eval.seen"}
    assert (found["eval.seen"].rows, found["eval.seen"].first) == (4, FIRST)
    assert found["eval.seen"].said.startswith("4 of 60 rows")
