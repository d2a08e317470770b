"""Runs units in the order of what they need, each once; tries again what may succeed elsewhere; keeps count."""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Future
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from gemma_edge.errors import one_line
from gemma_edge.sweep.cluster.nodes import Nodes
from gemma_edge.sweep.cluster.process import UnitFailed
from gemma_edge.sweep.cluster.store import Record, Store
from gemma_edge.sweep.units import RAM, Unit

POLL_S = 2.0  # how often it is looked whether a node can still do what waits
GRACE_S = 20.0  # how long a unit waits for a node that offers what it needs, before its row says so


@dataclass(frozen=True)
class Outcome:
    """How a unit ended."""

    unit: Unit
    record: Record | None  # None: it failed
    failure: str = ""  # why, in one line
    log: str = ""  # what it printed then

    @property
    def result(self) -> dict[str, Any]:
        """The figures of a unit that did not fail."""
        assert self.record is not None, self.failure
        found: dict[str, Any] = self.record["result"]
        return found


@dataclass
class _Attempt:
    """A unit that is running, or waits for a node."""

    unit: Unit
    number: int = 0
    avoid: set[str] = field(default_factory=set)  # nodes where it failed
    future: Future | None = None
    lonely_since: float | None = None  # since when no node offers what it needs


class Runner:
    """Runs units on nodes."""

    def __init__(self, nodes: Nodes, store: Store, retries: int) -> None:
        self._nodes, self._store, self._retries = nodes, store, retries
        self._attempts: dict[str, _Attempt] = {}
        self._waiting: dict[str, Unit] = {}
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.outcomes: dict[str, Outcome] = {}
        self.computed: Counter[str] = Counter()  # by kind
        self.reused: Counter[str] = Counter()  # by kind: found in the store
        self.repeated = 0  # attempts after a first one

    def run(self, units: Iterable[Unit], then: Callable[[Outcome], Sequence[Unit]]) -> None:
        """Run units and those that they need.

        Args:
            units: to begin with.
            then: called for each outcome once; returns units to run now.
        """
        todo = list(units)
        while True:
            while todo:
                todo += self._add(todo.pop(0), then)
            if not self._attempts:
                return
            todo += self._step(then)

    def _add(self, unit: Unit, then: Callable[[Outcome], Sequence[Unit]]) -> list[Unit]:
        """Begin with a unit if it can begin; the units that follow from what is known at once."""
        if unit.id in self.outcomes or unit.id in self._attempts:
            return []
        if (record := self._store.record(unit)) is not None:
            self.reused[unit.kind] += 1
            followers = self._finish(Outcome(unit, record), then)
            # what it was made from is not needed any more, but its figures belong to the row where they are there
            kept = [other for other in unit.after.values() if self._store.record(other) is not None]
            return [*kept, *followers]
        before = [self.outcomes.get(other.id) for other in unit.after.values()]
        if failed := next((one for one in before if one is not None and one.record is None), None):
            return self._finish(Outcome(unit, None, failed.failure), then)
        if any(one is None for one in before):
            self._waiting[unit.id] = unit
            return [other for other in unit.after.values() if other.id not in self._waiting]
        attempt = self._attempts[unit.id] = _Attempt(unit)
        self._start(attempt)
        return []

    def _start(self, attempt: _Attempt) -> None:
        future = attempt.future = self._nodes.start(attempt.unit, attempt.number, attempt.avoid)
        future.add_done_callback(lambda done, name=attempt.unit.id: self._ended.put(name))

    def _finish(self, outcome: Outcome, then: Callable[[Outcome], Sequence[Unit]]) -> list[Unit]:
        unit = outcome.unit
        self.outcomes[unit.id] = outcome
        self._waiting.pop(unit.id, None)
        ready = [other for other in self._waiting.values() if any(need.id == unit.id for need in other.after.values())]
        for other in ready:
            del self._waiting[other.id]
        return [*then(outcome), *ready]

    def _step(self, then: Callable[[Outcome], Sequence[Unit]]) -> list[Unit]:
        """Wait until an attempt ends, or it is time to look at the nodes."""
        try:
            name = self._ended.get(timeout=POLL_S)
        except queue.Empty:
            return [unit for outcome in self._lonely() for unit in self._finish(outcome, then)]
        attempt = self._attempts.get(name)
        if attempt is None or attempt.future is None or not attempt.future.done():
            return []  # of an attempt before
        outcome = self._ended_with(attempt, attempt.future)
        if outcome is None:
            self._start(attempt)
            return []
        del self._attempts[name]
        return self._finish(outcome, then)

    def _ended_with(self, attempt: _Attempt, future: Future) -> Outcome | None:
        """The outcome of an attempt; None: it is tried again."""
        unit = attempt.unit
        if future.status == "finished":
            self.computed[unit.kind] += 1
            return Outcome(unit, self._nodes.taken(unit, future))
        error = future.exception() if future.status == "error" else None
        reason, again, log = _reason(error)
        if not again or attempt.number >= self._retries or isinstance(error, KilledWorker):
            tries = attempt.number + 1
            return Outcome(unit, None, reason if not again else f"{reason} ({tries} attempts)", log)
        attempt.number += 1
        self.repeated += 1
        if isinstance(error, UnitFailed):
            attempt.avoid.add(error.address)
        return None

    def _lonely(self) -> list[Outcome]:
        """Outcomes of units that no node can do, and could not for a while."""
        nodes, now, given_up = self._nodes.now(), time.monotonic(), []
        for attempt in list(self._attempts.values()):
            needs = attempt.unit.needs
            if any(node.offers(needs) for node in nodes):
                attempt.lonely_since = None
                continue
            attempt.lonely_since = attempt.lonely_since or now
            if now - attempt.lonely_since >= GRACE_S:
                del self._attempts[attempt.unit.id]
                if attempt.future is not None:
                    attempt.future.cancel()
                given_up.append(Outcome(attempt.unit, None, f"no node offers {_spelled(needs)}"))
        return given_up


def _spelled(needs: Any) -> str:
    words = [
        f"{amount / 2**30:.1f} GiB of memory" if name == RAM else f"{name} {amount:g}" for name, amount in needs.items()
    ]
    return ", ".join(words)


def _reason(error: BaseException | None) -> tuple[str, bool, str]:
    """Why an attempt failed, whether another one may succeed, and what it printed."""
    if isinstance(error, KilledWorker):
        return "every node that worked on it was lost", True, ""
    if error is None or isinstance(error, FutureCancelledError):
        return "its node was lost", True, ""
    if isinstance(error, UnitFailed):
        return error.reason, error.again, error.log
    return f"{type(error).__name__}: {one_line(error)}", True, ""  # type: ignore[arg-type]
