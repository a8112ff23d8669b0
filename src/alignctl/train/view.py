"""A row as the model will see it: runs of tokens, supervised or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from alignctl.train.tokens import Encoder, Ids


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that all carry loss, or none of them does."""

    text: str
    supervised: bool
    ids: Ids


def sides(encoder: Encoder, ids: dict[str, Ids]) -> dict[str, list[Span]]:
    """The sequences of an encoded row by name (`chosen` and `rejected`, or `row`), each from its first token on."""
    if "labels" in ids:
        return {"row": list(_labelled(encoder, ids["input_ids"], ids["labels"]))}
    prompt = _span(encoder, ids["prompt_ids"], supervised=False)
    return {side: [prompt, _span(encoder, ids[f"{side}_ids"], supervised=True)] for side in ("chosen", "rejected")}


def _labelled(encoder: Encoder, ids: Ids, labels: Ids) -> Iterator[Span]:
    for supervised, run in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != -100):
        yield _span(encoder, [token for token, _ in run], supervised=supervised)


def _span(encoder: Encoder, ids: Ids, *, supervised: bool) -> Span:
    text = encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Span(str(text), supervised, ids)
