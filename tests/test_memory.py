"""What a process gives back, and how much it may take."""

from __future__ import annotations

import errno
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import DEMO
from support.commands import COMMAND, refused, run

from gemma_edge import memory
from gemma_edge.export import disk
from gemma_edge.memory import is_out_of_memory, room_bytes

# 200 MB in pieces below malloc's threshold for pages of their own, every second one freed
FRAGMENTED = """
from gemma_edge.memory import give_back
def resident_mib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
pieces = [bytearray(100_000) for _ in range(2000)]
del pieces[::2]
before = resident_mib()
give_back()
print(before - resident_mib(), len(pieces))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: memory is read on Linux only")
def test_freed_memory_between_blocks_in_use_goes_back_to_the_system() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can be told to")
    done = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[0]) > 80


LOCKED = """
import ctypes, mmap, sys
from pathlib import Path
from gemma_edge.memory import MappedTable
path = Path(sys.argv[1])
file = path.open("rb")
view = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
whole = sum(view[::4096])
library = ctypes.CDLL(None)
address = next(line.split("-")[0] for line in open("/proc/self/maps") if str(path) in line)
library.mlock(ctypes.c_void_p(int(address, 16)), ctypes.c_size_t(1 << 22))  # a part, as much as a user may lock
def file_mib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssFile")).split()[1]) / 1024
before = file_mib()
table = MappedTable(path)
released = before - file_mib()
same = sum(view[::4096]) == whole
table.count(MappedTable.RELEASE_AFTER - 1)
kept = before - file_mib()
table.count(1)
print(released, same, kept, before - file_mib())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mapped memory is released on Linux only")
def test_a_mapped_files_pages_are_released_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mapped file"
    path.write_bytes(bytes(range(256)) * (1 << 17))  # 32 MiB
    command = [sys.executable, "-c", LOCKED, str(path.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    at_first, same, kept, after_some_tokens = done.stdout.split()
    assert float(at_first) > 28 and same == "True"
    assert float(kept) < 4 and float(after_some_tokens) > 28


ANOTHERS = """
import ctypes, mmap, sys
from pathlib import Path
from gemma_edge.memory import MappedTable
path = Path(sys.argv[1])
file = path.open("rb")
mapping = ctypes.CDLL(None).mmap
mapping.restype, mapping.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
size = path.stat().st_size
address = mapping(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
table = MappedTable(path)  # as a second model of the same file would make it; the first is gone then
fixed = 0x10
assert mapping(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, 0) == address
ctypes.memset(address, 7, size)
table.count(MappedTable.RELEASE_AFTER)
print(set(ctypes.string_at(address, size)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mapped memory is released on Linux only")
def test_memory_where_the_file_was_mapped_before_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-c", ANOTHERS, str(path.resolve())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "{7}"


GROUPS = {
    "version 2": ("0::/box/inner\n", "", "memory.max", "memory.current"),
    "version 1": (
        "7:cpu:/box\n4:memory:/box/inner\n0::/\n",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
    ),
    "seen from inside": ("0::/not/shown/here\n", "", "memory.max", "memory.current"),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_the_room_is_that_of_the_tightest_container(kind: str, tmp_path: Path) -> None:
    text, top, limit, current = GROUPS[kind]
    own, groups = tmp_path / "own", tmp_path / "groups"
    own.write_text(text)
    for folder, size in (("box", "1000"), ("box/inner", "max"), (".", "1200" if kind == "seen from inside" else "max")):
        (groups / top / folder).mkdir(parents=True, exist_ok=True)
        (groups / top / folder / limit).write_text(f"{size}\n")
        (groups / top / folder / current).write_text("700\n")
        (groups / top / folder / "memory.stat").write_text("active_file 5\ninactive_file 20\n")
    assert room_bytes(groups, own) == (520 if kind == "seen from inside" else 320)


def test_without_a_limit_the_room_is_the_machines(tmp_path: Path) -> None:
    room = room_bytes(tmp_path, tmp_path / "none")
    assert room is None or room > 100 << 20


def test_an_export_that_the_system_would_end_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container with less memory than the plan says, the export was killed in the middle without a message."""
    monkeypatch.setattr(disk, "room_bytes", lambda: 100 << 20)
    monkeypatch.setattr(disk, "memory_mib", lambda: {"rss": 20.0})
    refused(run(DEMO, "-o", tmp_path / "out"), "not enough memory for the export", "this process may take 0.12 GiB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is enforced on Linux only")
@pytest.mark.parametrize("mib", [300, 1500])
def test_a_command_under_a_tight_ulimit_is_one_line(mib: int, tmp_path: Path) -> None:
    """The command ended in a traceback from an import, or torch aborted while it was loaded."""
    command = [*COMMAND, str(DEMO), "-o", str(tmp_path / "out")]
    limited = ["sh", "-c", f'ulimit -v {mib << 10} && exec "$@"', "sh", *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    (line,) = done.stderr.splitlines()
    assert "memory" in line or "ulimit -v" in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
)  # fmt: skip
def test_full_memory_is_distinguished_from_a_bug(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("cannot allocate memory to a partition"))


def test_what_python_says_where_it_could_not_make_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `ulimit -v` an export ended in such a SystemError, sometimes inside torch's own error."""
    wrapped = RuntimeError("could not export")
    wrapped.__cause__ = SystemError("<method f> returned NULL without setting an exception")
    for error in (SystemError("error return without exception set"), wrapped):
        monkeypatch.setattr(memory, "room_in_address_space", lambda: 5)
        assert is_out_of_memory(error)
        monkeypatch.setattr(memory, "room_in_address_space", lambda: None)
        assert not is_out_of_memory(error), "without a limit it is a bug"
