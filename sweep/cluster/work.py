"""What a node does with a unit: a process of its own for each, forked from one that has loaded torch already.

A process of its own can be killed for its memory without taking the node along, has a number of threads of its own, and ends when
the sweep does. This module is what Dask calls on a node.
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
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO

from gemma_edge.bench.process import ChildFailed
from gemma_edge.errors import InputError, one_line
from gemma_edge.sweep.cluster.quiet import working
from gemma_edge.sweep.cluster.store import Record, Store
from gemma_edge.sweep.units import BENCH, CORES, EVALUATE, JUDGE, LOWER, QUANTIZE, REFERENCE, Unit

# LOADED: modules that the process which is forked has loaded. Loading them takes seconds, and a unit often takes less. The first
# one is the program itself, which every unit would load again otherwise.
LOADED = (
    "__main__",
    "gemma_edge.export.api",
    "gemma_edge.export.onnx.lowering",
    "gemma_edge.evaluate.evaluate",
    "gemma_edge.evaluate.folder_model",
)
WITH_TORCH = (QUANTIZE, LOWER, REFERENCE, EVALUATE, JUDGE)
LOG_BYTES = 20_000  # of a failed unit's output that are kept
_running: dict[int, str] = {}  # process -> the sweep that it works for


class UnitFailed(RuntimeError):
    """A unit failed: why, in one line; whether another attempt may succeed; what it printed; the node's address."""

    def __init__(self, reason: str, again: bool, log: str, address: str) -> None:
        super().__init__(reason, again, log, address)
        self.reason, self.again, self.log, self.address = reason, again, log, address


def run_unit(unit: Unit, store: Store, sweep: str) -> Record:
    """Do a unit's work, unless it is done, in a process of its own.

    Args:
        unit: its inputs are in the store.
        store: where the result goes.
        sweep: for `stop`.

    Raises:
        UnitFailed: it cannot be done, or its process died.
    """
    if (record := store.record(unit)) is not None:
        return record
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    with working(alone=unit.kind == BENCH):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(unit, store, theirs, dict(os.environ)), daemon=False)
        process.start()
        theirs.close()
        assert process.pid is not None
        _running[process.pid] = sweep
        try:
            try:
                done, value, printed = ours.recv()
            except EOFError:
                process.join()
                raise UnitFailed(_death(process.exitcode), True, "", _address()) from None
            process.join()
        finally:
            del _running[process.pid]
            ours.close()
    if done is None:
        finished: Record = value
        return finished
    raise UnitFailed(value, done, printed, _address())


def _address() -> str:
    """The node that this code runs on, as Dask names it."""
    from distributed import get_worker

    return str(get_worker().address)


def _death(status: int | None) -> str:
    if status is not None and status < 0:
        return f"its process was killed by signal {-status}" + (", probably for its memory" if status == -9 else "")
    return f"its process ended with status {status}"


def stop(sweep: str) -> int:
    """End the processes that work for a sweep on this node; how many there were."""
    ended = [pid for pid, other in list(_running.items()) if other == sweep]
    for pid in ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(ended)


def _child(unit: Unit, store: Store, pipe: Connection, environment: Mapping[str, str]) -> None:
    """The process of a unit; `environment` is the node's, which may have changed since the process that is forked began."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; the sweep decides what to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger().handlers.clear()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        if unit.kind in WITH_TORCH:
            import torch

            torch.set_num_threads(int(unit.needs.get(CORES, 1)))
        answer: tuple[bool | None, object, str]
        try:
            answer = (None, store.make(unit, node()), "")
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


def node() -> str:
    """A name of this node for people: the machine, and the process that represents it."""
    parent = multiprocessing.parent_process()
    return f"{platform.node()}:{parent.pid if parent is not None else os.getpid()}"


def sees(path: Path) -> bool:
    """Whether this node has something at a path."""
    return path.exists()
