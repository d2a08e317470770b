"""Damage: a manifest that fits damaged files, as somebody would write it who means harm, and a disk that fills up."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest

from gemma_edge.bundle.manifest import MANIFEST, list_files


def reseal(bundle: Path) -> None:
    """Make the manifest fit the files. A manifest that cannot be parsed stays as it is."""
    path = bundle / MANIFEST
    try:
        data = json.loads(path.read_text())
    except ValueError:
        return
    files = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in list_files(bundle).items()}
    path.unlink()  # it may be one with the whole bundle's
    path.write_text(json.dumps({**data, "files": files}))


class _Full(io.FileIO):
    """A file of a disk without a free byte. /dev/full is the same, but some containers write it like any file."""

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nothing can be written any more into files whose names begin with `name`."""
    real = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if path.name.startswith(name):
            return io.BufferedWriter(_Full(path, mode))
        return real(path, mode, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_on_full_disk)
