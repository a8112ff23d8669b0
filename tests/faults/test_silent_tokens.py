"""Silent faults of tokens (11 to 15, 17, 19): what others train on in silence is refused here, or cannot come about."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from alignctl.formats.rows import assistant, user
from alignctl.recipe import catalog
from alignctl.train import fit, standin
from alignctl.train import model as models

Train = Callable[..., Any]
Row = dict[str, Any]
# The ids of one sequence without padding, and its labels: -100 where nothing is trained.
Sequence = tuple[list[int], list[int]]

STOP = "<|im_end|>"
MESSAGES: dict[str, Any] = {"data": {"train": [{"path": "rows.jsonl"}]}}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Sequence]:
    """Every sequence that is trained on, as a trainer's own collator hands it to the model."""
    found: list[Sequence] = []

    def built(build: Callable[..., Trainer], *given: Any) -> Trainer:
        trainer = build(*given)
        found.extend(sequences(trainer))
        return trainer

    for method, build in list(fit.BUILD.items()):
        monkeypatch.setitem(fit.BUILD, method, partial(built, build))
    return found


def sequences(trainer: Trainer) -> list[Sequence]:
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    labels = batch["labels"] if "labels" in batch else ids.masked_fill(~batch["completion_mask"].bool(), -100)
    assert (labels[~real] == -100).all()
    return [(a[keep].tolist(), b[keep].tolist()) for a, b, keep in zip(ids, labels, real, strict=True)]


def answers(sequence: Sequence) -> list[list[int]]:
    """The stretches of a sequence that are trained."""
    groups = groupby(zip(*sequence, strict=True), key=lambda pair: pair[1] != -100)
    return [[label for _, label in group] for kept, group in groups if kept]


def asked(sequence: Sequence) -> list[int]:
    """The ids before the first that is trained."""
    ids, labels = sequence
    return ids[: next(i for i, label in enumerate(labels) if label != -100)]


def rows(count: int = 16) -> list[Row]:
    return [
        {"prompt": f"Say {i} and tea.", "chosen": f"tea {i} rain", "rejected": f"rain {i} tea"} for i in range(count)
    ]


def ledger(ran: Any) -> Row:
    return dict(json.loads((ran.folder / "ledger.json").read_text(encoding="utf-8")))


