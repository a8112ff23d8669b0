"""What stops a run, or says what is odd about it, while it trains."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignctl.errors import DivergedError, Interrupted, MachineError
from alignctl.evaluate.generation import Answer
from alignctl.recipe.schema import Recipe
from alignctl.rundir import RunDir, read_json
from alignctl.train import data, fit, guards, machine
from alignctl.train import model as models
from alignctl.train.data import Rows
from alignctl.train.gates import Gates, Result
from alignctl.train.guards import Answers, Finite, Moved, Optimizer, Resumed, Signals, Signs
from alignctl.train.record import NOTE, Checkpoints
from alignctl.train.tokens import Encoder
from alignctl.train.trl_seam import pair_collator

MakeGates = Callable[..., Gates]
CONTROL = TrainerControl()
NAN, INF = math.nan, math.inf


def at(step: int, last: int = 1000) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "checkpoints" / ".writing"), use_cpu=True, logging_steps=1)


@pytest.fixture
def make_rows(
    write_rows: Callable[..., Path], data_recipe: Callable[..., Recipe], encoder: Encoder
) -> Callable[..., Rows]:
    """So many encoded pairs, or rows of an SFT run; row i stands at rows.jsonl:i + 1."""

    def build(count: int = 6, method: str = "dpo") -> Rows:
        given = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No {i}"} for i in range(count)]
        source = {"answer": "chosen"} if method == "sft" else {}
        return data.prepare(data_recipe(method, write_rows(given), source), encoder)[0]

    return build


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


# --- moved --------------------------------------------------------------------------------------------------------


class Adapters(nn.Module):
    """Two adapters as they begin: A random, B zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for layer in "qv":
            self.register_parameter(f"{layer}_lora_A", nn.Parameter(torch.randn(8, 32)))
            self.register_parameter(f"{layer}_lora_B", nn.Parameter(torch.zeros(8, 32)))


def train(
    guard: Moved,
    model: nn.Module,
    change: Callable[[], object],
    steps: Iterable[int],
    *,
    gradients: dict[str, Tensor | None] | None = None,
    rate: float = 1e-3,
    skipped: bool = False,
) -> None:
    """Updates after the given steps, each of which does `change`; a gradient is 1 where none is given."""
    given = TrainingArguments(use_cpu=True)
    scheduler, optimizer = SimpleNamespace(get_last_lr=lambda: [0.0, rate]), SimpleNamespace(step_was_skipped=skipped)
    for step in steps:
        for name, parameter in model.named_parameters():
            parameter.grad = (gradients or {}).get(name, torch.ones_like(parameter))
        guard.on_pre_optimizer_step(given, at(step - 1), CONTROL, model=model, lr_scheduler=scheduler)
        with torch.no_grad():
            change()
        guard.on_step_end(given, at(step), CONTROL, model=model, optimizer=optimizer)


def begun(model: nn.Module, gates: Gates) -> Moved:
    guard = Moved(gates)
    guard.on_train_begin(TrainingArguments(use_cpu=True), at(0), CONTROL, model=model)
    return guard


def add(model: nn.Module, part: str = "", *, by: float = 1e-3) -> Callable[[], None]:
    """An update that adds to every value of the tensors whose name holds `part`."""

    def change() -> None:
        for parameter in [p for name, p in model.named_parameters() if part in name]:
            parameter.add_(by)

    return change


def test_adapters_that_move(make_gates: MakeGates) -> None:
    """At the first update A has no gradient, for B is 0."""
    model, gates = Adapters(), make_gates()
    guard = begun(model, gates)
    train(guard, model, add(model, "lora_B"), [1], gradients={"q_lora_A": None, "v_lora_A": torch.zeros(8, 32)})
    assert gates.results["moved"] == Result("passed", "all 2 trained tensors have moved after 1 update", 2, 2, 1)
    train(guard, model, add(model), range(2, 11))
    assert gates.results["moved"] == Result(
        "passed", "100% of the values of the median tensor have moved after 10 updates", 1.0, 0.5, 10
    )


