"""What a process gives back."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

# 200 MB in pieces below malloc's threshold for pages of their own, every second one freed
FRAGMENTED = """
from gemma_edge.runtimes.memory import give_back
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
