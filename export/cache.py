"""Where finished layers of calibrations are kept between exports: a killed one goes on, a second target costs nothing."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

KEPT_DAYS = 7  # since it was last used
VARIABLE = "GEMMA_EDGE_CACHE"


def root() -> Path:
    """The cache's folder: $GEMMA_EDGE_CACHE, else gemma-edge in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-edge"


def calibration_folder(key: str) -> Path:
    """The folder of one calibration, by hash of all that it depends on; forgets those that were not used for KEPT_DAYS."""
    folder = root() / "calibration" / key
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for other in folder.parent.iterdir():
        if other.stat().st_mtime < oldest:
            shutil.rmtree(other, ignore_errors=True)
    return folder
