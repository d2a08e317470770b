"""The memory of a process, the most that this one ever held, and giving back what it no longer uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

NAMES = {"VmRSS": "rss", "RssAnon": "anon", "RssFile": "file", "VmHWM": "peak"}


def memory_mib(pid: int | str = "self") -> dict[str, float]:
    """Resident set of a process, its parts and its peak, in MiB; {} when the process has gone, or without /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {NAMES[key]: int(value.split()[0]) / 1024 for key, value in pairs if key in NAMES}


def peak_rss_mib() -> float:
    """Peak resident memory in MiB; 0 where the system does not tell (Windows)."""
    # not getrusage: there Linux counts what the parent held before exec
    if (peak := memory_mib().get("peak")) is not None:
        return peak
    if sys.platform == "win32":
        return 0.0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def give_back() -> None:
    """Return freed memory to the system. Only glibc can be told to; it keeps what is free between blocks in use."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


MADV_DONTNEED = 4  # Linux': of a mapped file, pages that are read again when they are needed


def release(path: Path) -> None:
    """Let the system take back what this process has read of a mapped file and locked in memory; nothing but on Linux."""
    if sys.platform != "linux":
        return
    library, real = ctypes.CDLL(None), str(path.resolve())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, access, _, _, _, *name = line.split(maxsplit=5)
        if name == [real] and "w" not in access:
            start, end = (int(address, 16) for address in addresses.split("-"))
            library.munlock(ctypes.c_void_p(start), ctypes.c_size_t(end - start))
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


class MappedTable:
    """A mapped model file of which each token needs one row of the embedding table, and little else.

    The system maps up to a megabyte around each row: without end, all of the file. So its pages are let go now and then.
    """

    RELEASE_AFTER = 128  # tokens

    def __init__(self, path: Path) -> None:
        """Let go what loading has read."""
        self._path, self._since = path, 0
        release(path)

    def count(self, tokens: int) -> None:
        """Rows of so many tokens were read."""
        self._since += tokens
        if self._since >= self.RELEASE_AFTER:
            # addresses are not kept: another model of the same file may have gone, and they be somebody else's memory
            release(self._path)
            self._since = 0
