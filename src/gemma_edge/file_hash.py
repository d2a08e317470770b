"""Remembers in the user's cache what was computed from a large file's bytes, such as its hash, so that a model is read once.

It is remembered for one state of one file: path, device, inode, size and the times of its last changes. A user cannot set the
time of the last change of an inode, so a file that was changed, replaced or restored is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gemma_edge import user_cache
from gemma_edge.files import sha256

# A file that was changed so shortly before may be changed again within the same tick of the file system's clock, unseen.
SETTLED_S = 2.0


def identity(path: Path) -> tuple[str | int, ...]:
    """What changes whenever the bytes of a file do."""
    result = path.stat()
    times = (result.st_mtime_ns, result.st_ctime_ns)
    return (str(path.resolve()), result.st_dev, result.st_ino, result.st_size, *times)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes as they are now, in hex.

    Raises:
        OSError: the file cannot be read. Without a cache it is merely hashed every time.
    """
    return remembered("sha256", path, sha256, "[0-9a-f]{64}")


def remembered(kind: str, path: Path, compute: Callable[[Path], str], pattern: str) -> str:
    """What was computed from a file's bytes as they are now, from memory if it was computed before.

    Args:
        kind: names what is computed; another name where the same bytes would give another result.
        path: the file.
        compute: called with the path. What it raises is not remembered.
        pattern: of every possible result; anything else in the cache is computed again.
    """
    before = identity(path)
    note = _note(kind, before)
    if note is not None and (known := _read(note, pattern)):
        return known
    began = time.time()
    result = compute(path)
    changed = max(path.stat().st_mtime, path.stat().st_ctime)
    if note is not None and identity(path) == before and changed < began - SETTLED_S:
        _write(note, result)
    return result


def _note(kind: str, state: tuple[str | int, ...]) -> Path | None:
    """Where the result for this state of a file is written."""
    try:
        return user_cache.folder(kind, hashlib.sha256(json.dumps(state).encode()).hexdigest()) / kind
    except (OSError, RuntimeError):
        return None


def _read(note: Path, pattern: str) -> str:
    """What is written there; empty unless it fits the pattern."""
    try:
        if not user_cache.is_own(note.lstat()) or not note.is_file():
            return ""
        text = note.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
    return text if re.fullmatch(pattern, text) else ""


def _write(note: Path, digest: str) -> None:
    partial = note.with_name(f"{note.name}.{os.getpid()}")
    with suppress(OSError):  # then it is hashed again
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(digest)
        partial.replace(note)
