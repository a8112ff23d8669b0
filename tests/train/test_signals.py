"""SIGINT and SIGTERM while a run trains."""

from __future__ import annotations

import signal

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignctl.errors import Interrupted
from alignctl.train.guards import Signals

CONTROL = TrainerControl()


def at(step: int, last: int = 1000) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


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
