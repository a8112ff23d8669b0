"""Curves against numbers derived by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl import drift
from alignctl.report.curves import Curve, curves, overlaid
from alignctl.report.gather import gather

MakeRun = Callable[..., Path]


def of(run: Path) -> dict[str, Curve]:
    return {curve.key: curve for curve in curves(gather(run))}


def log(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_drift_of_dpo_is_against_the_reference(make_run: MakeRun) -> None:
    """Rewards of -0.4 and -1.0 with beta 0.1 are -4 and -10 nats; with 20 tokens each -0.2 and -0.5 a token."""
    run = make_run()
    log(run, [{"step": 1, "loss": 0.6, "rewards/chosen": -0.4, "rewards/rejected": -1.0}])
    chosen, rejected = of(run)["drift"].lines
    assert chosen.values == [pytest.approx(-0.2)]
    assert rejected.values == [pytest.approx(-0.5)]
    assert of(run)["drift"].normal == (drift.LIMIT, 0.0)
    assert "normal" in of(run)["drift"].note


def test_without_mean_lengths_there_is_no_drift_of_dpo(make_run: MakeRun) -> None:
    run = make_run()
    values = json.loads((run / "ledger.json").read_text())
    del values["train"]["lengths"]
    (run / "ledger.json").write_text(json.dumps(values))
    assert "drift" not in of(run)
    assert "loss" in of(run)


def test_the_drift_of_orpo_is_against_its_first_line(make_run: MakeRun) -> None:
    run = make_run(method="orpo")
    log(run, [{"step": i, "loss": 1, "logps/chosen": -1.5 - 0.1 * i, "logps/rejected": -2.0} for i in (1, 2)])
    chosen, rejected = of(run)["drift"].lines
    assert chosen.values == [0.0, pytest.approx(-0.1)]
    assert rejected.values == [0.0, 0.0]


def test_ln_2_is_a_level_of_the_sigmoid_loss_alone(make_run: MakeRun) -> None:
    assert of(make_run("sigmoid"))["loss"].level == (math.log(2), "ln 2")
    hinge = make_run("hinge")
    (hinge / "recipe.yaml").write_text("dpo: {beta: 0.1, loss_type: hinge}\n")
    assert of(hinge)["loss"].level is None
    assert of(make_run("orpo", "orpo"))["loss"].level is None


def test_held_out_rows_stand_in_the_same_plots(make_run: MakeRun) -> None:
    train, held_out = of(make_run(steps=8))["accuracy"].lines
    assert (len(train.values), train.dots) == (8, False)
    assert (held_out.steps, held_out.dots) == ([2, 4, 6, 8], True)


def test_sft_has_no_preferences(make_run: MakeRun) -> None:
    found = of(make_run(method="sft"))
    assert not {"rewards", "margins", "accuracy", "drift"} & found.keys()
    assert {"loss", "token-accuracy", "grad-norm", "memory", "speed"} <= found.keys()


def test_what_is_not_finite_is_left_out_and_said(make_run: MakeRun) -> None:
    run = make_run()
    log(run, [{"step": i, "loss": float("nan") if i > 3 else 0.5, "grad_norm": 1.0} for i in range(1, 6)])
    assert of(run)["loss"].lines[0].steps == [1, 2, 3]
    assert of(run)["loss"].note.endswith("2 of 5 logged values are not finite.")
    assert "finite" not in of(run)["grad-norm"].note


def test_the_host_is_drawn_where_the_device_is_another(make_run: MakeRun) -> None:
    run = make_run()
    assert [line.label for line in of(run)["memory"].lines] == ["device", "host"]
    log(run, [{"step": 1, "loss": 1, "peak_memory_gib": 2.0, "peak_host_gib": 2.0}])
    assert [line.label for line in of(run)["memory"].lines] == ["device"]


def test_a_plot_is_told_in_words(make_run: MakeRun) -> None:
    run = make_run()
    log(run, [{"step": 1, "loss": 0.75}, {"step": 9, "loss": 0.5}])
    assert of(run)["loss"].alternative == "Loss against step: training rows from 0.75 to 0.5 over 2 points"


def test_margins_of_several_betas_are_in_nats(make_run: MakeRun) -> None:
    """A margin of 1.2 at beta 0.1 is 12 nats, and at beta 0.5 it is 2.4."""
    runs = [make_run("low", beta=0.1), make_run("high", beta=0.5)]
    for run in runs:
        log(run, [{"step": 1, "loss": 0.5, "rewards/margins": 1.2}])
    found = {curve.key: curve for curve in overlaid([gather(run) for run in runs], ["low", "high"])}
    assert [line.values for line in found["margin"].lines] == [[pytest.approx(12.0)], [pytest.approx(2.4)]]
    assert found["loss"].note == ""


def test_what_means_another_thing_in_each_method_is_not_overlaid(make_run: MakeRun) -> None:
    runs = [gather(make_run("dpo")), gather(make_run("orpo", "orpo"))]
    found = {curve.key: curve for curve in overlaid(runs, ["dpo", "orpo"])}
    assert "margin" not in found
    assert {"accuracy", "drift"} <= found.keys()
    assert found["loss"].note == "Each method has a loss of its own."
    assert "accuracy" not in {c.key for c in overlaid([runs[0], gather(make_run("sft", "sft"))], ["dpo", "sft"])}
