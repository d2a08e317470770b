"""A process of its own for each piece of work, forked from one that has loaded torch already.

It can be killed for its memory without taking the node along, has a number of threads of its own, and ends when the sweep does.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import IO, TypeVar

from gemma_edge.bench.process import ChildFailed
from gemma_edge.errors import InputError, one_line

# LOADED: modules that the process which is forked has loaded. Loading them takes seconds, and a unit often takes less. The first
# one is the program itself, which every unit would load again otherwise.
LOADED = (
    "__main__",
    "gemma_edge.export.api",
    "gemma_edge.export.onnx.lowering",
    "gemma_edge.evaluate.evaluate",
    "gemma_edge.evaluate.folder_model",
)
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"  # variable that CUDA and ROCm heed
LOG_BYTES = 20_000  # of a failed unit's output that are kept
Value = TypeVar("Value")
_running: dict[int, str] = {}  # process -> the sweep that it works for


class UnitFailed(RuntimeError):
    """A unit failed: why, in one line; whether another attempt may succeed; what it printed; the node's address."""

    def __init__(self, reason: str, again: bool, log: str, address: str) -> None:
        super().__init__(reason, again, log, address)
        self.reason, self.again, self.log, self.address = reason, again, log, address


def in_process(work: Callable[[], Value], sweep: str, threads: int | None, *, gpu: bool = False) -> Value:
    """Do some work in a process of its own.

    Args:
        work: can be pickled.
        sweep: for `stop`.
        threads: of torch; None: it is not used.
        gpu: whether it sees the machine's GPU.

    Raises:
        UnitFailed: it cannot be done, or its process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    environment = {**os.environ, **({} if gpu else {VISIBLE_GPUS: ""})}
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, threads, theirs, environment), daemon=False)
    process.start()
    theirs.close()
    assert process.pid is not None
    _running[process.pid] = sweep
    try:
        try:
            failed, value, printed = ours.recv()
        except EOFError:
            process.join()
            raise UnitFailed(_death(process.exitcode), True, "", own_address()) from None
        process.join()
    finally:
        del _running[process.pid]
        ours.close()
    if failed is None:
        result: Value = value
        return result
    raise UnitFailed(value, failed, printed, own_address())


def own_address() -> str:
    """The node that this code runs on, as Dask names it."""
    from distributed import get_worker

    return str(get_worker().address)


def name() -> str:
    """The node that this code runs on, for people: the machine, and the process that represents it."""
    return f"{platform.node()}:{os.getpid()}"


def stop(sweep: str) -> int:
    """End the processes that work for a sweep on this node; how many there were."""
    ended = [pid for pid, other in list(_running.items()) if other == sweep]
    for pid in ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(ended)


def _death(status: int | None) -> str:
    if status is not None and status < 0:
        return f"its process was killed by signal {-status}" + (", probably for its memory" if status == -9 else "")
    return f"its process ended with status {status}"


def _child(work: Callable[[], object], threads: int | None, pipe: Connection, environment: Mapping[str, str]) -> None:
    """The process; `environment` is the node's, which may have changed since the process that is forked began.

    It sends (None, result, ""), or for a failure (whether another attempt may succeed, why, what was printed).
    """
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; the sweep decides what to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger().handlers.clear()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        answer: tuple[bool | None, object, str]
        try:
            answer = (None, work(), "")
        except InputError as error:
            answer = (False, str(error), _printed(log))
        except ChildFailed as error:
            answer = (True, str(error), _printed(log))
        except Exception as error:
            pipe.send((True, f"{type(error).__name__}: {one_line(error)}", _printed(log) + traceback.format_exc()))
            raise
        pipe.send(answer)


def _printed(log: IO[str]) -> str:
    sys.stdout.flush()
    sys.stderr.flush()
    log.seek(0)
    return log.read()[-LOG_BYTES:]


def _end_with_parent() -> None:
    """End this process when the node's process has ended, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
