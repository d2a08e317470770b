"""Weights as XNNPACK packs them, kept in the user's cache: the second start maps the file instead of packing again.

Without it every signature packs its own copy into memory; with it all read one file, whose pages the system may drop.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemma_edge import user_cache

log = logging.getLogger(__name__)

NAME = "weights"


@contextmanager
def kept_weights(model: str, library: str) -> Iterator[str]:
    """The file for XNNPACK to read, or to write; it is there for others when the block ends well. Empty: no place to keep it.

    Args:
        model: hash of the model's file.
        library: name and version of what packs.
    """
    try:
        folder = user_cache.folder(
            "xnnpack", hashlib.sha256(f"{model}\n{library}\n{_processor()}".encode()).hexdigest()
        )
    except (OSError, RuntimeError) as error:
        log.info("no place to keep packed weights: %s", error)
        yield ""
        return
    path = folder / NAME
    if path.exists():
        yield str(path)
        return
    mine = folder / f"{NAME}.{os.getpid()}"
    log.info("packing the weights into %s", path)
    try:
        yield str(mine)
        with suppress(FileNotFoundError):  # nothing to pack
            mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


def _processor() -> str:
    """What the packing may depend on: the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()} {features}"
