"""What the benchmark scripts share: a child process measured by the operating system, the machine's description, tables.

The resident set counts file pages a process has mapped and touched; the kernel can drop those under pressure. The anonymous
part, which it cannot, is sampled separately. Linux only: reads /proc.
"""

from __future__ import annotations

import json
import os
import platform
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

SAMPLE_S = 0.1
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")


@dataclass(frozen=True)
class Usage:
    """What a finished command has used."""

    returncode: int
    wall_s: float
    cpu_s: float
    peak_rss_mib: float  # the largest single process
    peak_anon_mib: float  # sampled, all processes of the command together

    def then(self, later: Usage) -> Usage:
        """The two as stages of one job."""
        return Usage(
            self.returncode or later.returncode,
            self.wall_s + later.wall_s,
            self.cpu_s + later.cpu_s,
            max(self.peak_rss_mib, later.peak_rss_mib),
            max(self.peak_anon_mib, later.peak_anon_mib),
        )


def memory_mib(pid: int | str = "self") -> dict[str, float]:
    """Resident set of a process and its parts, from /proc; empty when the process has gone."""
    names = {"VmRSS": "rss", "RssAnon": "anon", "RssFile": "file", "VmHWM": "peak"}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {names[key]: int(value.split()[0]) / 1024 for key, value in pairs if key in names}


def _tree(pid: int) -> list[int]:
    """A process and everything below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            found += _tree(int(child))
    return found


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
    """Run a command to its end with both outputs in `log`; the peak and the CPU time are the kernel's own."""
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


class Foreign:
    """How many cores other processes kept busy, and the host took away, while something ran here."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.busy = self._busy()
        self.own = self._own()

    @staticmethod
    def _busy() -> float:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        used = os.times()
        return used.user + used.system + used.children_user + used.children_system

    def cores(self) -> float:
        """Cores not ours since the start; call it after the children were waited for."""
        share = (self._busy() - self.busy - (self._own() - self.own)) / (time.perf_counter() - self.start)
        return max(0.0, share)


def machine() -> dict[str, Any]:
    """What a reader must know of the machine; nothing that identifies it."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in reversed(info.splitlines()) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    present = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.machine()),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages installed here; absent ones are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def warm(path: Path) -> None:
    """Read a file or folder once, so that every contender finds its input in the page cache."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as data:
                while data.read(1 << 24):
                    pass


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range, as a table cell."""
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
    """Machine, versions and settings, one line each."""
    return "\n".join(f"{key}: {', '.join(v) if isinstance(v, list) else v}" for key, v in facts.items())


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write the raw figures, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
