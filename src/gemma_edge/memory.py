"""The memory of processes: how much one has, the peak of this one, and how it returns what it no longer uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

# NAMES: a key of /proc/PID/status -> its name in `memory_mib`.
NAMES = {"VmRSS": "rss", "RssAnon": "anon", "RssFile": "file", "VmHWM": "peak"}


def memory_mib(pid: int | str = "self") -> dict[str, float]:
    """The resident memory of a process in MiB: `rss`, its parts `anon` and `file`, and its `peak`.

    Args:
        pid: of the process; "self" for this one.

    Returns:
        {} when the process has ended, or where the system has no /proc.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {NAMES[key]: int(value.split()[0]) / 1024 for key, value in pairs if key in NAMES}


def peak_rss_mib() -> float:
    """The peak of this process's resident memory in MiB; 0 where the system does not tell (Windows)."""
    # On Linux getrusage would also count what the parent process had before it started this program.
    if (peak := memory_mib().get("peak")) is not None:
        return peak
    if sys.platform == "win32":
        return 0.0
    import resource

    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def give_back() -> None:
    """Return freed memory to the system. Without this, glibc keeps the free memory between blocks that are in use.

    Other C libraries cannot be asked to do it.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # the C library is another one
            ctypes.CDLL(None).malloc_trim(0)


# MADV_DONTNEED: Linux's advice to drop pages of a mapped file, which are read again when they are needed.
MADV_DONTNEED = 4


def release(path: Path) -> None:
    """Take the pages of a mapped file out of this process's memory, locked ones included. Works on Linux only.

    The file stays mapped: a page that is needed later is read again.
    """
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
    """A mapped model file from which each token reads one row of the embedding table, and little else.

    The system loads up to a megabyte around each row, so that in the end the whole file would be in memory. Therefore its pages
    are released now and then.
    """

    # RELEASE_AFTER: after how many tokens the pages are released.
    RELEASE_AFTER = 128

    def __init__(self, path: Path) -> None:
        """Release what loading has read."""
        self._path, self._since = path, 0
        release(path)

    def count(self, tokens: int) -> None:
        """Tell that the rows of so many tokens were read. Releases the pages when it is time."""
        self._since += tokens
        if self._since >= self.RELEASE_AFTER:
            # The addresses are looked up each time. Remembered ones could belong to other memory by now: where two models map
            # the same file, one of them may have been closed.
            release(self._path)
            self._since = 0
