"""A store whose units do what their keys say instead of computing: for tests of nodes, whose processes import this module."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from gemma_edge.files import write_whole
from gemma_edge.sweep.cluster.store import Record, Store
from gemma_edge.sweep.units import RECORD, Unit


class FakeStore(Store):
    """`killed-...` kills its own process, `slow-...` takes a moment, `endless` never ends. All write down that they began."""

    def make(self, unit: Unit, node: str) -> Record:
        """See Store."""
        import json

        with (self.root / "begun").open("a") as begun:
            begun.write(f"{unit.key} {os.getpid()} {node}\n")
        if unit.key.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600 if unit.key == "endless" else 0.3 if unit.key.startswith("slow") else 0)
        record: dict[str, Any] = {"result": {}, "node": node, "cpu_s": 0.0}
        self.place(unit).mkdir(parents=True, exist_ok=True)
        write_whole(self.place(unit) / RECORD, json.dumps(record))
        return record

    def begun(self) -> list[tuple[str, int, str]]:
        """Key, process and node of every attempt."""
        path = self.root / "begun"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(key, int(pid), node) for key, pid, node in map(str.split, lines)]
