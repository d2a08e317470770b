"""How a bundle appears: it is written in a hidden folder beside its destination, and renamed when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.errors import InputError

OTHER_FOLDER = "pass another folder as `out`"


@dataclass(frozen=True)
class Kind:
    """A kind of folder that appears whole."""

    folder: str  # name of the folder in which it is written, inside the temporary one
    noun: str  # what messages call it
    is_one: Callable[[Path], bool]  # whether an existing folder is of this kind, and may be replaced


BUNDLE = Kind("bundle", "bundle", lambda folder: (folder / MANIFEST).exists())


def _alive(pid: str) -> bool:
    # our own folder does not exist yet: a dead process had the same number, as in a restarted container
    if pid == str(os.getpid()):
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _clean_leftovers(out: Path) -> None:
    """Remove what a killed export of the same name left behind, and put back a bundle it had moved aside."""
    for kind in ("old", "partial"):
        for left in out.parent.glob(f".{out.name}.{kind}-*"):
            if _alive(left.name.rpartition("-")[2]):
                continue
            if kind == "old" and not out.exists():
                left.rename(out)
            else:
                shutil.rmtree(left, ignore_errors=True)


def refuse_existing(out: Path, force: bool, kind: Kind = BUNDLE) -> None:
    """Refuse a destination that exists. With `force`, a folder of the same kind or an empty one there may be replaced.

    Raises:
        InputError: something is there that must stay.
    """
    if out.exists() and not force:
        raise InputError(
            f"{out} exists", field="force", value=force, hint="pass `force` to replace it, or another folder as `out`"
        )
    if out.exists() and not (out.is_dir() and (kind.is_one(out) or not any(out.iterdir()))):
        raise InputError(
            f"{out} exists and is not a {kind.noun}, and `force` replaces only {kind.noun}s",
            field="out",
            value=out,
            hint=OTHER_FOLDER,
        )


def _make_folder(folder: Path, parent: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"cannot write in {parent}: {error.strerror}", field="out", value=folder, hint=OTHER_FOLDER
        ) from None


@contextmanager
def staged(out: Path, *, force: bool, kind: Kind = BUNDLE) -> Iterator[Path]:
    """Make a temporary folder beside `out`. When the block ends well, its `bundle/` becomes `out` in one rename.

    Another `kind` has another name for that inner folder: `kind.folder`.

    Missing parents are made, and removed again if nothing is left in them.

    Raises:
        InputError: `out` exists and `force` is False, or its parent cannot be written.
    """
    _clean_leftovers(out)
    refuse_existing(out, force, kind)
    work = out.parent / f".{out.name}.partial-{os.getpid()}"
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    missing = [parent for parent in out.absolute().parents if not parent.exists()]  # the innermost first
    try:
        _make_folder(work / kind.folder, out.parent)
        yield work
        refuse_existing(out, force, kind)  # another process may have made it in the meantime
        if out.exists():
            out.rename(old)
        (work / kind.folder).rename(out)
    finally:
        if old.exists() and not out.exists():  # interrupted between the two renames
            old.rename(out)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not empty: the bundle is in it, or somebody else's files
                parent.rmdir()