def stand_in(name: str, folder: Path, change: Callable[[PreTrainedTokenizerBase], None] | None = None) -> Path:
    """A tiny model of the family that `name` belongs to, whose tokenizer may be changed."""
    found = standin.family(name)[0]
    corpus = folder / "corpus.txt"
    corpus.write_text("Say tea and rain, bread and stone, river and lamp, cloud and wheel.\n", encoding="utf-8")
    standin._tokenizer(found, corpus, folder / name)
    standin._model(found, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    if change is not None:
        change(tokenizer)
        tokenizer.save_pretrained(folder / name)
    return folder / name


def token(folder: Path, text: str) -> int:
    return int(AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(text))


# 11: EOS is not trained because it pads.


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_eos_that_pads_is_trained(train: Train, seen: list[Sequence], tiny: Path, method: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == token(tiny, STOP)
    given = [row | {"chosen": row["chosen"] + " and rain" * i} for i, row in enumerate(rows())]
    assert train(method, given).code == 0
    assert len(seen) == (16 if method == "sft" else 32) and len({len(ids) for ids, _ in seen}) > 8
    for each in seen:
        (answer,) = answers(each)
        assert answer[-1] == tokenizer.eos_token_id and answer.count(tokenizer.eos_token_id) == 1


# 12: EOS twice, or something behind it.


def test_nothing_follows_the_end(train: Train, seen: list[Sequence], tiny: Path) -> None:
    """ChatML writes a line break behind an answer's end, and TRL's ORPO an EOS behind that."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.apply_chat_template([user("a"), assistant("b")], tokenize=False).endswith(f"b{STOP}\n")
    assert train("orpo", rows()).code == 0 and len(seen) == 32
    chosen, rejected = seen[:16], seen[16:]
    for i, sides in enumerate(zip(chosen, rejected, strict=True)):
        texts = [tokenizer.decode(answers(side)[0]) for side in sides]
        assert texts == [f"tea {i} rain{STOP}", f"rain {i} tea{STOP}"]
        assert all(side[0][len(asked(side)) :] == answers(side)[0] for side in sides)


@pytest.mark.parametrize("answer", [f"tea{STOP} and more", f"tea{STOP}", f"tea{STOP}\n"])
def test_an_end_within_an_answer(train: Train, answer: str) -> None:
    ran = train("orpo", [row | {"chosen": answer} for row in rows()])
    assert ran.code == 3 and "stop token inside the answer: 16 (first: rows.jsonl:1" in ran.err


def test_nothing_follows_the_end_of_a_rendered_text(train: Train, seen: list[Sequence], tiny: Path) -> None:
    stop = token(tiny, STOP)
    given = [{"text": f"<|im_start|>user\nSay {i}.{STOP}\n<|im_start|>assistant\ntea{STOP}\n"} for i in range(16)]
    assert train("sft", given, **MESSAGES).code == 0 and len(seen) == 16
    assert {labels.count(stop) for _, labels in seen} == {2}


def test_plain_text_gets_no_template(train: Train, seen: list[Sequence], tiny: Path) -> None:
    """Text that is rendered already is what the shape `text` is for."""
    text = f"<|im_start|>user\nSay tea.{STOP}\n<|im_start|>assistant\ntea{STOP}"
    ran = train("sft", [{"text": text}] * 16, **MESSAGES)
    assert ran.code == 0 and AutoTokenizer.from_pretrained(tiny).decode(seen[0][0]) == text
    assert not any("a second time" in finding["meaning"] for finding in ledger(ran)["findings"])


# 13: generation does not stop at the token that ends a turn.


def test_generation_stops_where_turns_end(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-2's only special token is its EOS, and no part of ChatML."""
    phi = stand_in("phi-2", tmp_path)
    ends = [token(phi, STOP), token(phi, "<|endoftext|>")]
    model = {"name_or_path": "./phi-2"}
    ran = train(rows=rows(), model=model, folder="sound")
    generation = json.loads((ran.folder / "model" / "generation_config.json").read_text(encoding="utf-8"))
    assert ran.code == 0 and ran.verdict("saved") == "passed" and sorted(generation["eos_token_id"]) == sorted(ends)
    monkeypatch.setattr(models, "align_generation", lambda *given: None)
    ran = train(rows=rows(), model=model)
    assert ran.code == 6 and ran.verdict("saved") == "stopped" and ran.record["status"] == "failed"
    assert f"gate.saved: generation_config.json lacks the stop tokens [{ends[0]}]: answers would not end" in ran.err
    assert train(rows=rows(), model=model, gates={"saved": False}, folder="off").code == 0


def test_a_turn_that_no_token_ends(train: Train, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</turn>{% endfor %}"
    (tmp_path / "turns.jinja").write_text(template, encoding="utf-8")
    ran = train(model={"chat_template": "turns.jinja"})
    assert ran.code == 2 and "model.chat_template: ends a turn with '</turn>', which is no single token" in ran.err


# 14: BOS twice, or in training only.


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """As Llama's and Mistral's."""
    before = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    adding = processors.TemplateProcessing(single=f"{tokenizer.bos_token} $A", special_tokens=before)
    tokenizer.backend_tokenizer.post_processor = adding


@pytest.mark.parametrize("template", ["mistral-instruct", "zephyr"])
def test_one_bos_in_training_and_when_asked(
    train: Train, seen: list[Sequence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """One template writes a BOS itself, the other does not; the tokenizer puts one before whatever it gets."""
    folder = stand_in("mistral", tmp_path, adds_bos)
    bos = token(folder, "<s>")
    assert ("bos_token" in catalog.template(template)) == (template == "mistral-instruct")
    assert AutoTokenizer.from_pretrained(folder)("<s>a").input_ids[:2] == [bos, bos]
    generated: set[tuple[int, ...]] = set()

    def generate(model: PreTrainedModel, **given: Any) -> Any:
        asked_with = zip(given["input_ids"], given["attention_mask"].bool(), strict=True)
        generated.update(tuple(ids[keep].tolist()) for ids, keep in asked_with)
        return generates(model, **given)

    generates = MistralForCausalLM.generate
    monkeypatch.setattr(MistralForCausalLM, "generate", generate)
    held_out = rows(20)[16:]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    model = {"name_or_path": "./mistral", "chat_template": template}
    short = {"samples": 4, "max_new_tokens": 4}
    ran = train(rows=rows(), model=model, data={"eval": [{"path": "held.jsonl"}]}, evaluation=short, folder="asks")
    assert ran.code == 0 and len(seen) == 32
    assert all(ids[:1] == [bos] and ids.count(bos) == 1 for ids, _ in seen)
    assert len(generated) == 4 and all(ids.count(bos) == 1 for ids in generated)
    seen.clear()
    assert train(rows=held_out, model=model).code == 0
    assert {tuple(asked(each)) for each in seen} == generated


def test_a_text_that_begins_with_bos(train: Train, seen: list[Sequence], tmp_path: Path) -> None:
    folder = stand_in("mistral", tmp_path, adds_bos)
    given = [{"text": f"{'<s>' if i % 2 else ''}Say {i // 2} and tea."} for i in range(16)]
    ran = train("sft", given, model={"name_or_path": "./mistral"}, **MESSAGES)
    assert ran.code == 0 and len(seen) == 16
    assert all(seen[i] == seen[i + 1] for i in range(0, 16, 2))
    assert seen[0][0][:1] == [token(folder, "<s>")] and seen[0][0].count(token(folder, "<s>")) == 1
    found = [each["rows"] for each in ledger(ran)["findings"] if each["name"] == "text.control_tokens"]
    assert found == [8]


def test_a_template_that_writes_a_blank_before_its_bos(train: Train, seen: list[Sequence], tmp_path: Path) -> None:
    folder = stand_in("mistral", tmp_path, adds_bos)
    template = "\n" + catalog.template("mistral-instruct")
    (tmp_path / "blank.jinja").write_text(template.replace("{{- bos_token -}}", "{{ bos_token -}}"), encoding="utf-8")
    train(rows=rows(), model={"name_or_path": "./mistral", "chat_template": "blank.jinja"})
    assert all(ids.count(token(folder, "<s>")) == 1 for ids, _ in seen)


# 15: BOS that is EOS is put before the prompt.


def test_no_end_before_the_beginning(train: Train, seen: list[Sequence], tmp_path: Path) -> None:
    """TRL's ORPO puts the BOS before every prompt; Phi-2's is its EOS."""
    tokenizer = AutoTokenizer.from_pretrained(stand_in("phi-2", tmp_path))
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    ran = train("orpo", rows(), model={"name_or_path": "./phi-2", "chat_template": "instruct"})
    assert ran.code == 0 and len(seen) == 32
    for each in seen:
        assert tokenizer.decode(each[0][:1]) == "I" and asked(each).count(tokenizer.eos_token_id) == 0
        assert answers(each)[0].count(tokenizer.eos_token_id) == 1


# 17: nothing is trained of a row, or all of it.


def test_every_answer_is_trained_and_no_question(train: Train, seen: list[Sequence], tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = [[user("Say 0."), assistant(f"tea {i} 0"), user("Say 1."), assistant(f"tea {i} 1")] for i in range(16)]
    given = [{"messages": messages} for messages in turns]
    assert "{% generation" not in str(tokenizer.chat_template)
    ran = train("sft", given, **MESSAGES)
    assert ran.code == 0
    texts = [[tokenizer.decode(answer) for answer in answers(each)] for each in seen]
    assert texts == [[f"tea {i} {t}{STOP}" for t in range(2)] for i in range(16)]
    share = sum(label != -100 for _, labels in seen for label in labels) / sum(len(ids) for ids, _ in seen)
    assert ledger(ran)["train"]["supervised_share"] == pytest.approx(share, abs=1e-4)


def test_conversations_without_an_answer(train: Train) -> None:
    turns = [[user(f"Say {i}."), assistant("tea")][: 1 if i % 4 == 0 else 2] for i in range(16)]
    ran = train("sft", [{"messages": messages} for messages in turns], **MESSAGES)
    assert ran.code == 3 and "no assistant turn: 4 (first: rows.jsonl:1" in ran.err


# 19: the first letters of an answer are merged into the prompt.


def test_an_answer_that_merges_with_its_prompt(train: Train, seen: list[Sequence], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompt, answer = "Say 1 and whe", "el 1 tea"
    alone, joint = (tokenizer(text).input_ids for text in (prompt, prompt + answer))
    assert joint[: len(alone)] != alone and tokenizer("whe").input_ids + tokenizer("el").input_ids != joint
    given = [{"prompt": f"Say {i} and whe", "chosen": f"el {i} tea", "rejected": f"el {i} rain"} for i in range(16)]
    assert train(rows=given, model={"chat_template": "plain.jinja"}).code == 0 and len(seen) == 32
    for i, each in enumerate(seen):
        assert asked(each) == tokenizer(f"Say {i % 16} and whe").input_ids
        assert tokenizer.decode(answers(each)[0]) == f"el {i % 16} {'tea' if i < 16 else 'rain'}{STOP}"
