"""The most memory this process ever held, and giving back what it no longer uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path


def peak_rss_mib() -> float:
    """Peak resident memory in MiB; 0 where the system does not tell (Windows)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not getrusage: there Linux counts what the parent held before exec
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def give_back() -> None:
    """Return freed memory to the system. Only glibc can be told to; it keeps what is free between blocks in use."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
