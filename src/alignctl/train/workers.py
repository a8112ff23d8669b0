"""One function over many chunks, on all cores, in order, with few chunks in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any

from alignctl.errors import MachineError, Problem

# Below this many chunks the work is done before other processes have started.
FEW = 12
_work: Callable[[Any], Any]


def run(work: Callable[[Any], Any], chunks: Iterable[Any]) -> Iterator[Any]:
    """`work` of each chunk, in their order; `work` and what it takes and returns must be picklable.

    Raises:
        MachineError: a process was killed.
    """
    waiting = iter(chunks)
    first = list(islice(waiting, FEW))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(first) < FEW or cores < 2:
        yield from map(work, chain(first, waiting))
        return
    # A forked child would inherit the tokenizer's threads and their locks.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, spawn, initializer=_start, initargs=(work,)) as pool:
        pending: deque[Future[Any]] = deque()
        try:
            for chunk in chain(first, waiting):
                pending.append(pool.submit(_do, chunk))
                if len(pending) > 3 * cores:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            what = "a process that tokenizes rows was killed, most likely for memory"
            raise MachineError(Problem("memory", what, "close other programs, or give the machine more")) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _work = work


def _do(chunk: Any) -> Any:
    return _work(chunk)
