"""Units that compute nothing, for tests of nodes and of the order of work.

`FakeStore` does what units' keys say, in the processes of real nodes; `FakeNodes` answer in the process of the test.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from gemma_edge.files import write_whole
from gemma_edge.sweep.cluster.nodes import Node
from gemma_edge.sweep.cluster.store import Record, Store
from gemma_edge.sweep.units import RECORD, Unit


class FakeStore(Store):
    """`killed-...` kills its own process, `slow-...` takes a moment, `endless` never ends. All write down that they began."""

    def make(self, unit: Unit, node: str) -> Record:
        """See Store."""
        with (self.root / "begun").open("a") as begun:
            begun.write(f"{unit.key} {os.getpid()} {node}\n")
        if unit.key.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600 if unit.key == "endless" else 0.3 if unit.key.startswith("slow") else 0)
        seen = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
        record: dict[str, Any] = {"result": seen, "node": node, "cpu_s": 0.0}
        self.place(unit).mkdir(parents=True, exist_ok=True)
        write_whole(self.place(unit) / RECORD, json.dumps(record))
        return record

    def begun(self) -> list[tuple[str, int, str]]:
        """Key, process and node of every attempt."""
        path = self.root / "begun"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(key, int(pid), node) for key, pid, node in map(str.split, lines)]


class Done:
    """A future that has ended."""

    def __init__(self, value: object) -> None:
        self._value = value
        self.status = "error" if isinstance(value, Exception) else "finished"

    def add_done_callback(self, call: Callable[[Any], None]) -> None:
        threading.Thread(target=call, args=(self,)).start()

    def done(self) -> bool:
        return True

    def result(self) -> object:
        return self._value

    def exception(self) -> object:
        return self._value

    def cancel(self) -> None:
        pass


class FakeNodes:
    """Nodes that answer with what a test prepared, unit by unit and attempt by attempt."""

    def __init__(
        self,
        store: Store,
        failures: Mapping[str, Sequence[Exception]],
        results: Callable[[Unit], dict[str, Any]] = lambda unit: {},
    ) -> None:
        self._store, self._failures = store, {key: list(errors) for key, errors in failures.items()}
        self._results = results
        self.started: list[tuple[str, int, list[str]]] = []
        self.offers: dict[str, float] = {"cores": 4}

    def now(self) -> list[Node]:
        return [Node("tcp://a", "a", self.offers)]

    def taken(self, unit: Unit, future: Done) -> object:
        return future.result()

    def start(self, unit: Unit, attempt: int, avoid: Collection[str]) -> Done:
        self.started.append((unit.key, attempt, sorted(avoid)))
        if self._failures.get(unit.key):
            return Done(self._failures[unit.key].pop(0))
        record = {"result": self._results(unit), "node": "a", "cpu_s": 1.0}
        self._store.place(unit).mkdir(parents=True)
        write_whole(self._store.place(unit) / RECORD, json.dumps(record))
        return Done(record)