@pytest.mark.parametrize("before", [0.0, 0.5])
@pytest.mark.parametrize("gradient", [None, torch.zeros(8, 32)])
def test_a_layer_that_is_cut_off_from_the_gradient(
    make_gates: MakeGates, gradient: Tensor | None, before: float
) -> None:
    """Of a new adapter, and of one that was trained before; decay of weights is no gradient."""
    model, gates = Adapters(), make_gates()
    with torch.no_grad():
        model.v_lora_B.add_(before)
    with pytest.raises(
        DivergedError, match=r"gate\.moved: 1 of 2 trained tensors have not moved after 1 update, such as v_lora_B"
    ) as error:
        train(begun(model, gates), model, add(model), [1], gradients={"v_lora_B": gradient})
    assert "training.gradient_checkpointing=false" in str(error.value)
    found = gates.results["moved"]
    assert (found.verdict, found.value, found.limit, found.step) == ("stopped", 1, 2, 1)


def test_of_all_weights_each_is_looked_at(make_gates: MakeGates) -> None:
    model = Model()
    with pytest.raises(DivergedError, match="1 of 2 trained tensors have not moved after 1 update, such as bias"):
        train(begun(model, make_gates()), model, add(model), [1], gradients={"bias": None})


def test_one_value_with_a_gradient_is_enough(make_gates: MakeGates) -> None:
    """As of an embedding, whose rows have one where their token was in the batch; outside of the sample, too."""
    model, gates = nn.ModuleDict({"embed": nn.Embedding(512, 64), "norm": nn.LayerNorm(64)}), make_gates()
    rare = torch.zeros(512, 64)
    rare[3, 7] = 1.0

    def change() -> None:
        model["embed"].weight[3, 7] += 1
        model["norm"].weight.add_(1)

    assert not guards.sample(rare).any()
    train(begun(model, gates), model, change, [1], gradients={"embed.weight": rare})
    assert gates.results["moved"].said == "all 3 trained tensors have moved after 1 update"


def test_an_optimizer_that_moves_other_tensors(make_gates: MakeGates) -> None:
    model = Adapters()
    with pytest.raises(
        DivergedError, match=r"1 of 2 trained tensors have not moved .* such as v_lora_B — .*trl\.optim"
    ):
        train(begun(model, make_gates()), model, lambda: [add(model, "q_")(), add(model, "A")()], [1])


def test_one_value_of_an_adapter_is_enough(make_gates: MakeGates) -> None:
    model, gates = Adapters(), make_gates()
    train(begun(model, gates), model, lambda: [add(model, "q_")(), model.v_lora_B[0, 1].add_(1)], [1])
    assert gates.results["moved"].verdict == "passed" and not guards.sample(model.v_lora_B).any()


def test_nothing_is_trained(make_gates: MakeGates) -> None:
    gates = make_gates()
    with pytest.raises(DivergedError, match=r"gate\.moved: no weight of the model is trained"):
        begun(Adapters().requires_grad_(False), gates)


def test_steps_of_a_warm_up_from_0_do_not_count(make_gates: MakeGates) -> None:
    """Neither the weights nor the gradients of them."""
    model, gates = Adapters(), make_gates()
    guard = begun(model, gates)
    train(guard, model, lambda: None, [1, 2], rate=0.0, gradients={"q_lora_B": None})
    assert gates.results == {}
    train(guard, model, add(model), [3])
    assert gates.results["moved"].step == 3
    still = Adapters()
    with pytest.raises(DivergedError, match="2 of 2 trained tensors have not moved after 1 update"):
        train(begun(still, gates), still, lambda: None, [4])


def test_steps_that_the_loss_scaler_left_out_do_not_count(make_gates: MakeGates) -> None:
    model, gates = Adapters(), make_gates()
    guard = begun(model, gates)
    train(guard, model, lambda: None, range(1, 12), skipped=True, gradients={"q_lora_B": None})
    assert gates.results == {}
    train(guard, model, add(model), [12])
    assert gates.results["moved"].step == 12


