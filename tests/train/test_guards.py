"""What stops a run while it trains: numbers that are not finite, an optimizer or a checkpoint of other weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignctl.errors import DivergedError
from alignctl.recipe.schema import Recipe
from alignctl.train import guards
from alignctl.train import model as models
from alignctl.train.data import Rows
from alignctl.train.gates import Gates, Result
from alignctl.train.guards import Finite, Moved, Optimizer, Resumed, Signs
from alignctl.train.trl_seam import pair_collator

MakeGates = Callable[..., Gates]
CONTROL = TrainerControl()
NAN, INF = math.nan, math.inf


def at(step: int, last: int = 1000) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


# --- finite -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Gives the log-probabilities that it was told to give."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2))
        self.log_probs = torch.zeros(0)

    def forward(self, **given: Tensor) -> Any:
        return SimpleNamespace(log_probs=self.log_probs)


def read(model: Model, rows: Rows, numbers: list[int], *, broken: dict[tuple[int, int], float] | None = None) -> None:
    """One forward pass of pairs, chosen rows first, with these log-probabilities at these places."""
    batch = pair_collator(0)([rows.encoded(i) for i in numbers])
    model.log_probs = torch.full((2 * len(numbers), batch["input_ids"].shape[1] - 1), -1.0)
    for place, value in (broken or {}).items():
        model.log_probs[place] = value
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def update(guard: Finite, args: TrainingArguments, model: Model, gradient: float = 1.0, step: int = 0) -> None:
    """What the Trainer calls before the update after `step` others."""
    model.weight.grad = torch.tensor([[1.0, gradient]])
    guard.on_pre_optimizer_step(args, at(step), CONTROL, model=model)


@pytest.mark.parametrize(
    ("place", "named"), [((0, 0), "rows.jsonl:1"), ((1, 3), "rows.jsonl:5"), ((4, 2), "rows.jsonl:5")]
)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_whose_forward_pass_is_not_finite_is_named(
    make_rows: Callable[..., Rows], make_gates: MakeGates, value: float, place: tuple[int, int], named: str
) -> None:
    """Of rows 1, 5 and 3 either side: places 0 to 2 are the chosen answers, 3 to 5 the rejected ones."""
    model, rows, gates = Model(), make_rows(), make_gates()
    Finite(model, rows, gates)
    read(model, rows, [0, 4, 2])
    with pytest.raises(DivergedError, match=rf"log-probabilities of {named} are not finite") as error:
        read(model, rows, [0, 4, 2], broken={place: value})
    assert error.value.exit_code == 5 and "training.learning_rate" in str(error.value)
    assert gates.results["finite"].verdict == "stopped"


def test_all_rows_that_are_not_finite_are_named(make_rows: Callable[..., Rows], make_gates: MakeGates) -> None:
    model, rows = Model(), make_rows()
    Finite(model, rows, make_gates())
    with pytest.raises(DivergedError, match=r"of rows\.jsonl:1, rows\.jsonl:3 are not finite"):
        read(model, rows, [0, 4, 2], broken={(5, 1): NAN, (0, 0): INF})


def test_of_many_rows_eight_are_named(make_rows: Callable[..., Rows], make_gates: MakeGates) -> None:
    model, rows = Model(), make_rows(12)
    Finite(model, rows, make_gates())
    with pytest.raises(DivergedError, match=r"rows\.jsonl:7, rows\.jsonl:8 and 3 more are not finite"):
        read(model, rows, list(range(11)), broken={(i, 0): NAN for i in range(11)})


def test_rows_of_a_supervised_run(make_rows: Callable[..., Rows], make_gates: MakeGates) -> None:
    model, rows = Model(), make_rows(3, "sft")
    Finite(model, rows, make_gates())
    ids = torch.tensor([rows.encoded(1)["input_ids"] + [0, 0]])
    model.log_probs = torch.full((1, ids.shape[1] - 1), NAN)
    with pytest.raises(DivergedError, match=r"of rows\.jsonl:2 are"):
        model(input_ids=ids, attention_mask=(ids != 0).long())
    assert guards.sequences(rows, 1) == [tuple(rows.encoded(1)["input_ids"])]


def test_both_sides_of_a_pair(make_rows: Callable[..., Rows]) -> None:
    rows = make_rows()
    row = rows.encoded(2)
    assert guards.sequences(rows, 2) == [
        tuple(row["prompt_ids"] + row["chosen_ids"]),
        tuple(row["prompt_ids"] + row["rejected_ids"]),
    ]


def test_rows_that_are_not_in_the_data(make_rows: Callable[..., Rows], make_gates: MakeGates) -> None:
    model = Model()
    Finite(model, make_rows(), make_gates())
    model.log_probs = torch.full((1, 2), NAN)
    with pytest.raises(DivergedError, match="of rows that are not in the data are"):
        model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3))


def test_evaluations_and_references_are_not_looked_at(make_rows: Callable[..., Rows], make_gates: MakeGates) -> None:
    model, rows = Model(), make_rows()
    Finite(model, rows, make_gates())
    with torch.no_grad():
        read(model, rows, [0], broken={(0, 0): NAN})
    model.eval()
    read(model, rows, [0], broken={(0, 0): NAN})
    model.train()
    with pytest.raises(DivergedError):
        read(model, rows, [0], broken={(0, 0): NAN})


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_gradient_that_is_not_finite_names_the_rows_of_its_update(
    args: TrainingArguments, make_rows: Callable[..., Rows], make_gates: MakeGates, value: float
) -> None:
    """Two forward passes to an update; the rows of the update before are no suspects."""
    model, rows, gates = Model(), make_rows(), make_gates()
    guard = Finite(model, rows, gates)
    read(model, rows, [5])
    update(guard, args, model)
    read(model, rows, [0, 3])
    read(model, rows, [4])
    with pytest.raises(DivergedError, match=r"gate\.finite: the gradient's norm is (nan|inf), ") as error:
        update(guard, args, model, value)
    said = str(error.value)
    assert "its rows: rows.jsonl:1, rows.jsonl:4, rows.jsonl:5 — " in said and error.value.exit_code == 5
    assert gates.results["finite"].said in said


def test_the_step_of_a_run_that_goes_on(
    args: TrainingArguments, make_rows: Callable[..., Rows], make_gates: MakeGates
) -> None:
    gates, model = make_gates(), Model()
    guard = Finite(model, make_rows(), gates)
    guard.on_train_begin(args, at(6), CONTROL)
    with pytest.raises(DivergedError):
        update(guard, args, model, NAN, step=6)
    assert gates.results["finite"].step == 7


def test_float16_may_search_for_its_loss_scale(
    args: TrainingArguments, make_rows: Callable[..., Rows], make_gates: MakeGates
) -> None:
    args.fp16 = True
    model = Model()
    guard = Finite(model, make_rows(), make_gates())
    for value in [INF] * 15 + [1.0] + [INF] * 20:
        update(guard, args, model, value)
    with pytest.raises(DivergedError, match="the gradient's norm is inf"):
        update(guard, args, model, INF)


def test_finite_gradients_pass(args: TrainingArguments, make_rows: Callable[..., Rows], make_gates: MakeGates) -> None:
    model, gates = Model(), make_gates()
    update(Finite(model, make_rows(), gates), args, model)
    assert gates.results == {}


def looked_at(step: int, last: int, *, saves: bool, gates: Gates, rows: Rows, args: TrainingArguments) -> bool:
    """Whether a NaN in the weights is found after `step` steps."""
    model = Model()
    guard = Finite(model, rows, gates)
    model.bias.data[1] = NAN
    try:
        guard.on_step_end(args, at(step, last), TrainerControl(should_save=saves), model=model)
    except DivergedError as error:
        assert "gate.finite: 1 of 2 trained tensors are not finite, such as bias" in str(error)
        assert gates.results["finite"].value == 1 and gates.results["finite"].step == step
        return True
    return False


def test_weights_are_looked_at_now_and_then(
    args: TrainingArguments, make_rows: Callable[..., Rows], make_gates: MakeGates
) -> None:
    """After steps 1, 10 and 50, before a checkpoint is written, and after the last step."""
    given: dict[str, Any] = {"gates": make_gates(), "rows": make_rows(), "args": args}
    found = [step for step in range(1, 60) if looked_at(step, 100, saves=False, **given)]
    assert found == [1, 10, 50]
    assert looked_at(3, 100, saves=True, **given) and looked_at(7, 7, saves=False, **given)


def test_finite_weights_pass(args: TrainingArguments, make_rows: Callable[..., Rows], make_gates: MakeGates) -> None:
    model, gates = Model(), make_gates()
    guard = Finite(model, make_rows(), gates)
    guard.on_step_end(args, at(10), CONTROL, model=model)
    assert (gates.results["finite"].verdict, gates.results["finite"].step) == ("passed", 10)


def test_frozen_weights_are_not_looked_at(
    args: TrainingArguments, make_rows: Callable[..., Rows], make_gates: MakeGates
) -> None:
    model = Model()
    model.bias.requires_grad_(False)[1] = INF
    Finite(model, make_rows(), make_gates()).on_step_end(args, at(1), CONTROL, model=model)


def test_finite_weights_whose_norm_overflows(
    args: TrainingArguments, make_rows: Callable[..., Rows], make_gates: MakeGates
) -> None:
    """A square of 1e30 is more than float32 holds."""
    model = Model()
    model.weight.data[:] = 1e30
    with pytest.raises(
        DivergedError, match="2 of 2 trained tensors are so large that their norm is not finite, such as"
    ):
        Finite(model, make_rows(), make_gates()).on_step_end(args, at(1), CONTROL, model=model)


# --- trainable: the optimizer -------------------------------------------------------------------------------------


def test_the_optimizer_holds_all_that_is_trained(args: TrainingArguments, make_gates: MakeGates) -> None:
    model, gates = Model(), make_gates()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}]
    guard = Optimizer(gates)
    guard.on_train_begin(args, at(0), CONTROL, model=model, optimizer=torch.optim.SGD(groups, lr=0.1))
    some = torch.optim.SGD([model.weight], lr=0.1)
    with pytest.raises(
        DivergedError, match=r"gate\.trainable: the optimizer lacks 1 of 2 .* such as bias — trl\.optim"
    ):
        guard.on_train_begin(args, at(0), CONTROL, model=model, optimizer=some)
    assert (gates.results["trainable"].value, gates.results["trainable"].limit) == (1, 2)
    model.bias.requires_grad_(False)
    guard.on_train_begin(args, at(0), CONTROL, model=model, optimizer=some)


def test_an_optimizer_of_copies(args: TrainingArguments, make_gates: MakeGates) -> None:
    """Weights that were cast behind its back are others than those that it updates."""
    model = Model()
    copies = torch.optim.SGD([p.detach().clone() for p in model.parameters()], lr=0.1)
    with pytest.raises(DivergedError, match="lacks 2 of 2 trained tensors, such as weight"):
        Optimizer(make_gates()).on_train_begin(args, at(0), CONTROL, model=model, optimizer=copies)


# --- resume: weights ----------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_weights_of_its_checkpoint(args: TrainingArguments, make_gates: MakeGates) -> None:
    model, gates = Model(), make_gates()
    trained = models.trained_fingerprint(model)
    guard = Resumed({"step": 4, "trained": trained}, gates)
    guard.on_train_begin(args, at(4), CONTROL, model=model)
    assert gates.results["resume"] == Result(
        "passed", "goes on from step 4 with its weights and rows", trained[:16], step=4
    )
    with pytest.raises(DivergedError, match=r"gate\.resume: what was loaded is not the checkpoint of step 4"):
        guard.on_train_begin(args, at(3), CONTROL, model=model)
    model.bias.data[0] += 1e-6
    with pytest.raises(DivergedError) as error:
        guard.on_train_begin(args, at(4), CONTROL, model=model)
    assert "remove its folder" in str(error.value) and gates.results["resume"].limit == trained[:16]


def test_a_checkpoint_that_says_nothing_of_itself(args: TrainingArguments, make_gates: MakeGates) -> None:
    with pytest.raises(DivergedError, match="the checkpoint of step None"):
        Resumed({}, make_gates()).on_train_begin(args, at(4), CONTROL, model=Model())


# --- which are there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "switches", "there"),
    [
        ("dpo", {}, [Finite, Optimizer, Moved, Signs]),
        ("orpo", {"moved": False}, [Finite, Optimizer, Signs]),
        ("sft", {}, [Finite, Optimizer, Moved]),
        ("sft", {"finite": False, "trainable": False, "moved": False}, []),
    ],
)
def test_what_watches_a_run(
    make_rows: Callable[..., Rows],
    make_gates: MakeGates,
    data_recipe: Callable[..., Recipe],
    method: str,
    switches: dict[str, bool],
    there: list[type],
) -> None:
    trainer: Any = SimpleNamespace(model=Model())
    recipe = data_recipe(method, Path("unused.jsonl"))
    found = guards.callbacks(trainer, recipe, make_rows(method=method), make_gates(**switches))
    assert [type(each) for each in found] == there
