"""What a benchmark must know of the machine it runs on: a description, read bandwidth, energy counters, other processes.

Linux tells all of this; on another system, what is not known is left out. Processes' memory is memory.py's, phones are adb.py's.
"""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# FLAGS: the instruction sets that matter for speed; a description names those that the processor has.
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
# READ_BYTES: how much memory is read to measure its bandwidth: more than any cache holds, and less than a Raspberry Pi has.
READ_BYTES = 1 << 29
PROC, SYS = Path("/proc"), Path("/sys")


def describe() -> dict[str, Any]:
    """What a reader must know of this machine. Nothing in it identifies the machine. Units are in the names."""
    fields = _cpuinfo()
    present = fields.get("flags", fields.get("Features", "")).split()
    facts: dict[str, Any] = {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": os.cpu_count(),
    }
    if "SC_PHYS_PAGES" in os.sysconf_names:
        facts["ram_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    governor = _text(SYS / "devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return facts if governor is None else {**facts, "governor": governor}


def state() -> dict[str, float]:
    """What changes during a measurement: temperature, clock, battery, load."""
    zones = [_text(zone) for zone in SYS.glob("class/thermal/thermal_zone*/temp")]
    clocks = [_text(clock) for clock in SYS.glob("devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")]
    levels = [_text(level) for level in SYS.glob("class/power_supply/BAT*/capacity")]
    readings = {
        "temperature_c": max((int(zone) / 1000 for zone in zones if zone), default=None),
        "cpu_mhz": max((int(clock) / 1000 for clock in clocks if clock), default=None),
        "battery_percent": min((float(level) for level in levels if level), default=None),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    return {name: value for name, value in readings.items() if value is not None}


def read_gb_per_s(threads: int, *, size: int = READ_BYTES, passes: int = 5) -> float:
    """How fast `threads` threads together read memory: the best of several passes.

    Args:
        threads: how many threads share the bytes.
        size: bytes that are read in one pass.
        passes: how often they are read.

    Returns:
        1e9 bytes per second.
    """
    # a wide type and a cheap operation: reading limits the speed, not computing
    parts = np.array_split(np.ones(size // 8, np.uint64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return size / best / 1e9


class Energy:
    """The processor's own energy counters (RAPL), all packages together. Idle power and other processes are included."""

    def __init__(self, root: Path = SYS / "class/powercap") -> None:
        # only whole packages: the zones of cores and uncore are parts of them
        self._zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._last = self._read()

    @property
    def source(self) -> str | None:
        """Where the figures come from; None where there are no counters, or only root may read them."""
        return "RAPL packages" if self._last else None

    def joules(self) -> float:
        """Joules since the last call, or since this object was made; 0 without a source."""
        now = self._read()
        used = 0
        for zone, value in now.items():
            step = value - self._last.get(zone, value)
            used += step if step >= 0 else step + int(_text(zone / "max_energy_range_uj") or 0)
        self._last = now
        return used / 1e6

    def _read(self) -> dict[Path, int]:
        values = {zone: _text(zone / "energy_uj") for zone in self._zones}
        return {zone: int(value) for zone, value in values.items() if value is not None}


class OtherProcesses:
    """How many cores other processes kept busy, or the host took away, since this object was made. Linux only."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.busy = self._busy()
        self.own = self._own()

    @staticmethod
    def _busy() -> float | None:
        text = _text(PROC / "stat")
        if text is None:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, text.split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        used = os.times()
        return used.user + used.system + used.children_user + used.children_system

    def cores(self) -> float | None:
        """Cores that were busy with other work than this process and its children; None where the system does not tell.

        Call it when the children have been waited for: only then is their time known.
        """
        busy = self._busy()
        if busy is None or self.busy is None:
            return None
        share = (busy - self.busy - (self._own() - self.own)) / (time.perf_counter() - self.start)
        return max(0.0, share)


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    lines = (_text(PROC / "cpuinfo") or "").splitlines()
    pairs = (line.split(":", 1) for line in reversed(lines) if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _text(path: Path) -> str | None:
    """The text of one of the kernel's files; None where it is missing or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
