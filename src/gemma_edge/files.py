"""Checks before any work that a file can be written and a package is installed, and writes files whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_edge.errors import InputError


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written after hours of work.

    Raises:
        InputError: a folder is there, or its own folder is missing or not to be written.
    """
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{option} {path}: no file can be written there; give a file name in a folder that exists")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. When the block ends well, what was written there takes the place of `path`.

    When it does not, nothing is left behind and an older file stays as it was.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file; an older one is replaced only by a complete one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
