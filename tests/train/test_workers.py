"""Work over many processes: in order, a little ahead, and never hanging. Workers import this file: keep it light."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignctl.errors import MachineError
from alignctl.train import workers


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them from the third chunk on, whatever the machine has."""
    monkeypatch.setattr(workers, "FEW", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def whose(chunk: float) -> tuple[float, int]:
    """Sleeps as long as it is told; and in which process."""
    time.sleep(chunk)
    return chunk, os.getpid()


def together(chunk: tuple[str, int]) -> tuple[int, int]:
    """Waits for a second process to begin, then longer the smaller its number is."""
    folder, number = chunk
    (Path(folder) / str(os.getpid())).touch()
    end = time.monotonic() + 30
    while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3 / (number + 1))
    return number, os.getpid()


def inverse(chunk: int) -> float:
    return 1 / chunk


def die(chunk: int) -> int:
    if chunk == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return chunk


def ignores_interrupts(chunk: int) -> bool:
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


class Counted:
    """Numbers, and how many of them were asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.given = count, 0

    def __iter__(self) -> Iterator[int]:
        for i in range(1, self.count + 1):
            self.given += 1
            yield i


def no_children() -> bool:
    """Whether every process that was started has ended."""
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    return not multiprocessing.active_children()


def test_the_order_is_kept_over_processes(two_processes: None, tmp_path: Path) -> None:
    found = list(workers.run(together, [(str(tmp_path), number) for number in range(30)]))
    assert [number for number, _ in found] == list(range(30))
    assert len({process for _, process in found} - {os.getpid()}) == 2
    assert no_children()


def test_few_chunks_stay_in_this_process(two_processes: None) -> None:
    assert list(workers.run(whose, [0.0, 0.0])) == [(0.0, os.getpid())] * 2
    assert list(workers.run(whose, [])) == []


def test_one_core_stays_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FEW", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert list(workers.run(whose, [0.0] * 5)) == [(0.0, os.getpid())] * 5


@pytest.mark.parametrize("zero", [1, 8])
def test_an_error_in_the_work_reaches_the_caller(two_processes: None, zero: int) -> None:
    chunks = [1] * 12
    chunks[zero] = 0
    found = workers.run(inverse, chunks)
    assert [next(found) for _ in range(zero)] == [1.0] * zero
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert no_children()


def test_an_error_in_the_chunks_reaches_the_caller(two_processes: None) -> None:
    def chunks() -> Iterator[int]:
        yield from [1] * 10
        raise KeyError("broken line")

    with pytest.raises(KeyError, match="broken line"):
        list(workers.run(inverse, chunks()))
    assert no_children()


def test_a_killed_process_is_said_to_be_one(two_processes: None) -> None:
    with pytest.raises(MachineError, match=r"^memory: a process that tokenizes rows was killed") as error:
        list(workers.run(die, range(40)))
    assert error.value.exit_code == 4
    assert no_children()


def test_chunks_are_asked_for_when_they_are_needed(two_processes: None) -> None:
    chunks = Counted(500)
    found = workers.run(inverse, chunks)
    assert chunks.given == 0
    for taken in range(1, 31):
        next(found)
        assert chunks.given <= taken + 3 * 2 + workers.FEW
    found.close()  # type: ignore[attr-defined]
    assert chunks.given < 50
    assert no_children()


def test_a_run_that_is_broken_off_ends_its_processes(two_processes: None) -> None:
    found = workers.run(whose, [0.01] * 100)
    next(found)
    began = time.monotonic()
    found.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 5
    assert no_children()


def test_an_interrupt_is_left_to_this_process(two_processes: None) -> None:
    assert all(workers.run(ignores_interrupts, range(6)))