def test_only_three_updates_are_looked_at(make_gates: MakeGates) -> None:
    """The gradients at the first alone."""
    model, gates = Adapters(), make_gates()
    guard, steps = begun(model, gates), []
    for step in range(1, 61):
        train(guard, model, add(model), [step], gradients={"q_lora_B": None} if step > 1 else None)
        steps.append(gates.results["moved"].step)
    assert sorted(set(steps)) == [1, 10, 50]


class Short(nn.Module):
    """64 values of 1, of which the first are as many small ones as it is given; in bfloat16."""

    def __init__(self, small: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1e-3] * small + [1.0] * (64 - small), dtype=torch.bfloat16))


def test_bfloat16_weights_that_do_not_move(make_gates: MakeGates) -> None:
    """Beside 1 the next number of bfloat16 is 1 / 128 further; there is a gradient, and it is not blamed."""
    model = Short(0)
    with pytest.raises(DivergedError, match="1 of 1 trained tensors have not moved after 1 update") as error:
        train(begun(model, make_gates()), model, add(model), [1])
    assert "updates round away" in str(error.value) and "checkpointing" not in str(error.value)
    model = Short(0)
    train(begun(model, make_gates()), model, add(model, by=1e-2), [1])


@pytest.mark.parametrize(("small", "moves"), [(31, False), (32, True)])
def test_bfloat16_weights_of_which_most_do_not_move(make_gates: MakeGates, small: int, moves: bool) -> None:
    model, gates = Short(small), make_gates()
    guard = begun(model, gates)
    train(guard, model, add(model, by=1e-4), range(1, 10))
    assert gates.results["moved"].verdict == "passed"
    if moves:
        train(guard, model, add(model, by=1e-4), range(10, 60))
        assert (gates.results["moved"].step, gates.results["moved"].value) == (50, 0.5)
        return
    with pytest.raises(DivergedError, match=r"moved in 48% of their values or fewer after 10 updates — .*float32"):
        train(guard, model, add(model, by=1e-4), [10])
    assert (gates.results["moved"].value, gates.results["moved"].limit) == (0.484, 0.5)


def test_adapters_of_which_only_the_zeros_move(make_gates: MakeGates) -> None:
    """B begins at 0 and moves by any step; A is what rounds."""
    model, gates = Adapters(), make_gates()
    guard = begun(model, gates)
    train(guard, model, add(model, "lora_B"), range(1, 10))
    with pytest.raises(DivergedError, match="moved in 0% of their values or fewer after 10 updates"):
        train(guard, model, add(model, "lora_B"), [10])


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (63, 63), (64, 64), (100, 64), (128, 64), (1000, 64)])
def test_a_sample_is_evenly_spaced_and_a_copy(size: int, kept: int) -> None:
    given = torch.arange(float(size))
    found = guards.sample(given)
    assert found.tolist() == [i * max(1, size // 64) for i in range(kept)]
    given += 1
    assert found[0] == 0


# --- signs --------------------------------------------------------------------------------------------------------


def signs(gates: Gates, method: str = "dpo", *, batch: int = 4, passes: int = 1, **section: Any) -> Signs:
    """For rows whose chosen answers have 3 tokens on average."""
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": [{"path": "p"}]},
            "training": {
                "learning_rate": 1e-4,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": passes,
            },
            method: {"beta": 0.1, **section},
        }
    )
    rows: Any = SimpleNamespace(lengths=lambda name: {"chosen_ids": numpy.array([2, 4])}[name])
    return Signs(recipe, rows, gates)


def log(guard: Signs, args: TrainingArguments, lines: Iterable[dict[str, float]], last: int = 1000) -> None:
    """Log lines of consecutive steps."""
    plain = {"loss": 0.5, "rewards/chosen": 0.0, "logps/chosen": -1.0, "rewards/accuracies": 0.5}
    for step, line in enumerate(lines, 1):
        guard.on_log(args, at(step, last), CONTROL, logs=plain | line)


