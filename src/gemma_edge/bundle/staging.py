"""How a bundle appears: it is written in a hidden folder beside its destination, and takes its place when it is complete."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.errors import InputError
from gemma_edge.files import label

if sys.platform != "win32":
    import fcntl

OTHER_FOLDER = "pass another folder as `out`"
OLD = "old"  # name of the replaced folder inside the hidden one, where the system cannot exchange two folders
CLEANING_UP = 1 << 20  # bytes that removing a folder may need, when memory is full
# Flags of Linux's renameat2 and macOS's renamex_np; AT_FDCWD: paths are relative to the current folder.
RENAME_EXCHANGE, RENAME_SWAP, AT_FDCWD = 2, 2, -100


@dataclass(frozen=True)
class Kind:
    """A kind of folder that appears whole."""

    folder: str  # name of the folder in which it is written, inside the temporary one
    noun: str  # what messages call it
    is_one: Callable[[Path], bool]  # whether an existing folder is of this kind, and may be replaced


BUNDLE = Kind("bundle", "bundle", lambda folder: (folder / MANIFEST).exists())


def refuse_existing(out: Path, force: bool, kind: Kind = BUNDLE) -> None:
    """Refuse a destination that exists. With `force`, a folder of the same kind or an empty one there may be replaced.

    Raises:
        InputError: what is there must stay, or nothing can be written there.
    """
    with _named(out):
        _refuse_existing(_place(out), out, force, kind)


def _refuse_existing(place: Path, out: Path, force: bool, kind: Kind) -> None:
    if place.exists() and not force:
        raise InputError(
            f"{out} exists", field="force", value=force, hint="pass `force` to replace it, or another folder as `out`"
        )
    if place.exists() and not (place.is_dir() and (kind.is_one(place) or not any(place.iterdir()))):
        raise InputError(
            f"{out} exists and is not a {kind.noun}, and `force` replaces only {kind.noun}s",
            field="out",
            value=out,
            hint=OTHER_FOLDER,
        )
    if os.path.ismount(place):
        raise InputError(
            f"{out} is a mount point, which cannot be replaced",
            field="out",
            value=out,
            hint="pass a folder inside it as `out`",
        )


@contextmanager
def staged(out: Path, *, force: bool, kind: Kind = BUNDLE) -> Iterator[Path]:
    """Make a temporary folder beside `out`. When the block ends well, its `bundle/` becomes `out` in one step.

    Another `kind` has another name for that inner folder: `kind.folder`. Missing parents are made, and removed again if nothing
    is left in them. Where `out` is a link, it stays one, and the folder that it leads to is replaced.

    Raises:
        InputError: `out` exists and `force` is False, or it cannot be written.
    """
    with ExitStack() as stack:
        with _named(out):
            place = _place(out)
            _clean_leftovers(place)
            _refuse_existing(place, out, force, kind)
            stack.callback(_remove_empty, [parent for parent in place.parents if not parent.exists()])
            work = stack.enter_context(_work_folder(place))
            (work / kind.folder).mkdir()
        with _named(out, inside=work):
            yield work
        with _named(out):
            _refuse_existing(place, out, force, kind)  # another process may have made it in the meantime
            put(work / kind.folder, place, aside=work / OLD)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:  # the innermost first
        with suppress(OSError):  # not empty: the bundle is in it, or somebody else's files
            folder.rmdir()


def put(new: Path, place: Path, *, aside: Path) -> None:
    """Put a folder in the place of another one, in one step where the system can do it, so that one is always there.

    Args:
        new: the folder; where two can be exchanged, the old one lies here afterwards.
        place: where it goes, on the same file system; nothing has to be there yet.
        aside: where the old one goes if two folders cannot be exchanged.
    """
    if not place.exists():
        new.rename(place)
    elif not _exchange(new, place):
        place.rename(aside)
        try:
            new.rename(place)
        except BaseException:
            if not place.exists():
                aside.rename(place)
            raise


def _exchange(new: Path, place: Path) -> bool:
    """Let two folders change places; False where the system or the file system cannot do it."""
    names = os.fsencode(new), os.fsencode(place)
    with suppress(AttributeError):  # an older system, or Windows
        if sys.platform == "linux":
            library = ctypes.CDLL(None)
            return bool(library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)
        if sys.platform == "darwin":
            return bool(ctypes.CDLL(None).renamex_np(*names, RENAME_SWAP) == 0)
    return False


def _place(out: Path) -> Path:
    """Where `out` lies in the end: links are followed.

    Raises:
        InputError: it is a link to nothing. It may lead to a disk that is not mounted at the moment.
    """
    place = Path(os.path.realpath(out))
    if out.is_symlink() and not place.exists():
        raise InputError(
            f"{out} is a link to {place}, where nothing is",
            field="out",
            value=out,
            hint="make that folder, remove the link, or pass another folder as `out`",
        )
    return place


@contextmanager
def _named(out: Path, inside: Path | None = None) -> Iterator[None]:
    """Turn the system's errors about the destination into one line.

    Args:
        out: the destination, as the user gave it.
        inside: errors about files outside this folder are passed on; None: no error is.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        named = getattr(error, "filename", None)
        if inside is not None and not (isinstance(named, str | Path) and Path(named).is_relative_to(inside)):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write {out}: {reason}", field="out", value=out, hint=OTHER_FOLDER) from None


@contextmanager
def _work_folder(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place`, removed at the end. It is locked as long as its process lives."""
    work, lock = _made_and_locked(place)
    reserve = bytearray(CLEANING_UP)  # never touched: it takes addresses, but no memory
    try:
        yield work
    finally:
        del reserve
        shutil.rmtree(work, ignore_errors=True)
        _unlock(lock)


def _made_and_locked(place: Path) -> tuple[Path, int | None]:
    while True:
        work = place.parent / f"{_hidden(place)}{os.getpid()}-{secrets.token_hex(4)}"
        work.mkdir(parents=True)
        with suppress(BlockingIOError, FileNotFoundError):  # another process took it for a leftover
            lock = _lock(work)
            if work.exists():
                return work, lock
            _unlock(lock)


def _hidden(place: Path) -> str:
    """What the names of the hidden folders of a destination begin with."""
    return f".{label(place.name)}.partial-"


def _clean_leftovers(place: Path) -> None:
    """Remove what killed exports of the same name left behind, and put back a folder that one had moved aside."""
    if not place.parent.is_dir():
        return
    for left in [path for path in place.parent.iterdir() if path.name.startswith(_hidden(place))]:
        try:
            lock = _lock(left)
        except OSError:  # in use, or another user's
            continue
        if lock is None and _alive(left.name.removeprefix(_hidden(place)).partition("-")[0]):
            continue
        if (left / OLD).exists() and not place.exists():
            (left / OLD).rename(place)
        shutil.rmtree(left, ignore_errors=True)
        _unlock(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder, as a descriptor: the lock is gone when that is closed, or its process ends.

    Returns:
        None if folders cannot be locked, as on Windows and some network file systems.

    Raises:
        BlockingIOError: another process holds it.
        OSError: there is no such folder, or it cannot be opened.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _alive(pid: str) -> bool:
    """Whether a process has this number. Used where folders cannot be locked."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
