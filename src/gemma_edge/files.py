"""Checks before any work that a file can be written and a package is installed, and writes files whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_edge.errors import InputError

MAX_LABEL = 200  # bytes of a name that is part of a longer one; file systems allow 255


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written after hours of work.

    Raises:
        InputError: something else than a file is there, or its folder is missing or cannot be written to.
    """
    try:
        # a device or a pipe would be replaced by a file; a link is replaced, wherever it leads
        writable = stat.S_ISREG(mode := os.lstat(path).st_mode) or stat.S_ISLNK(mode)
    except FileNotFoundError:
        writable = True
    except (OSError, ValueError):  # a name that is too long, or a NUL in it
        writable = False
    writable = writable and not path.is_dir() and os.access(path.absolute().parent, os.W_OK)
    if not writable:
        raise InputError(f"{option} {path}: no file can be written there; give a file name in a folder that exists")


def label(name: str) -> str:
    """A name for use in a longer one: the name itself, or its hash if it is too long."""
    return name if len(os.fsencode(name)) <= MAX_LABEL else hashlib.sha256(os.fsencode(name)).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. When the block ends well, what was written there takes the place of `path`.

    When it does not, nothing is left behind and an older file stays as it was.
    """
    partial = path.with_name(f".{label(path.name)}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file; an older one is replaced only by a complete one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def others_can_change(path: Path) -> bool:
    """Whether every user of this machine can change a file. Always False on Windows, which does not tell.

    In a folder like /tmp everybody may make files but change only their own, so there the file must be the user's or root's.
    """
    if sys.platform == "win32":
        return False
    file, folder = path.stat(), Path(os.path.realpath(path)).parent.stat()
    if file.st_mode & stat.S_IWOTH:
        return True
    own = file.st_uid in (0, os.getuid())
    return bool(folder.st_mode & stat.S_IWOTH) and not (folder.st_mode & stat.S_ISVTX and own)


def nearest_existing(path: Path) -> Path:
    """A path, or the nearest one above it that exists: where it would be made."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def link_home(folder: Path) -> Path:
    """The folder that links in `folder` may lead into: itself, or the repository of the hub's cache that it is part of.

    There a snapshot is models--OWNER--NAME/snapshots/COMMIT, and its files are links into blobs/ beside `snapshots`.
    """
    base = Path(os.path.realpath(folder))
    for snapshots in base.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return snapshots.parent
    return base


def sha256(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """Hash of a file's bytes; `progress` is called with the bytes just read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def need(option: str, package: str) -> None:
    """Refuse an option whose package, of the `eval` extra, is missing.

    Raises:
        InputError: with the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{option} needs {package}, which is not installed: pip install 'gemma-edge[eval]'")
