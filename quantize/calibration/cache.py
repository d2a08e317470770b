"""The folder that keeps finished layers between exports: a killed calibration goes on, and a second target costs nothing."""

from __future__ import annotations

from pathlib import Path

from gemma_edge import user_cache
from gemma_edge.user_cache import VARIABLE as VARIABLE
from gemma_edge.user_cache import root as root


def calibration_folder(key: str) -> Path:
    """The folder of one calibration.

    Args:
        key: hash of everything that the calibration depends on.

    Raises:
        InputError: there is no cache folder that can be written to.
    """
    with user_cache.needed_for("finished layers"):
        return user_cache.folder("calibration", key)
