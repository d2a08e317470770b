"""Where the results of units lie: a folder for each, which appears complete or not at all."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.bundle.staging import Kind, staged
from gemma_edge.errors import InputError
from gemma_edge.files import nearest_existing, write_whole
from gemma_edge.sweep.units import RECORD, Unit, compute

UNIT = Kind("unit", "finished unit of a sweep", lambda folder: (folder / RECORD).is_file())
UNITS = "units"  # folder of the store in that of a sweep, where no other is named
CACHED = "sweep"  # kind of folder in the user's cache, of results that came from elsewhere
Record = Mapping[str, Any]  # kind, key, what, result, cpu_s, seconds, peak_rss_bytes, node


@dataclass(frozen=True)
class Store:
    """A folder that every node sees under the same path."""

    root: Path

    def place(self, unit: Unit) -> Path:
        """The folder of a unit."""
        return self.root / unit.kind / unit.key

    def record(self, unit: Unit) -> Record | None:
        """What a finished unit found; None: it is not finished."""
        try:
            record: Record = json.loads((self.place(unit) / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record

    def make(self, unit: Unit, node: str) -> Record:
        """Do a unit's work in this process, and keep the result; `node` says where that is.

        Raises:
            InputError, ChildFailed: see `compute`.
        """
        inputs = {kind: self.place(other) for kind, other in unit.after.items()}
        before, began = _cpu_s(), time.monotonic()
        try:
            with staged(self.place(unit), force=False, kind=UNIT) as work:
                folder = work / UNIT.folder
                result = compute(unit, folder, inputs)
                record = {
                    "kind": unit.kind,
                    "key": unit.key,
                    "what": unit.what,
                    "result": result,
                    "cpu_s": _cpu_s() - before,
                    "seconds": time.monotonic() - began,
                    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                    "node": node,
                }
                write_whole(folder / RECORD, json.dumps(record, indent=1))
        except InputError:
            there = self.record(unit)  # another sweep was faster
            if there is None:
                raise
            return there
        return record

    @property
    def shared(self) -> list[Path]:
        """Paths that every node must see."""
        return [self.root]

    def fetch(self, unit: Unit) -> None:
        """Have a finished unit's folder on this machine: it is there."""

    def check(self) -> None:
        """Refuse a folder that cannot be written to.

        Raises:
            InputError: with the reason.
        """
        try:
            write_probe(self.root)
        except OSError as error:
            raise InputError(
                f"`store` {self.root} cannot be written to: {error.strerror}",
                field="store",
                value=self.root,
                hint="give a folder that can",
            ) from None


def write_probe(folder: Path) -> None:
    """Try to write into a folder, or into the one that it would be made in; nothing stays.

    Raises:
        OSError: that is not possible.
    """
    probe = nearest_existing(folder) / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()


def _cpu_s() -> float:
    """Processor seconds of this process and of the children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
