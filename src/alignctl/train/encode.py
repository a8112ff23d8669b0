"""One source of rows, read, encoded and kept on disk as an Arrow table with its ledger."""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow

from alignctl import formats
from alignctl.errors import DataError, Problem
from alignctl.formats import Canonical, Dropped, Format, Message, Row, RowError
from alignctl.formats.preference import best, by_prompt, score_gap
from alignctl.recipe.schema import Data, Source
from alignctl.train import cache, ledger, sources, tokens, workers
from alignctl.train.files import RawRow
from alignctl.train.ledger import Ledger
from alignctl.train.tokens import Asking, Encoded, Encoder, Limit

_CHUNK = 256
_LOOKED_AT = 100
_SHOWN_ERRORS = 3
_CHECKED = 4
# Blanks and the blocks of punctuation, not \W: that holds the vowel signs of many scripts too.
_NO_WORD = re.compile(r"[\s!-/:-@\[-`{-~\u00a1-\u00bf\u2000-\u206f\u3000-\u303f\uff01-\uff0f]+")
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
ROW_COLUMNS = ("input_ids", "labels")


@dataclass(frozen=True)
class EncodedSource:
    """The kept rows of one source as a memory-mapped table, and where the others went.

    Columns: `place`; `canonical`, the row as JSON; `key`, `digest` and `likeness`, hashes of its prompt, its ids and
    its words; `supervised`, its tokens with loss; `common`, the tokens that both answers begin and end with;
    `same_words`, whether the answers differ in case, punctuation and spacing only; `cut`; `score_gap`; `control`,
    whether its text holds special tokens; and its ids.
    """

    path: str
    shape: Format
    table: pyarrow.Table
    ledger: Ledger
    cache: str


@dataclass(frozen=True)
class Job:
    """How the rows of a source are encoded; pickled to the worker processes."""

    encoder: Encoder
    method: str
    source: Source
    limit: Limit
    seed: int
    shape: str
    renames: dict[str, str]

    def __call__(self, rows: list[RawRow]) -> Done:
        done = Done()
        kept: list[dict[str, Any]] = []
        read: list[tuple[RawRow, Canonical, float | None]] = []
        for raw in rows:
            try:
                read.append((raw, *self._canonical(raw)))
            except RowError as error:
                done.errors.append((raw.place, str(error)))
            except Dropped as dropped:
                done.drop(dropped, raw.place)
        found = tokens.encode_rows(self.encoder, [self.rule(row) for _, row, _ in read])
        special = self.encoder.special
        for (raw, row, gap), encoded in zip(read, found, strict=True):
            if isinstance(encoded, Dropped):
                done.drop(encoded, raw.place)
            else:
                kept.append(_record(raw, row, encoded, gap, special))
        done.ledger.kept = len(kept)
        done.batch = pyarrow.RecordBatch.from_pylist(kept, schema=_schema(self.method))
        return done

    def _canonical(self, raw: RawRow) -> tuple[Canonical, float | None]:
        values = formats.renamed(raw.values, self.renames)
        gap = score_gap(values)
        if gap is not None and self.source.tie_margin is not None and abs(gap) <= self.source.tie_margin:
            raise Dropped("tie")
        row = formats.read(formats.named(self.shape), values)
        if "answers" in row:
            seed = f"{self.seed} {prompt_text(row)}"
            row = best(row, self.source.rejected, self.source.tie_margin or 0, seed)
        if self.method == "sft" and self.source.answer is not None:
            row = formats.chosen_dialogue(row)
        return row, gap

    def look(self, raw: RawRow, shape: Format) -> Looked:
        """One row, kept or not."""
        try:
            row, _ = self._canonical(raw)
        except Dropped as dropped:
            return Looked(raw, None, dropped)
        except RowError as error:
            _refuse([(raw.place, str(error))], shape)
            raise
        return Looked(raw, row, tokens.encode_rows(self.encoder, [self.rule(row)])[0])

    def rule(self, row: Canonical) -> Asking:
        """The row's rules, as `tokens.encode_rows` takes them."""
        rule = tokens.dialogue if self.method == "sft" else tokens.pair
        return rule(self.encoder, row, self.limit)


@dataclass
class Done:
    """What became of one chunk."""

    batch: pyarrow.RecordBatch | None = None
    ledger: Ledger = field(default_factory=Ledger)
    errors: list[tuple[str, str]] = field(default_factory=list)

    def drop(self, dropped: Dropped, place: str) -> None:
        # A tie is no fault of the row: it holds no preference, and the recipe or the shape says what a tie is.
        (self.ledger.set_aside if dropped.reason == "tie" else self.ledger.drop)(dropped.reason, [place])


