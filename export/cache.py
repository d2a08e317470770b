"""Where finished layers of calibrations are kept between exports: a killed one goes on, a second target costs nothing."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from gemma_edge.errors import InputError

KEPT_DAYS = 7  # since it was last used
VARIABLE = "GEMMA_EDGE_CACHE"


def root() -> Path:
    """The cache's folder: $GEMMA_EDGE_CACHE, else gemma-edge in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-edge"


def calibration_folder(key: str) -> Path:
    """The folder of one calibration, by hash of all that it depends on; forgets those that were not used for KEPT_DAYS.

    Raises:
        InputError: there is no cache folder that can be written to.
    """
    try:
        folder = root() / "calibration" / key
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"no place to keep finished layers ({error}); set {VARIABLE} to a folder that can be written to"
        ) from None
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for other in folder.parent.iterdir():
        with suppress(FileNotFoundError):  # another export may tidy up too
            if other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)
    return folder
