"""What stops a run whose weights do not move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignctl.errors import DivergedError
from alignctl.train import guards
from alignctl.train.gates import Gates, Result
from alignctl.train.guards import Moved

MakeGates = Callable[..., Gates]
CONTROL = TrainerControl()


def at(step: int, last: int = 1000) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


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
    model = nn.Linear(2, 1)
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
