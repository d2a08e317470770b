"""Weights as XNNPACK packs them, kept in the user's cache: the second start maps the file instead of packing again.

Without it every signature packs its own copy into memory; with it all read one file, whose pages the system may drop.

XNNPACK does not compare the packed weights with the model, so a packed file of other weights would be believed. Therefore the
folder is named by the hash of the model's own bytes, not by what a manifest says of them, and the packed file by the hash of
its own. Both are computed once per state of a file (file_hash.py): 1.4 GB a second where the processor has instructions for it.
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
from gemma_edge.file_hash import file_hash, identity

log = logging.getLogger(__name__)

NAME = "weights"


@contextmanager
def kept_weights(model: Path, library: str) -> Iterator[str]:
    """The file for XNNPACK to read, or to write; it is there for others when the block ends well. Empty: no place to keep it.

    Args:
        model: the model's file.
        library: name and version of what packs.
    """
    try:
        state = identity(model)
        key = hashlib.sha256(f"{file_hash(model)}\n{library}\n{_processor()}".encode()).hexdigest()
        folder = user_cache.folder("xnnpack", key)
        packed = _packed(folder)
    except (OSError, RuntimeError) as error:
        level = logging.WARNING if isinstance(error, user_cache.ForeignFolder) else logging.INFO
        log.log(level, "packed weights are not kept: %s", error)
        yield ""
        return
    if packed is not None:
        yield str(packed)
        return
    mine = folder / f"new.{os.getpid()}"
    mine.unlink(missing_ok=True)  # of a process that was killed, and had the same number
    log.info("packing the weights into %s", folder)
    try:
        yield str(mine)
        _keep(mine, model, state)
    finally:
        mine.unlink(missing_ok=True)


def _packed(folder: Path) -> Path | None:
    """The packed file of a folder whose bytes are those that its name tells; others are removed."""
    for path in sorted(folder.glob(f"{NAME}-*")):
        if not path.is_symlink() and path.is_file() and user_cache.is_own(path.lstat()):
            if path.name == f"{NAME}-{file_hash(path)}":
                return path
        log.warning("%s is damaged or not ours: the weights are packed again", path)
        with suppress(OSError):
            path.unlink()
    return None


def _keep(mine: Path, model: Path, state: tuple[str | int, ...]) -> None:
    """Give the file its name, unless there was nothing to pack or the model was changed while it was read."""
    with suppress(OSError):
        mine.chmod(0o600)
        if identity(model) == state:
            mine.replace(mine.with_name(f"{NAME}-{file_hash(mine)}"))


def _processor() -> str:
    """What the packing may depend on: the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()} {features}"
