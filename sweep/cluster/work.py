"""What a node does with a unit. This module is what Dask calls on a node."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma_edge.sweep.cluster import process
from gemma_edge.sweep.cluster.helpers import helpers
from gemma_edge.sweep.cluster.quiet import working
from gemma_edge.sweep.cluster.store import Record, Store
from gemma_edge.sweep.units import BENCH, CORES, EVALUATE, GPU, JUDGE, LOWER, MERGE, QUANTIZE, RAM, REFERENCE, Unit

WITH_TORCH = (MERGE, QUANTIZE, LOWER, REFERENCE, EVALUATE, JUDGE)


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
    if unit.job.split:
        unit = replace(unit, job=replace(unit.job, helpers=_helpers(unit, sweep)))
    threads = int(unit.needs.get(CORES, 1)) if unit.kind in WITH_TORCH else None
    with working(alone=unit.kind == BENCH):
        return process.in_process(partial(store.make, unit, process.name()), sweep, threads, gpu=GPU in unit.needs)


def _helpers(unit: Unit, sweep: str) -> Callable[[], AbstractContextManager[Any]]:
    from distributed import get_worker

    worker = get_worker()
    needs = {name: unit.needs[name] for name in (CORES, RAM)}
    return partial(helpers, worker.scheduler.address, worker.address, sweep, needs)


def sees(path: Path) -> bool:
    """Whether this node has something at a path."""
    return path.exists()