def prompt_text(row: Canonical) -> str:
    """The prompt of a row, without case and spacing; rows with one prompt stay on one side of a split."""
    if "text" in row:
        return " ".join(row["text"].lower().split())
    messages: list[Message] = row.get("prompt") or [m for m in row["messages"] if m["role"] != "assistant"]
    return " ".join(" ".join(m["content"] for m in messages).lower().split())


def contents(row: Canonical) -> list[str]:
    """Every text in a canonical row, in order."""
    if "text" in row:
        return [row["text"]]
    return [m["content"] for column in ("messages", "prompt", "chosen", "rejected") for m in row.get(column, [])]


def _said(row: Canonical, side: str) -> str:
    return "\n".join(message["content"] for message in row[side])


def _words(text: str) -> str:
    """`text` without case, punctuation and spacing."""
    return _NO_WORD.sub(" ", text.lower()).strip()


def hashed(text: str) -> int:
    """64 bits of BLAKE2 over `text`."""
    return _bits(text.encode())


def hashed_ids(ids: dict[str, list[int]]) -> int:
    """64 bits of BLAKE2 over a row's ids and where each column of them ends."""
    return _bits(b"".join(array("q", [len(part), *part]).tobytes() for part in ids.values()))


def _bits(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _record(
    raw: RawRow, row: Canonical, encoded: Encoded, gap: float | None, special: re.Pattern[str]
) -> dict[str, Any]:
    said = contents(row)
    ids = encoded.ids
    trained = [ids["labels"]] if "labels" in ids else [ids["chosen_ids"], ids["rejected_ids"]]
    return {
        "place": raw.place,
        "canonical": json.dumps(row, ensure_ascii=False),
        "key": hashed(prompt_text(row)),
        "digest": hashed_ids(ids),
        "likeness": hashed(_words("\n".join(said))),
        "supervised": sum(len(part) - part.count(-100) for part in trained),
        "cut": encoded.cut,
        "same_words": "chosen" in row and _words(_said(row, "chosen")) == _words(_said(row, "rejected")),
        "common": 0 if "labels" in ids else _common(ids["chosen_ids"], ids["rejected_ids"]),
        "score_gap": gap,
        "control": any(special.search(text) is not None for text in said),
        **ids,
    }


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two answers share at their start and at their end."""
    shorter = min(len(a), len(b))
    start = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    return start + next((i for i in range(shorter - start) if a[-1 - i] != b[-1 - i]), shorter - start)


def _schema(method: str) -> pyarrow.Schema:
    columns = ROW_COLUMNS if method == "sft" else PAIR_COLUMNS
    kinds = {
        **dict.fromkeys(("place", "canonical", "cut"), pyarrow.string()),
        **dict.fromkeys(("key", "digest", "likeness"), pyarrow.int64()),
        **dict.fromkeys(("supervised", "common"), pyarrow.int32()),
        "score_gap": pyarrow.float32(),
        **dict.fromkeys(("same_words", "control"), pyarrow.bool_()),
        **dict.fromkeys(columns, pyarrow.list_(pyarrow.int32())),
    }
    return pyarrow.schema(list(kinds.items()))


def encode(source: Source, method: str, encoder: Encoder, data: Data, seed: int) -> EncodedSource:
    """The rows of `source`, from the cache or encoded anew.

    Raises:
        DataError: the source cannot be read, its shape is unknown, or a row is malformed.
        MachineError: the hub cannot be reached, or the cache cannot be written.
    """
    began = time.monotonic()
    limit = Limit(data.max_length, data.overlong, _longest_token(encoder))
    given = source.model_dump(exclude={"weight", "path"}) | {"seed": seed if source.rejected == "random" else None}
    key = cache.key(encoder, rows=sources.identity(source), source=given, method=method, limit=vars(limit))
    entry = cache.folder() / key
    found = "hit"
    if not _holds(entry, Job(encoder, method, source, limit, seed, "", {})):
        found = "miss"
        with cache.written(entry) as folder:
            _write(folder, source, method, encoder, limit, seed)
    cache.use(entry)
    meta = json.loads((entry / "ledger.json").read_text(encoding="utf-8"))
    table = _table(entry)
    said = f"{found} {key[:12]}, {time.monotonic() - began:.1f} s"
    return EncodedSource(source.path, formats.named(meta["format"]), table, ledger.from_summary(meta["ledger"]), said)


def _table(entry: Path) -> pyarrow.Table:
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(entry / "rows.arrow"))).read_all()


def _longest_token(encoder: Encoder) -> int:
    return max(map(len, encoder.tokenizer.get_vocab()))


def _holds(entry: Path, job: Job) -> bool:
    """Whether the cache has `entry`, whole, and a few of its rows still come out as they stand there."""
    try:
        meta = json.loads((entry / "ledger.json").read_text(encoding="utf-8"))
        table = _table(entry)
        picked = random.SystemRandom().sample(range(table.num_rows), min(_CHECKED, table.num_rows))
        rows = [table.slice(i, 1).to_pylist()[0] for i in picked]
        canonical = [json.loads(row["canonical"]) for row in rows]
    except (OSError, ValueError, pyarrow.ArrowInvalid):
        return False
    if table.num_rows != meta["ledger"]["kept"]:
        return False
    again = tokens.encode_rows(job.encoder, [job.rule(row) for row in canonical])
    return all(
        isinstance(new, Encoded) and all(row[column] == ids for column, ids in new.ids.items())
        for row, new in zip(rows, again, strict=True)
    )


def _write(folder: Path, source: Source, method: str, encoder: Encoder, limit: Limit, seed: int) -> None:
    """Encode every row of `source` into `folder`; chunks of rows pass through, so memory stays flat."""
    counted = _Counted(sources.read(source))
    shape, rows, renames = shaped(source, method, iter(counted))
    job = Job(encoder, method, source, limit, seed, "completions" if shape.per_answer else shape.name, renames)
    total = Ledger()
    schema = _schema(method)
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for done in workers.run(job, _chunks(rows)):
            _refuse(done.errors, shape)
            total.add(done.ledger)
            writer.write_batch(done.batch)
    total.rows = counted.rows
    total.formats = {shape.what: counted.rows}
    spare = total.rows - total.kept - total.lost - sum(places.rows for places in total.aside.values())
    total.set_aside("further answers to a prompt", [], spare)
    meta = {"format": shape.name, "ledger": total.summary()}
    (folder / "ledger.json").write_text(json.dumps(meta), encoding="utf-8")


def look(source: Source, method: str, encoder: Encoder, data: Data, seed: int, place: str) -> Looked | None:
    """The row of `source` that stands at `place`, kept or not; None when there is no such row.

    Raises:
        DataError: the row, or one before it, cannot be read.
    """
    shape, rows, renames = shaped(source, method, sources.read(source))
    raw = next((raw for raw in rows if raw.place == place), None)
    if raw is None:
        return None
    limit = Limit(data.max_length, data.overlong)
    job = Job(encoder, method, source, limit, seed, "completions" if shape.per_answer else shape.name, renames)
    return job.look(raw, shape)


@dataclass(frozen=True)
class Looked:
    """One row as it was found, as messages where it can be read, and its ids or why it is dropped."""

    raw: RawRow
    canonical: Canonical | None
    encoded: Encoded | Dropped


class _Counted:
    """Rows, counted as they pass."""

    def __init__(self, source: Iterator[RawRow]) -> None:
        self.source, self.rows = source, 0

    def __iter__(self) -> Iterator[RawRow]:
        for row in self.source:
            self.rows += 1
            yield row


def shaped(source: Source, method: str, stream: Iterator[RawRow]) -> tuple[Format, Iterable[RawRow], dict[str, str]]:
    """The shape of a source's rows, the rows, and the columns still to be renamed in them."""
    head = list(islice(stream, _LOOKED_AT))
    columns: dict[str, str] = {str(ours): theirs for ours, theirs in (source.columns or {}).items()}
    preference = method != "sft" or source.answer is not None
    place = head[0].place
    try:
        found = []
        for raw in head:
            place = raw.place
            found.append(formats.renamed(raw.values, columns))
        place = head[0].place
        shape = formats.named(source.format) if source.format else formats.detect(found, preference=preference)
    except RowError as error:
        hint = "; for a preference set, `answer: chosen`" if method == "sft" and source.answer is None else ""
        way_out = f"name the columns with `columns:`, or the shape with `format:`{hint}"
        raise DataError(Problem(place, str(error), way_out)) from error
    if (shape in formats.PREFERENCE) != preference:
        raise DataError(Problem(source.path, f"`format: {shape.name}` is not for {method}", "see docs/data.md"))
    rows = chain(head, stream)
    if shape.per_answer:
        return shape, _grouped(rows, columns), {}
    return shape, rows, columns


def _grouped(rows: Iterable[RawRow], renames: dict[str, str]) -> Iterator[RawRow]:
    """Rows of one answer each, brought together by prompt."""
    place = ""

    def given() -> Iterator[tuple[str, Row]]:
        nonlocal place
        for raw in rows:
            place = raw.place
            yield place, formats.renamed(raw.values, renames)

    try:
        for first, values in by_prompt(given()):
            yield RawRow(first, dict(values))
    except RowError as error:
        raise DataError(Problem(place, str(error), "mend or remove the row")) from error


def _chunks(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    stream = iter(rows)
    while chunk := list(islice(stream, _CHUNK)):
        yield chunk


def _refuse(errors: list[tuple[str, str]], shape: Format) -> None:
    if not errors:
        return
    way_out = f"the rows are read as {shape.name} ({shape.what}); mend or remove this one"
    raise DataError(*(Problem(place, what, way_out) for place, what in errors[:_SHOWN_ERRORS]))
