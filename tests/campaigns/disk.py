"""Exports to disks that become full: refused in one line, nothing left behind, the bundle before it whole.

Every other try runs under a limit of the size of one file (`ulimit -f`), the others on a small file system in memory, short of
bytes or of inodes. Where nobody may mount one, all run under the limit.

    PYTHONPATH=tests .venv/bin/python -m campaigns.disk --tries 40 --seed 7
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gemma_edge.export.api
from campaigns import exports
from campaigns.campaign import Campaign, main


@contextlib.contextmanager
def small_disk(at: Path, size: int, files: int) -> Iterator[bool]:
    """A file system of so many bytes and inodes at a folder; False where it cannot be mounted."""
    options = f"size={size},nr_inodes={files}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(at)], check=True)


def limit_files(most: int | None) -> None:
    """Let an export find out only while it writes that there is no room; `most`: for a file, in bytes."""
    gemma_edge.export.api.check_disk = lambda *args: None  # type: ignore[attr-defined]
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def run(campaign: Campaign, tries: int) -> None:
    """Sizes from nothing to what a whole export takes, in random order."""
    with exports.place() as folder:
        previous, here = folder / "previous", folder / "here"
        assert exports.wait(exports.start(folder / "stderr", lambda: exports.make(previous, bits=4))) == 0
        largest = max(path.stat().st_size for path in previous.iterdir())
        total = sum(path.stat().st_size for path in previous.iterdir())
        points = [(index + campaign.random.random()) / tries for index in range(tries)]
        for index, point in enumerate(points):
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            on_disk = index % 2 == 1
            # the bundle before, the checkpoint and the new bundle, which has twice the bits
            size = int(total * (1.02 + 5 * point)) if on_disk else 1 << 30
            with small_disk(here, size, int(14 + 40 * point) if index % 8 == 3 else 0) as mounted:
                out = here / "out"
                if index % 4:
                    shutil.copytree(previous, out)
                limit = None if on_disk and mounted else int(2 * largest * point)
                outcome, what = exports.one_limited(folder, out, partial(limit_files, limit))
            place = f"file system of {size}" if limit is None else f"files up to {limit}"
            campaign.tried(outcome, f"{place} bytes: {what}")


if __name__ == "__main__":
    main("disk", run, tries=40)
