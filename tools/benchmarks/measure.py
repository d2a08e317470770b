"""What the benchmark scripts share: a child process measured by the operating system, the machine's description, tables.

The resident set includes pages of mapped files, which the kernel can drop when memory is short. The anonymous part, which
it cannot drop, is sampled separately. Works on Linux only, because it reads /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from gemma_edge.bench.machine import describe as describe_machine
from gemma_edge.bench.machine import state
from gemma_edge.files import write_whole
from gemma_edge.memory import memory_mib

# SAMPLE_S: how often the anonymous memory is read.
SAMPLE_S = 0.1


@dataclass(frozen=True)
class Usage:
    """The time and memory that a finished command has used."""

    returncode: int
    wall_s: float
    cpu_s: float
    peak_rss_mib: float  # of its largest process
    peak_anon_mib: float  # of all its processes together, sampled

    def then(self, later: Usage) -> Usage:
        """The usage of two commands that run one after the other."""
        return Usage(
            self.returncode or later.returncode,
            self.wall_s + later.wall_s,
            self.cpu_s + later.cpu_s,
            max(self.peak_rss_mib, later.peak_rss_mib),
            max(self.peak_anon_mib, later.peak_anon_mib),
        )


def _tree(pid: int) -> list[int]:
    """A process and all processes below it."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            pids += _tree(int(child))
    return pids


class _AnonPeak(threading.Thread):
    """Samples the anonymous memory of a process tree until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak = 0.0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(SAMPLE_S):
            self.peak = max(self.peak, sum(memory_mib(pid).get("anon", 0.0) for pid in _tree(self.pid)))


def run_measured(command: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, and write both its outputs to `log`. The kernel tells the peak and the CPU time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w") as out:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        sampler = _AnonPeak(process.pid)
        sampler.start()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        sampler.stopped.set()
        sampler.join()
    return Usage(
        returncode=process.returncode,
        wall_s=time.perf_counter() - start,
        cpu_s=used.ru_utime + used.ru_stime,
        peak_rss_mib=used.ru_maxrss / 1024,
        peak_anon_mib=sampler.peak,
    )


def machine() -> dict[str, Any]:
    """What a reader must know of the machine, and the date."""
    return {**describe_machine(), **state(), "date": datetime.now(UTC).date().isoformat()}


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages; one that is not installed is left out."""
    installed = {}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def warm(path: Path) -> None:
    """Read a file or folder once, so that every contender finds its input in the page cache."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as data:
                while data.read(1 << 24):
                    pass


def spread(values: Sequence[float], digits: int = 1) -> str:
    """A table cell: the median and the range."""
    if not values:
        return "-"
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def describe(facts: Mapping[str, Any]) -> str:
    """Facts such as machine, versions and settings, one on each line."""
    return "\n".join(f"{key}: {', '.join(v) if isinstance(v, list) else v}" for key, v in facts.items())


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write the figures to a file, if there is one."""
    if path is not None:
        write_whole(path, json.dumps(data, indent=1) + "\n")
