"""A run in words and numbers: for run.json, for the table at its start, and for its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from alignctl import rundir, secrets
from alignctl.recipe.schema import Recipe
from alignctl.rundir import STAND_IN, RunDir
from alignctl.train import arguments, dpo
from alignctl.train import model as models
from alignctl.train.data import Rows
from alignctl.train.display import Display
from alignctl.train.parts import Parts
from alignctl.train.tokenizer import model_path, template_hash


def parameters(trainer: Trainer) -> tuple[int, int]:
    """Trainable and all parameters; a 4-bit weight counts as the numbers that it stands for."""
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return trainable, trainer.model.num_parameters()


def record(recipe: Recipe, parts: Parts, trainer: Trainer) -> dict[str, Any]:
    """What run.json says of model, reference, template and machine."""
    trainable, total = parameters(trainer)
    return {
        "method": recipe.method,
        "model": {
            "name_or_path": recipe.model.name_or_path,
            "loaded_from": model_path(recipe)[0],
            "revision": recipe.model.revision,
            "commit": getattr(trainer.model.config, "_commit_hash", None),
            "start_fingerprint": models.fingerprint(trainer.model),
            "base_fingerprint": models.base_fingerprint(trainer.model),
            "storage": models.storage(recipe, parts.precision),
            "trust_remote_code": recipe.model.trust_remote_code,
            "use_safetensors": recipe.model.use_safetensors,
            "adapter": recipe.model.adapter,
            "parameters": total,
            "trainable": trainable,
        },
        "reference": dpo.reference(recipe) if recipe.dpo is not None else None,
        "template": {"name": recipe.model.chat_template, "sha256": template_hash(parts.encoder)},
        "machine": {"device": parts.machine.kind, "name": parts.machine.name, "dtype": _dtype(parts)},
        "seed": recipe.training.seed,
    }


def _dtype(parts: Parts) -> str:
    return str(parts.precision).removeprefix("torch.")


def table(recipe: Recipe, parts: Parts, trainer: Trainer, train: Rows, held_out: Rows | None) -> dict[str, str]:
    """What will run, in order."""
    trainable, total = parameters(trainer)
    training = recipe.training
    updates = -(-len(train) // (training.per_device_train_batch_size * training.gradient_accumulation_steps))
    steps = training.max_steps or int(updates * training.num_train_epochs)
    rows = {
        "method": _method(recipe),
        "model": f"{recipe.model.name_or_path}, {total / 1e6:,.1f} M parameters, {trainable / 1e6:,.2f} M trained "
        f"({_how(recipe)})",
        "reference": dpo.reference(recipe) if recipe.dpo is not None else "",
        "rows": _rows(train) + (f"; held out: {_rows(held_out)}" if held_out is not None else "; none held out"),
        "tokens": _tokens(train),
        "steps": f"{steps} (batch {training.per_device_train_batch_size} × {training.gradient_accumulation_steps}, "
        f"{training.num_train_epochs:g} epoch{'' if training.num_train_epochs == 1 else 's'})"
        if not training.max_steps
        else f"{steps} (training.max_steps)",
        "optimizer": f"{arguments.optimizer(recipe, parts.machine)}, learning rate {training.learning_rate:g}, "
        f"{training.lr_scheduler_type}",
        "device": f"{parts.machine.name}, {_dtype(parts)}"
        + (", gradient checkpointing" if arguments.checkpointing(recipe, parts.machine) else ""),
        "folder": str(parts.run),
    }
    return {name: value for name, value in rows.items() if value}


def engine(record: dict[str, Any]) -> str:
    """How batches are computed, from what run.json says of it."""
    if not record["packed"]:
        return f"padded: {record['why']}"
    if "worst" not in record:
        return "packed, and not compared with padded batches: gates.packed is off"
    return (
        f"packed: {record['packed_tokens']:,} tokens in the first batch instead of {record['padded_tokens']:,}; "
        f"both ways differ by {record['worst']:.0e} (rounding allows {record['limit']:g})"
        + (f"; reference log-probabilities: cache {record['reference_cache']}" if "reference_cache" in record else "")
    )


def _method(recipe: Recipe) -> str:
    section = recipe.dpo or recipe.orpo
    if section is None:
        return "sft"
    settings = section.model_dump(exclude_defaults=True) | {"beta": section.beta}
    return recipe.method + ", " + ", ".join(f"{key} {value}" for key, value in settings.items())


def _how(recipe: Recipe) -> str:
    storage = "4-bit QLoRA" if recipe.quantization else "LoRA"
    if recipe.model.adapter is not None:
        return f"{storage}, going on from {recipe.model.adapter}"
    return "all weights" if recipe.lora is None else f"{storage}, r {recipe.lora.r}, {recipe.lora.target_modules}"


def _rows(rows: Rows) -> str:
    lost = rows.ledger.lost
    shapes = ", ".join(rows.ledger.formats)
    why = ", ".join(f"{places.rows} {reason}" for reason, places in rows.ledger.dropped.items())
    return f"{rows.ledger.kept} ({shapes})" + (f", {lost} dropped: {why}" if lost else "")


def _tokens(rows: Rows) -> str:
    summary = rows.summary()
    lengths = "; ".join(f"{name} {p['p50']} median, {p['p100']} longest" for name, p in summary["tokens"].items())
    return f"{lengths}; {summary['supervised_share']:.0%} supervised"


def notices(recipe: Recipe, parts: Parts) -> list[str]:
    """What the recipe asks for and does not get, or gets and may not expect."""
    out = []
    optimizer = arguments.optimizer(recipe, parts.machine)
    if optimizer != recipe.training.optim:
        out.append(f"training.optim {recipe.training.optim} needs CUDA; {optimizer} takes its place")
    dropout_off = recipe.method != "sft" and recipe.trl.get("disable_dropout", True)
    if _dropout(recipe) and dropout_off:
        out.append(
            f"lora.lora_dropout is switched off by TRL's {recipe.method}; `trl: {{disable_dropout: false}}` keeps it"
        )
    if not recipe.model.use_safetensors:
        out.append("model.use_safetensors is off: a pickle file can run code when it is loaded")
    if recipe.model.trust_remote_code:
        out.append("model.trust_remote_code is on: code from the model's repository runs on this machine")
    written = secrets.hide(model_path(recipe)[0])
    if recipe.trains_adapter and secrets.is_hidden(written):
        out.append(f"the base's name holds a secret: adapter_config.json will say {written}, which others cannot load")
    return out


def _dropout(recipe: Recipe) -> float:
    """The dropout of the adapter: of the one that training goes on from, where it does."""
    folder = models.adapter_folder(recipe)
    if folder is not None:
        return float(rundir.read_json(folder / "adapter_config.json").get("lora_dropout") or 0)
    return recipe.lora.lora_dropout if recipe.lora is not None else 0.0


def sample_numbers(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean length in tokens and share of answers that stop, before and after."""
    if not samples:
        return {"n": 0}
    n = len(samples)
    tokens = {when: sum(s[f"{when}_tokens"] for s in samples) / n for when in ("before", "after")}
    return {
        "n": n,
        "mean_tokens": tokens,
        "length_ratio": tokens["after"] / tokens["before"] if tokens["before"] else None,
        "stop_rate": {when: sum(s[f"{when}_stopped"] for s in samples) / n for when in ("before", "after")},
    }


