"""The faults that hide in a training run, planted in TRL's own trainer and in alignctl's run: who says so?

Prints the table of docs/gates.md, and exits 1 when a fault goes through alignctl in silence.

python benchmarks/faults.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from between import BETWEEN
from faulty import (
    LORA,
    Fault,
    Lab,
    accuracy,
    adapters,
    adds_bos,
    answered,
    asked_otherwise,
    asked_with,
    begins_with_end,
    bos_is_eos,
    changed,
    cut_off,
    doubled,
    ends,
    fine,
    first_loss,
    frozen,
    in_bfloat16,
    in_four_bits,
    kept,
    longer,
    low_precision,
    merged_in_memory,
    messages,
    no_end,
    none,
    not_a_number,
    off_the_reference,
    open_ended,
    other_weights,
    pad_is_eos,
    pairs,
    rewards,
    ruined,
    run_on,
    seams,
    stop,
    supervised,
    talk,
    to_sft,
    turns,
    twice,
    unmoved,
    widened,
    with_scores,
    without_prompt,
)
from trials import by_alignctl, by_trl, made, quiet

LONG = "river " * 200


FAULTS = [
    Fault(1, "the reference is not what training starts from", first_loss, plant=off_the_reference),
    Fault(
        2,
        "the reference is read anew, what was merged in memory is lost",
        first_loss,
        plant=merged_in_memory,
        lora=None,
        ours={"training": {"learning_rate": 1e-5}},
    ),
    Fault(3, "adapters in bfloat16", low_precision, plant=in_bfloat16),
    Fault(4, "nothing is trained", fine, plant=frozen),
    Fault(5, "no gradient reaches some layers", unmoved, plant=cut_off),
    Fault(6, "the optimizer updates something else", unmoved, plant=other_weights),
    Fault(7, "NaN behind the log's filter", ruined, plant=not_a_number),
    Fault(
        8,
        "no answer left after cutting",
        ruined,
        rows=changed(pairs(), 5, prompt=LONG),
        method="orpo",
        theirs={"max_length": 64},
        ours={"data": {"max_length": 64}},
    ),
    Fault(
        9,
        "rows too long for the limit",
        kept,
        rows=messages(changed(pairs(), 5, prompt=LONG)),
        theirs={"max_length": 64},
        ours={"data": {"max_length": 64}},
    ),
    Fault(
        10,
        "answers cut before their EOS",
        open_ended,
        rows=messages(changed(pairs(), 5, chosen=LONG)),
        theirs={"max_length": 64},
        ours={"data": {"max_length": 64}},
    ),
    Fault(
        11,
        "EOS masked because it pads",
        open_ended,
        rows=to_sft(pairs()),
        method="sft",
        tokenizer=pad_is_eos,
        sound=lambda t: none(t, "every answer ends in a supervised stop token", lambda q, a: stop(t) not in a[-2:]),
    ),
    Fault(
        12,
        "EOS twice, or something behind it",
        run_on,
        rows=messages(pairs()),
        method="orpo",
        sound=lambda t: none(t, "nothing follows an answer's end", lambda q, a: stop(t) in a[:-2]),
    ),
    Fault(13, "EOS is not the end of a turn", no_end, rows=messages(pairs()), tokenizer=bos_is_eos, sound=ends),
    Fault(
        14,
        "BOS twice",
        twice,
        rows=[{"text": f"<|im_start|>user {row['prompt']}"} for row in pairs()],
        method="sft",
        tokenizer=adds_bos,
        sound=lambda t: none(t, "no row begins with BOS twice", lambda q, a: doubled(t, q + a)),
    ),
    Fault(
        15,
        "BOS that is EOS before the prompt",
        begins_with_end,
        method="orpo",
        tokenizer=bos_is_eos,
        sound=lambda t: none(t, "no row begins with EOS", lambda q, a: q[0] == t.processing_class.eos_token_id),
    ),
    Fault(
        17,
        "a mask without a supervised token",
        supervised,
        rows=to_sft(pairs()),
        method="sft",
        theirs={"assistant_only_loss": True},
        sound=lambda t: none(t, "every row has supervised tokens", lambda q, a: not a),
    ),
    Fault(18, "the prompt guessed from what two texts share", asked_with, rows=without_prompt(pairs())),
    Fault(
        19,
        "an answer's first letters read as the prompt's",
        seams,
        rows=[row | {"prompt": row["prompt"] + " whe", "chosen": "el" + row["chosen"]} for row in pairs()],
        sound=lambda t: "" if asked_otherwise(t) else "prompt and answer are tokenized apart",
    ),
    Fault(
        20,
        "a conversation cut to one turn",
        turns,
        rows=[row | {"prompt": talk(row["prompt"])} for row in messages(pairs())],
        sound=lambda t: "all turns are there" if turns(t) == "3 of 3 turns" else "",
    ),
    Fault(21, "chosen and rejected swapped in every third row", accuracy, rows=with_scores(pairs())),
    Fault(22, "both answers the same", first_loss, rows=changed(pairs(), 2, chosen="tea", rejected="tea")),
    Fault(
        23,
        "pairs that one word tells apart",
        accuracy,
        rows=[row | {"chosen": f"good {row['chosen']}", "rejected": f"bad {row['rejected']}"} for row in pairs(240)],
    ),
    Fault(
        24,
        "the longer answer always wins",
        accuracy,
        rows=longer(pairs(64)),
    ),
    Fault(
        25,
        "chosen answers become unlikely too",
        rewards,
        theirs={"learning_rate": 3e-3, "max_steps": 60, "loss_type": "apo_down"},
        ours={"training": {"learning_rate": 3e-3, "max_steps": 60}, "dpo": {"loss_type": "apo_down"}},
    ),
    Fault(
        26,
        "answers that repeat themselves",
        answered,
        rows=to_sft([row | {"chosen": "tea " * 30} for row in pairs(32)]),
        held_out=to_sft([row | {"chosen": "tea " * 30, "prompt": f"Ask {i}"} for i, row in enumerate(pairs(4))]),
        method="sft",
        lora=None,
        theirs={"learning_rate": 1e-2, "max_steps": 40},
        ours={
            "training": {"learning_rate": 1e-2, "max_steps": 40},
            "evaluation": {"samples": 4, "max_new_tokens": 24},
        },
    ),
    Fault(27, "held-out prompts in the training rows", accuracy, held_out=pairs(4)),
    Fault(
        28,
        "LoRA targets that are not there",
        adapters,
        lora=LORA | {"target_modules": ["q_proj", "value_proj"]},
    ),
    Fault(
        29,
        "QLoRA on layers that are not quantised",
        in_four_bits,
        plant=widened,
        four_bits=True,
        ours={"quantization": {}},
    ),
    Fault(
        33,
        "rows that see each other in a pack",
        fine,
        rows=to_sft(pairs()),
        method="sft",
        theirs={"packing": True, "max_length": 64},
        ours={"trl": {"packing": True}},
    ),
    Fault(30, "a mistyped key", fine, theirs={"lerning_rate": 1e-5}, ours={"training": {"lerning_rate": 1e-5}}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks of this page too")
    parser.add_argument("--debug", action="store_true", help="tracebacks of TRL's trainers, on stderr")
    args = parser.parse_args()
    table = ["| | fault | TRL's trainer | alignctl |", "|---|---|---|---|"]
    print("\n".join(table))
    silent = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGNCTL_CACHE"] = str(Path(folder) / "cache")
        with quiet():
            lab = made(Path(folder))
        planned = [(f.number, f.name, partial(by_trl, f), partial(by_alignctl, f)) for f in FAULTS]
        for number, name, theirs, ours in sorted([*planned, *BETWEEN], key=lambda each: each[0]):
            if args.only and number not in args.only:
                continue
            with quiet(debug=args.debug):
                found = tried(theirs, lab, debug=args.debug)
                code, named = ours(lab)
            named = [each for each in named if each]
            silent += not named
            table.append(f"| {number} | {name} | {found} | {code}: {'; '.join(named) or 'silent'} |")
            print(table[-1], flush=True)
    if args.write:
        insert(args.write, table)
    sys.exit(1 if silent else 0)


MARKS = ("<!-- faults -->", "<!-- end of faults -->")


def insert(page: Path, table: list[str]) -> None:
    """Put `table`, and where it comes from, between the marks of `page`."""
    start, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    end = rest.split(MARKS[1])[1]
    versions = ", ".join(f"{name} {version(name)}" for name in ("alignctl", "trl", "transformers", "peft", "torch"))
    source = f"`python benchmarks/faults.py`, {datetime.now(UTC).date()}; {versions}."
    page.write_text("\n".join([start + MARKS[0], source, "", *table, MARKS[1]]) + end, encoding="utf-8")


def tried(theirs: Callable[[Lab], str], lab: Lab, *, debug: bool) -> str:
    """How TRL's trainer ends."""
    try:
        return f"exit 0: {theirs(lab)}"
    except Exception as error:  # noqa: BLE001 (whatever it raises is what it says)
        if debug:
            traceback.print_exc()
        return f"stops: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"


if __name__ == "__main__":
    main()
