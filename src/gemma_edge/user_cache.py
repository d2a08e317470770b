"""The user's cache: folders by kind and key, forgotten when they were not used for a while. No torch: runtimes use it too.

What lies there is trusted, so nobody else may write there: every folder belongs to the user, and is closed to others.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemma_edge.errors import InputError

KEPT_DAYS = 7  # since it was last used
VARIABLE = "GEMMA_EDGE_CACHE"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class ForeignFolder(OSError):
    """A folder of the cache that is not the user's alone; the message is one line."""


def root() -> Path:
    """The cache's folder: $GEMMA_EDGE_CACHE, else gemma-edge in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-edge"


def place(kind: str) -> Path:
    """Where the folders of a kind lie. Nothing is made or checked."""
    return root() / kind


def folder(kind: str, key: str) -> Path:
    """The folder of one thing, by hash of all that it depends on; forgets those of its kind that were not used for KEPT_DAYS.

    Raises:
        OSError, RuntimeError: there is no cache folder that can be written to.
        ForeignFolder: others can write to it too.
    """
    top = root()
    if not top.exists():
        top.parent.mkdir(parents=True, exist_ok=True)
    result = place(kind) / key
    for made in (top, result.parent, result):
        made.mkdir(mode=0o700, exist_ok=True)
        # the cache itself may be the user's own link to a larger disk; inside it nobody makes links
        _refuse_others(made, made.stat() if made == top else made.lstat())
        if made != top and made.stat().st_mode & 0o077:  # made by an earlier version
            made.chmod(0o700)
    os.utime(result)
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for other in result.parent.iterdir():
        with suppress(FileNotFoundError):  # another process may tidy up too
            if other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)
    return result


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Turn the errors of `place` and `folder` into one line, for something that has no other place.

    Raises:
        InputError: there is no cache folder that can be written to.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"no place to keep {what} ({error}); set {VARIABLE} to a folder that can be written to"
        ) from None


def is_own(status: os.stat_result) -> bool:
    """Whether a file or folder is the user's, and nobody else may write to it. Windows does not tell: there it is believed."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid == os.getuid() and not status.st_mode & OTHERS_WRITE


def _refuse_others(made: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise ForeignFolder(f"{made} is a link or no folder; remove it")
    if not is_own(status):
        raise ForeignFolder(
            f"{made} belongs to user {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):o}: others could change"
            f" what is kept there; make it yours alone with chmod 700, or set {VARIABLE} to another folder"
        )
