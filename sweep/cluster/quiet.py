"""Keeps a machine quiet while something is timed on it: two locks that all sweeps of a user on this machine share.

Ordinary work holds the first lock together with other work; a benchmark holds it alone. Whoever comes takes the second lock for
the moment of asking, and a benchmark keeps it while it waits, so that no new work passes it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_edge.errors import InputError
from gemma_edge.user_cache import is_own

VARIABLE = "GEMMA_EDGE_QUIET"


def _folder() -> Path:
    """Where the locks lie: on this machine, never on a disk that others share."""
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"gemma-edge-quiet-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(folder.lstat()):
        raise InputError(f"{folder} belongs to somebody else; set {VARIABLE} to a folder of your own on this machine")
    return folder


@contextmanager
def working(alone: bool, *, beside: bool = False) -> Iterator[None]:
    """Hold the machine, alone or beside other work, while the block runs. The system lets go when the process ends.

    Args:
        alone: nothing else runs beside it.
        beside: this is a part of work that runs already, which a benchmark that waits is waiting for: it passes the benchmark.
    """
    folder = _folder()
    with (folder / "busy").open("w") as busy, (folder / "door").open("w") as door:
        if not beside:
            fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(busy, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
