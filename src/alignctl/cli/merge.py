"""`alignctl merge`: a run's adapter and its base as one model folder."""

from __future__ import annotations

import os
from pathlib import Path

from alignctl import quiet
from alignctl.errors import Problem, RecipeError

ONTO = ("original", "dequantized")
DTYPES = ("bfloat16", "float16", "float32")


def command(
    folder: Path, out: Path, *, onto: str | None, dtype: str | None, max_kl: float | None, gguf: Path | None
) -> None:
    """Merge the adapter of the run in `folder` into its base, at `out`."""
    for option, given, known in (("--onto", onto, ONTO), ("--dtype", dtype, DTYPES)):
        if given is not None and given not in known:
            raise RecipeError(Problem(option, f"knows no {given!r}", f"one of {', '.join(known)}"))
    if max_kl is not None and not max_kl > 0:
        raise RecipeError(Problem("--max-kl", f"{max_kl} nats are no limit", "a number above 0"))
    with quiet.libraries(Path(os.devnull)) as user:
        from alignctl.proof import gguf as files
        from alignctl.proof import merge, trained
        from alignctl.train.display import Display
        from alignctl.train.translate import refused, translated

        display = Display(user)
        with translated(), refused():
            converter = None if gguf is None else files.converter(gguf)
            asked = merge.wanted(trained.opened(folder), out, onto, dtype, max_kl)
            found = merge.merge(asked, display)
        display.say(f"merged onto the {asked.onto} weights: {merge.said(found)}")
        display.say(f"{out}: loads in plain transformers")
        if found.kl >= found.base_kl:
            display.say("note: the base is as near to the adapter: training changed less than rounding does")
        if converter is not None:
            with translated():
                display.say(f"{gguf}: {merge.convert(asked, converter, display)}")
        display.next([(f"alignctl push {folder} REPO --merged {out}", "upload it")])
