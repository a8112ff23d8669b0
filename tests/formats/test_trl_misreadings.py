"""Rows that the pinned TRL misreads without a word, or ends on in a traceback, and what alignctl makes of them.

Every test runs TRL's own preparation of a preference set first, so that it says when TRL has mended its side.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from alignctl import formats
from alignctl.formats import RowError
from alignctl.recipe.schema import Source
from alignctl.train import tokens
from alignctl.train.encode import Done, Job
from alignctl.train.files import RawRow
from alignctl.train.tokens import Limit

Read = Callable[..., list[tuple[str, str, str]]]
ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@pytest.fixture
def trl_reads(tokenizer: PreTrainedTokenizerBase) -> Read:
    """What TRL trains on: the prompt and both answers of each row, as text."""
    disable_progress_bar()
    args = types.SimpleNamespace(dataset_num_proc=None, max_length=1024, truncation_mode="keep_start")
    trainer = types.SimpleNamespace(_tokenizer=tokenizer)

    def read(*rows: dict[str, Any]) -> list[tuple[str, str, str]]:
        out = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(list(rows)), tokenizer, args, "train")
        return [tuple(tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in out]

    return read


@pytest.fixture
def encoded(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Done]:
    """Rows through detection, reading and tokens, as in a run."""

    def run(*rows: dict[str, Any], **source: Any) -> Done:
        shape = formats.detect(rows, preference=True)
        given = Source(path="rows.jsonl", **source)
        job = Job(tokens.encoder(tokenizer), "dpo", given, Limit(1024), 0, shape.name, {})
        return job([RawRow(f"rows.jsonl:{i}", row) for i, row in enumerate(rows, 1)])

    return run


@pytest.fixture
def ours_reads(tokenizer: PreTrainedTokenizerBase, encoded: Callable[..., Done]) -> Read:
    """What alignctl trains on: the prompt and both answers of each row, as text."""

    def read(*rows: dict[str, Any], **source: Any) -> list[tuple[str, str, str]]:
        done = encoded(*rows, **source)
        assert not done.errors
        return [
            tuple(tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
            for row in done.batch.to_pylist()
        ]

    return read


def test_trl_misreading_of_orca_rows_question_and_system_are_lost(trl_reads: Read, ours_reads: Read) -> None:
    row = {
        "system": "Be short.",
        "question": "How long does tea draw?",
        "chosen": "About three minutes.",
        "rejected": "About a week.",
    }
    assert trl_reads(row) == [("About", f" three minutes.{END}", f" a week.{END}")]
    ((prompt, chosen, rejected),) = ours_reads(row)
    assert prompt == f"<|im_start|>system\nBe short.{END}\n" + ASK.format("How long does tea draw?")
    assert (chosen, rejected) == (f"About three minutes.{END}", f"About a week.{END}")


def test_trl_misreading_of_raw_ultrafeedback_a_string_prompt_beside_lists(trl_reads: Read, ours_reads: Read) -> None:
    ask = {"role": "user", "content": "How long does tea draw?"}
    chosen, rejected = ([ask, {"role": "assistant", "content": said}] for said in ("Three minutes.", "A week."))
    row = {
        "prompt": ask["content"],
        "prompt_id": "9f6c",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }
    with pytest.raises((TypeError, AttributeError)):  # which of them hangs on the order of a set of strings
        trl_reads(row)
    assert ours_reads(row) == [(ASK.format("How long does tea draw?"), f"Three minutes.{END}", f"A week.{END}")]


def test_trl_misreading_of_sharegpt_rows_key_error(trl_reads: Read, ours_reads: Read) -> None:
    row = {
        "conversations": [{"from": "human", "value": "How long does tea draw?"}],
        "chosen": {"from": "gpt", "value": "Three minutes."},
        "rejected": {"from": "gpt", "value": "A week."},
    }
    with pytest.raises(KeyError):
        trl_reads(row)
    assert ours_reads(row) == [(ASK.format("How long does tea draw?"), f"Three minutes.{END}", f"A week.{END}")]


def test_trl_misreading_of_hh_transcripts_split_inside_a_word(trl_reads: Read, ours_reads: Read) -> None:
    asked = "\n\nHuman: Is it bitter?\n\nAssistant:"
    row = {"chosen": f"{asked} I think steeping is best.", "rejected": f"{asked} I think stewing is best."}
    ((prompt, chosen, _),) = trl_reads(row)
    assert "Assistant: I think st" in prompt
    assert chosen.endswith(f"eping is best.{END}") and "I think" not in chosen
    assert ours_reads(row) == [
        (ASK.format("Is it bitter?"), f"I think steeping is best.{END}", f"I think stewing is best.{END}")
    ]


def test_trl_misreading_of_plain_strings_never_templated(trl_reads: Read, ours_reads: Read) -> None:
    row = {"prompt": "How long does tea draw?", "chosen": "Three minutes.", "rejected": "A week."}
    assert trl_reads(row) == [("How long does tea draw?", f"Three minutes.{END}", f"A week.{END}")]
    assert ours_reads(row) == [(ASK.format("How long does tea draw?"), f"Three minutes.{END}", f"A week.{END}")]


def test_trl_misreading_of_string_pairs_without_prompt_split_inside_a_word(trl_reads: Read) -> None:
    row = {"chosen": "How long? Three minutes.", "rejected": "How long? Thirty days."}
    assert trl_reads(row) == [("How long? Th", f"ree minutes.{END}", f"irty days.{END}")]
    with pytest.raises(RowError, match=r"`columns: \{prompt: …\}`"):
        formats.detect([row], preference=True)


def test_trl_misreading_of_a_tie_accepted(trl_reads: Read, ours_reads: Read, encoded: Callable[..., Done]) -> None:
    row = {"prompt": "How long does tea draw?", "chosen": "Three minutes.", "rejected": "Two minutes."}
    tie = {**row, "chosen_score": 4.0, "rejected_score": 4.0}
    pair = {**row, "chosen_score": 4.0, "rejected_score": 1.0}
    assert len(trl_reads(tie, pair)) == 2
    assert len(ours_reads(tie, pair, tie_margin=0)) == 1
    done = encoded(tie, pair, tie_margin=0)
    assert done.batch.column("place").to_pylist() == ["rows.jsonl:2"]
    assert done.ledger.aside["tie"].rows == 1


def test_trl_misreading_of_equal_answers_accepted(trl_reads: Read, encoded: Callable[..., Done]) -> None:
    row = {"prompt": "How long does tea draw?", "chosen": "Three minutes.", "rejected": "Three minutes."}
    assert len(trl_reads(row)) == 1
    done = encoded(row)
    assert (done.batch.num_rows, done.ledger.dropped["chosen equals rejected"].rows) == (0, 1)


def test_trl_misreading_of_different_histories_the_user_is_trained_too(
    trl_reads: Read, encoded: Callable[..., Done]
) -> None:
    chosen, rejected = (
        [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=True)]
        for said in (
            ["Tea or cocoa?", "Tea.", "How long does it draw?", "Three minutes."],
            ["Tea or cocoa?", "Cocoa.", "How hot is it?", "Very."],
        )
    )
    row = {"chosen": chosen, "rejected": rejected}
    ((_, trained, _),) = trl_reads(row)
    assert "<|im_start|>user\nHow long does it draw?" in trained
    assert encoded(row).ledger.dropped["chosen and rejected have different histories"].rows == 1