def closing(
    display: Display, run: RunDir, summary: dict[str, Any], samples: list[dict[str, Any]], seconds: float
) -> None:
    """The verdict, two answers before and after, and the commands to go on with."""
    if "before" in summary:
        display.outcome(summary["verdict"], summary["reason"], _numbers(summary))
    else:
        display.say(summary["verdict"])
    telling = sorted(samples, key=lambda s: s["after_tokens"] / max(1, s["before_tokens"]))
    display.answers(telling[len(telling) // 4 :: max(1, len(telling) // 2)][:2])
    display.say(f"\nfinished in {seconds / 60:.1f} min: {run.path}")
    method = str(summary["method"])
    more = {"sft": ("dpo", f"model.adapter={run.path}", "go on with preferences from this adapter")}.get(method)
    if Path(run.record["model"]["name_or_path"]).is_relative_to((run / STAND_IN).absolute()):
        return
    commands = [(f"alignctl eval {run.path}", "did it get better? every number, with intervals")]
    commands += [(f"alignctl chat {run.path} --compare", "talk to it, beside what it started from")]
    if more and run.record["model"]["trainable"] < run.record["model"]["parameters"]:
        commands += [(f"alignctl {more[0]} RECIPE {more[1]}", more[2])]
    display.next(commands)


def _numbers(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    def row(name: str, key: str, form: str) -> tuple[str, str, str]:
        cells = []
        for when in ("before", "after"):
            value, interval = summary[when][key], summary[when].get(f"{key}_interval")
            spread = f" ({form.format(interval[0])} to {form.format(interval[1])})" if interval else ""
            cells.append(form.format(value) + spread)
        return (name, *cells)  # type: ignore[return-value]

    out = [row("loss", "loss", "{:.4f}")]
    if "margin" in summary["after"]:
        out += [row("reward accuracy", "reward_accuracy", "{:.3f}"), row("reward margin", "margin", "{:.3f}")]
        out += [row("chosen log-prob a token", "chosen_logps_per_token", "{:.3f}")]
        out += [row("rejected log-prob a token", "rejected_logps_per_token", "{:.3f}")]
    samples = summary["samples"]
    if samples["n"]:
        out += [("answer tokens", *(f"{samples['mean_tokens'][w]:.1f}" for w in ("before", "after")))]  # type: ignore[list-item]
        out += [("answers that stop", *(f"{samples['stop_rate'][w]:.0%}" for w in ("before", "after")))]  # type: ignore[list-item]
    return out
