"""How long 60,000 preference rows of UltraFeedback's size take to be read and tokenized, and to be found again.

The rows have the shape of ultrafeedback_binarized and are made of the built-in demo set's words; their lengths, which
it prints, are spread like those of real prompts and answers. The tokenizer is SmolLM2's, and the cache starts empty.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alignctl.recipe import catalog


def write_rows(path: Path, rows: int) -> None:
    """`rows` rows in the shape of ultrafeedback_binarized."""
    words = (catalog.folder() / "data" / "brief" / "train.jsonl").read_text(encoding="utf-8")
    vocabulary = sorted({word.strip('",.:{}[]') for word in words.split()} - {""})
    draw = random.Random(0)

    def text(mean: float) -> str:
        length = max(3, min(int(draw.lognormvariate(0, 0.8) * mean * 0.73), 1500))
        said = draw.choices(vocabulary, k=length)
        return ". ".join(" ".join(said[i : i + 14]) for i in range(0, length, 14)) + "."

    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            prompt, chosen, rejected = text(115), text(215), text(200)
            user = {"role": "user", "content": f"{i} {prompt}"}
            sides = [[user, {"role": "assistant", "content": side}] for side in (chosen, rejected)]
            row = {"prompt": user["content"], "prompt_id": str(i), "chosen": sides[0], "rejected": sides[1]}
            file.write(json.dumps(row | {"messages": sides[0], "score_chosen": 8.0, "score_rejected": 6.5}) + "\n")


def check(recipe: Path, cache: Path) -> tuple[float, float, str]:
    """Wall and CPU seconds of `alignctl check RECIPE`, and what it says of its cache."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    command = [sys.executable, "-m", "alignctl", "check", str(recipe), "--json"]
    environment = {**os.environ, "ALIGNCTL_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ledger = json.loads(done.stdout)["ledger"]["train"]
    tokens = {name: part["p50"] for name, part in ledger["tokens"].items()}
    said = f"{ledger['kept']:,} of {ledger['rows']:,} rows kept, median {tokens}, cache {ledger['sources'][0]['cache']}"
    return wall, cpu, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    rows = parser.parse_args().rows
    model = catalog.folder() / "_base" / "smollm2.yaml"
    with tempfile.TemporaryDirectory() as scratch:
        file, recipe, cache = Path(scratch) / "rows.jsonl", Path(scratch) / "recipe.yaml", Path(scratch) / "cache"
        write_rows(file, rows)
        recipe.write_text(
            f"extends: {model}\ndata: {{train: [{{path: {file}}}], eval: null, max_length: 2048}}\n"
            "training: {learning_rate: 5e-5}\ndpo: {}\n"
        )
        check(catalog.folder() / "demo-dpo.yaml", cache)  # fetches the tokenizer
        print(f"{rows:,} rows, {file.stat().st_size / 2**20:,.0f} MiB, {os.cpu_count()} cores")
        for run in ("cold", "again"):
            wall, cpu, said = check(recipe, cache)
            print(f"{run:6} {wall:6.1f} s wall, {cpu:6.1f} s CPU: {said}")


if __name__ == "__main__":
    main()
