"""The most memory this process ever held."""

from __future__ import annotations

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
