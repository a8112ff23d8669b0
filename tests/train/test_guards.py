"""What stops a run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignctl.errors import DivergedError, Interrupted, MachineError
from alignctl.rundir import RunDir
from alignctl.train import fit, machine
from alignctl.train.guards import Finite, Signals
from alignctl.train.record import Checkpoints

STATE, CONTROL = TrainerState(global_step=6), TrainerControl()


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "checkpoints" / ".writing"), use_cpu=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_update(args: TrainingArguments, value: float) -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0, value]])
    with pytest.raises(DivergedError, match=r"step 7: the gradient's norm is (nan|inf)") as error:
        Finite().on_pre_optimizer_step(args, STATE, CONTROL, model=model)
    assert error.value.exit_code == 5


def test_float16_may_search_for_its_loss_scale(args: TrainingArguments) -> None:
    args.fp16 = True
    guard, model = Finite(), torch.nn.Linear(2, 1)
    for value in [float("inf")] * 15 + [1.0] + [float("inf")] * 20:
        model.weight.grad = torch.tensor([[1.0, value]])
        guard.on_pre_optimizer_step(args, STATE, CONTROL, model=model)
    with pytest.raises(DivergedError):
        guard.on_pre_optimizer_step(args, STATE, CONTROL, model=model)


def test_finite_gradients_pass(args: TrainingArguments) -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    Finite().on_pre_optimizer_step(args, STATE, CONTROL, model=model)


def test_a_second_signal_stops_at_once(args: TrainingArguments) -> None:
    signals = Signals()
    with signals.caught():
        signals.on_train_begin(args, STATE, CONTROL)
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
    signals.on_step_end(args, STATE, control)
    assert not control.should_save
    signals.received = signal.SIGINT
    signals.on_step_end(args, STATE, control)
    assert control.should_save and control.should_training_stop


def test_checkpoints_appear_whole_and_the_oldest_goes_last(tmp_path: Path, args: TrainingArguments) -> None:
    run = RunDir(tmp_path)
    callback = Checkpoints(run, keep=2)
    for step in (1, 2, 10):
        written = Path(args.output_dir) / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "weights").write_text("x")
        callback.on_save(args, TrainerState(global_step=step), CONTROL)
    assert [path.name for path in run.checkpoints()] == ["step-2", "step-10"]
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
