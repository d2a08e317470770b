"""The user's cache: folders by kind and key, forgotten when they were not used for a while. No torch: runtimes use it too."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

KEPT_DAYS = 7  # since it was last used
VARIABLE = "GEMMA_EDGE_CACHE"


def root() -> Path:
    """The cache's folder: $GEMMA_EDGE_CACHE, else gemma-edge in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-edge"


def folder(kind: str, key: str) -> Path:
    """The folder of one thing, by hash of all that it depends on; forgets those of its kind that were not used for KEPT_DAYS.

    Raises:
        OSError, RuntimeError: there is no cache folder that can be written to.
    """
    found = root() / kind / key
    found.mkdir(parents=True, exist_ok=True)
    os.utime(found)
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for other in found.parent.iterdir():
        with suppress(FileNotFoundError):  # another process may tidy up too
            if other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)
    return found
