"""The memory of processes: how much one has, the peak of this one, and how it returns what it no longer uses."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import sys
from collections.abc import Iterator
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
    return {NAMES[key]: size / (1 << 20) for key, size in _lines(f"/proc/{pid}/status").items() if key in NAMES}


# OUT_OF_MEMORY: parts of messages for full memory without a MemoryError: from torch, onnxruntime, the loader and threads.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "memoryerror",
    "can't start new thread",
    "failed to map segment",
)


# NO_REASON: what Python says of C code that failed without a reason; under `ulimit -v` it could not make the MemoryError.
NO_REASON = ("returned null without setting an exception", "error return without exception set")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that there is not enough memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    message = str(error).lower()
    if isinstance(error, SystemError) and message.endswith(NO_REASON) and room_in_address_space() is not None:
        return True
    if not isinstance(error, ValueError) and any(part in message for part in OUT_OF_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


# UNUSED_ADDRESSES: addresses that a process takes without using their memory: libraries loaded later, stacks of threads.
UNUSED_ADDRESSES = 1 << 29
CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# FILE: the line of memory.stat with the pages of files that the system may drop, which also count as taken.
FILE = "inactive_file "


def room_bytes(cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> int | None:
    """Bytes that this process may still take under all limits: the machine's memory, `ulimit -v` and those of its containers.

    Args:
        cgroups: where Linux shows the limits of groups of processes.
        own: the file that names the groups of this process.

    Returns:
        None if the system reports no limit.
    """
    rooms = _room_in_cgroups(cgroups, own)
    if (addresses := room_in_address_space()) is not None:
        rooms.append(addresses - UNUSED_ADDRESSES)
    if (total := _lines("/proc/meminfo")).get("MemTotal"):
        taken = int(memory_mib().get("rss", 0) * (1 << 20))
        rooms.append(total["MemTotal"] + total.get("SwapTotal", 0) - taken)
    return max(0, min(rooms)) if rooms else None


def _lines(path: str) -> dict[str, int]:
    """The lines `key: 12 kB` of a file, in bytes."""
    words = [line.replace(":", " ").split() for line in _text(Path(path)).splitlines()]
    return {word[0]: int(word[1]) * 1024 for word in words if len(word) == 3 and word[1].isdigit() and word[2] == "kB"}


def room_in_address_space() -> int | None:
    """Bytes of addresses that `ulimit -v` still leaves this process; None without that limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = taken_addresses()
    return None if limit == resource.RLIM_INFINITY or taken is None else limit - taken


def taken_addresses() -> int | None:
    """Bytes of addresses that this process takes; None where the system does not tell."""
    return _lines("/proc/self/status").get("VmSize")


def _room_in_cgroups(cgroups: Path, own: Path) -> list[int]:
    """The room in this process's group and in those around it, for cgroups 1 and 2; cached file pages count as free."""
    rooms = []
    for top, group, names in memory_groups(cgroups, own):
        for folder in (group, *group.parents):
            limit, taken = (_text(folder / name).strip() for name in names)
            if limit.isdigit() and taken.isdigit():
                cached = [row.split()[1] for row in _text(folder / "memory.stat").splitlines() if row.startswith(FILE)]
                rooms.append(int(limit) - int(taken) + sum(map(int, cached)))
            if folder == top:
                break
    return rooms


def memory_groups(cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> Iterator[tuple[Path, Path, tuple[str, str]]]:
    """The groups that limit this process's memory, of cgroups 1 and 2.

    Yields:
        The folder of the outermost group, the group's own, and the files with its limit and with what it takes.
    """
    for line in _text(own).splitlines():
        _, controllers, inner = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / "memory" if controllers else cgroups
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        yield top, top / inner.strip("/"), names


def _text(path: Path) -> str:
    """A small file's text; empty if it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


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


M_ARENA_MAX = -8  # parameter of glibc's mallopt


def limit_arenas(count: int) -> None:
    """Let all threads of this process share at most this many of glibc's heaps. Without glibc this does nothing.

    By default a thread that has to wait for a heap makes another one, up to eight for each core, and each heap stays as large as
    it once was. In a server of 110 MiB that cost 3 MiB after a long run.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # the C library is another one
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, count)


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