def test_chosen_answers_that_become_unlikely(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    """A reward of -0.12 is -1.2 nats an answer of 3 tokens; three lines in a row."""
    gates = make_gates()
    guard = signs(gates)
    low, high = {"rewards/chosen": -0.12}, {"rewards/chosen": -0.06}
    log(guard, args, [low, low, high, low, low])
    assert "drift" not in gates.results
    guard.on_log(args, at(6), CONTROL, logs={"loss": 0.5, "rewards/accuracies": 0.5, **low})
    assert gates.results["drift"] == Result(
        "warned", "chosen answers have become unlikelier: -0.40 nats a token", -0.4, -0.3, 6
    )
    log(guard, args, [high] * 3)
    assert gates.results["drift"].verdict == "warned" and len(said) == 1 and "higher beta" in said[0]


def test_a_little_less_likely_is_usual(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates()
    guard = signs(gates)
    log(guard, args, [{"rewards/chosen": -0.089}] * 9)
    guard.on_train_end(args, at(9), CONTROL)
    assert gates.results["drift"] == Result("passed", "chosen answers: -0.30 nats a token", -0.297, -0.3) and not said


def test_orpo_is_held_against_its_first_line(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates = make_gates()
    guard = signs(gates, "orpo")
    log(guard, args, [{"logps/chosen": value} for value in (-9.0, -9.25, -9.25, -9.25)])
    guard.on_train_end(args, at(4), CONTROL)
    assert (gates.results["drift"].verdict, gates.results["drift"].value) == ("passed", -0.25)
    log(signs(gates, "orpo"), args, [{"logps/chosen": value} for value in (-2.0, -2.25, -2.35, -2.35, -2.4)])
    assert gates.results["drift"] == Result(
        "warned", "chosen answers have become unlikelier: -0.40 nats a token", -0.4, -0.3, 5
    )


def test_the_way_out_of_orpo_is_no_key_of_dpo(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    log(signs(make_gates(), "orpo"), args, [{"logps/chosen": value} for value in (-2.0, -3.0, -3.0, -3.0)])
    assert len(said) == 1 and said[0].endswith(" — a lower learning rate holds them")


RIGHT = {"rewards/accuracies": 1.0}


def test_pairs_that_are_told_apart_at_once(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates()
    guard = signs(gates)
    log(guard, args, [RIGHT] * 2, 30)
    assert "easy" not in gates.results
    log(guard, args, [{"rewards/accuracies": 0.75}, *[RIGHT] * 2], 30)
    assert "easy" not in gates.results
    log(signs(gates), args, [RIGHT] * 3, 30)
    found = gates.results["easy"]
    assert (found.verdict, found.said) == ("warned", "all of 12 pairs in a row were told apart by step 3 of 30")
    assert len(said) == 1 and "alignctl check" in said[0]
    guard.on_train_end(args, at(30), CONTROL)
    assert gates.results["easy"].verdict == "warned"


@pytest.mark.parametrize(
    ("batch", "passes", "lines", "last", "warns"),
    [
        (4, 1, 3, 29, False),  # step 3 is beyond a tenth of 29
        (3, 1, 3, 30, False),  # 9 pairs say little
        (3, 1, 4, 40, True),
        (2, 2, 3, 30, True),
        (1, 1, 11, 120, False),
        (1, 1, 12, 120, True),
    ],
)
def test_how_early_and_how_many(
    args: TrainingArguments, make_gates: MakeGates, batch: int, passes: int, lines: int, last: int, warns: bool
) -> None:
    gates = make_gates()
    guard = signs(gates, batch=batch, passes=passes)
    log(guard, args, [RIGHT] * lines, last)
    guard.on_train_end(args, at(last, last), CONTROL)
    assert gates.results["easy"].verdict == ("warned" if warns else "passed")


def test_a_log_line_may_stand_for_several_steps(args: TrainingArguments, make_gates: MakeGates) -> None:
    args.logging_steps, gates = 5, make_gates()
    guard = signs(gates, batch=1)
    for step in (5, 10, 15):
        guard.on_log(args, at(step, 150), CONTROL, logs={"loss": 0.5, "rewards/chosen": 0.0, **RIGHT})
    assert gates.results["easy"].said.startswith("all of 15 pairs in a row")


def ended(gates: Gates, args: TrainingArguments, losses: list[float], method: str = "dpo", **section: Any) -> None:
    guard = signs(gates, method, **section)
    log(guard, args, [{"loss": loss} for loss in losses])
    guard.on_train_end(args, at(len(losses)), CONTROL)


@pytest.mark.parametrize(
    ("losses", "verdict", "loss"),
    [
        ([0.4] * 15 + [0.6951, 0.6971] * 2 + [0.6961], "warned", 0.6961),  # 0.003 above ln 2
        ([0.4] * 15 + [0.6891] * 5, "warned", 0.6891),
        ([0.4] * 15 + [0.7] * 5, "passed", 0.7),
        ([0.69] * 15 + [0.5] * 5, "passed", 0.5),
        ([0.69] * 16 + [0.49] * 4, "passed", 0.53),  # (0.69 + 4 * 0.49) / 5
        ([0.6931] * 19, "passed", 0.6931),  # too short to tell
    ],
)
def test_a_loss_that_ends_at_ln_2(
    args: TrainingArguments, make_gates: MakeGates, losses: list[float], verdict: str, loss: float
) -> None:
    gates = make_gates()
    ended(gates, args, losses)
    found = gates.results["noise"]
    assert (found.verdict, found.value) == (verdict, loss) and f"the loss ended at {loss:.4f}" in found.said
    assert (found.limit == 0.6931) and ("ln 2" in found.said) is (verdict == "warned")


def test_ln_2_means_nothing_to_other_losses(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates = make_gates(noise=True)
    ended(gates, args, [0.6931] * 20, "orpo")
    ended(gates, args, [0.6931] * 20, loss_type="ipo")
    ended(gates, args, [0.6931] * 20, loss_type=["sigmoid", "sft"])
    assert "noise" not in gates.results and gates.results["easy"].verdict == "passed"


def test_no_log_line_is_no_loss(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates = make_gates()
    ended(gates, args, [])
    assert gates.results["noise"] == Result("passed", "not measured: nothing was logged")


def test_lines_that_are_no_log_of_training(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates = make_gates()
    guard = signs(gates)
    for logs in ({"eval_loss": 0.5, "eval_rewards/chosen": -9.0}, {"train_loss": 0.5}, {"loss": 0.5, "entropy": 1.0}):
        guard.on_log(args, at(1), CONTROL, logs=logs)
    assert gates.results == {}


def test_signs_that_are_switched_off(args: TrainingArguments, make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates(drift=False, easy=False, noise=False)
    guard = signs(gates)
    log(guard, args, [{"loss": 0.6931, "rewards/chosen": -9.0, **RIGHT}] * 20)
    guard.on_train_end(args, at(20), CONTROL)
    assert {found.verdict for found in gates.results.values()} == {"off"} and not said


# --- answers ------------------------------------------------------------------------------------------------------


def answers(text: str, ended: int = 4) -> list[Answer]:
    """Four answers, of which so many end."""
    return [Answer(text, len(text.split()), i < ended) for i in range(4)]


FRESH, LOOPS = "one two three four five", "tea tea tea tea tea"  # 4 of 4 and 1 of 4 pairs of words are new


def test_answers_that_repeat_themselves(make_gates: MakeGates, said: list[str]) -> None:
    gates = make_gates()
    guards.collapse(answers(FRESH), answers(LOOPS), gates, 7)
    found = gates.results["answers"]
    assert (found.verdict, found.value, found.limit, found.step) == ("warned", 0.25, 0.5, 7)
    assert found.said == "100% of 4 answers end, and 25% of their word pairs are new; before training 100% and 100%"
    assert len(said) == 1 and "samples.jsonl" in said[0]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (answers(FRESH), answers(FRESH), "passed"),
        (answers(LOOPS), answers(LOOPS), "passed"),  # they did so before
        (answers("a a a b a"), answers("a a a a b"), "passed"),  # from 3 of 4 to 2 of 4, which is enough
        (answers("a a a a b c"), answers("a a a a a a"), "warned"),  # from 3 of 5 to 1 of 5
        (answers(FRESH, 4), answers(FRESH, 2), "warned"),
        (answers(FRESH, 4), answers(FRESH, 3), "passed"),
        (answers(FRESH, 0), answers(FRESH, 0), "passed"),
        (answers(FRESH, 0), answers(FRESH, 4), "passed"),
    ],
)
def test_what_answers_did_before(
    make_gates: MakeGates, before: list[Answer], after: list[Answer], verdict: str
) -> None:
    gates = make_gates()
    guards.collapse(before, after, gates)
    assert gates.results["answers"].verdict == verdict


def test_answers_are_asked_for_at_every_evaluation(args: TrainingArguments, make_gates: MakeGates) -> None:
    gates, given = make_gates(), [answers(FRESH), answers(LOOPS)]
    guard = Answers(lambda: given.pop(0), answers(FRESH), gates)
    guard.on_evaluate(args, at(5), CONTROL)
    assert (gates.results["answers"].verdict, gates.results["answers"].step) == ("passed", 5)
    guard.on_evaluate(args, at(10), CONTROL)
    assert (gates.results["answers"].verdict, gates.results["answers"].step) == ("warned", 10)


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


# --- signals ------------------------------------------------------------------------------------------------------


def test_a_second_signal_stops_at_once(args: TrainingArguments) -> None:
    signals = Signals()
    with signals.caught():
        signals.on_train_begin(args, at(6), CONTROL)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted) as error:
            signal.raise_signal(signal.SIGINT)
    assert error.value.exit_code == 130


def test_outside_of_the_steps_a_signal_stops_at_once(args: TrainingArguments) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted), Signals().caught():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_between_steps_a_signal_saves_and_stops(args: TrainingArguments) -> None:
    signals, control = Signals(), TrainerControl()
    signals.on_step_end(args, at(6), control)
    assert not control.should_save
    signals.received = signal.SIGINT
    signals.on_step_end(args, at(6), control)
    assert control.should_save and control.should_training_stop


def test_checkpoints_appear_whole_and_the_oldest_goes_last(tmp_path: Path, args: TrainingArguments) -> None:
    run, model = RunDir(tmp_path), Model()
    (tmp_path / "metrics.jsonl").touch()
    callback = Checkpoints(run, keep=2)
    for step in (1, 2, 10):
        written = Path(args.output_dir) / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "weights").write_text("x")
        callback.on_save(args, at(step), CONTROL, model=model)
    assert [path.name for path in run.checkpoints()] == ["step-2", "step-10"]
    note = read_json(tmp_path / "checkpoints" / "step-10" / NOTE)
    assert (note["step"], note["trained"]) == (10, models.trained_fingerprint(model))
    (Path(args.output_dir) / "checkpoint-11").mkdir()
    callback.tidy()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-2"]


@pytest.mark.parametrize(
    ("where", "dtype", "found"),
    [
        (machine.Machine("cuda", "GPU", True), "auto", torch.bfloat16),
        (machine.Machine("cuda", "GPU", False), "auto", torch.float32),
        (machine.Machine("cuda", "GPU", False), "float16", torch.float16),
        (machine.Machine("cpu", "CPU", False), "auto", torch.float32),
        (machine.Machine("cpu", "CPU", True), "bfloat16", torch.bfloat16),
    ],
)
def test_precision(where: machine.Machine, dtype: str, found: torch.dtype) -> None:
    assert where.precision(dtype) == found


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float16")])
def test_precision_that_the_machine_has_not(kind: str, dtype: str) -> None:
    with pytest.raises(MachineError, match=r"model\.dtype") as error:
        machine.Machine(kind, "an old one", False).precision(dtype)
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    ("foreign", "said"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file"),
            "the disk is full",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "CUDA out of memory"),
        (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), "cannot be reached"),
    ],
)
def test_foreign_errors_become_ours(tmp_path: Path, foreign: Exception, said: str) -> None:
    with pytest.raises(MachineError, match=said), fit.translated(RunDir(tmp_path)):
        raise foreign


def test_a_bug_stays_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), fit.translated(RunDir(tmp_path)):
        raise RuntimeError("boom")
