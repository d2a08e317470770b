"""What a process gives back."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

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
