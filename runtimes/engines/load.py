"""Opens a bundle in the engine that runs it, and checks what every engine checks before it loads."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gemma_edge.bundle.backends import choose_accelerator, choose_backend, registered
from gemma_edge.bundle.manifest import MANIFEST, Manifest, intact
from gemma_edge.errors import InputError, one_line
from gemma_edge.file_hash import identity
from gemma_edge.memory import is_out_of_memory
from gemma_edge.runtimes.engines.adapter import Adapter
from gemma_edge.runtimes.engines.base import Runtime

STDOUT, STDERR = 1, 2  # descriptors


def refuse_older(package: str, version: str, oldest: tuple[int, int]) -> None:
    """Refuse a package that is too old for bundles.

    Raises:
        InputError: `version` lies before `oldest`.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < oldest:
        needed = ".".join(map(str, oldest))
        raise InputError(
            f"{package} {version} is too old, bundles need {needed} or newer; pip install -U '{package}>={needed}'"
        )


def thread_count(requested: int | None, manifest: Manifest) -> int:
    """Threads to use: the requested number, else the target's; no more than the machine has.

    Raises:
        InputError: fewer than one.
    """
    if requested is not None and requested < 1:
        raise InputError(f"`threads` {requested} is below 1", field="threads", value=requested)
    return min(requested or manifest.target.threads, os.cpu_count() or 1)


@contextlib.contextmanager
def in_library(path: Path, problem: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn the errors of the library that runs a model into one line.

    Args:
        path: the file that the library works with.
        problem: what the message says about the file, such as "does not run".
        errors: the library's exceptions.

    Raises:
        InputError: in place of `errors`, or because memory is full.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise InputError(
                f"{path}: not enough memory ({one_line(error)}); close other programs, or export with a smaller `context`"
            ) from None
        if not isinstance(error, errors):
            raise
        raise InputError(f"{path} {problem}: {one_line(error)}; export the bundle again") from None


@contextlib.contextmanager
def silent(stream: int) -> Iterator[None]:
    """Keep a library's lines off STDOUT or STDERR, to which it writes past Python. Exceptions come through."""
    (sys.stdout if stream == STDOUT else sys.stderr).flush()
    kept = os.dup(stream)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream)
        yield
    finally:
        os.dup2(kept, stream)
        os.close(kept)


def intact_but_engines(bundle: Path, manifest: Manifest) -> None:
    """Check every file of a bundle that no engine opens; each engine checks its own.

    Raises:
        InputError: the first file that was changed.
    """
    own = {name for entry in manifest.backends.values() for name in entry.files}
    for name in manifest.files:
        if name not in own:
            intact(bundle, manifest.files, name)


def open_runtime(
    bundle: str | Path,
    *,
    backend: str | None = None,
    threads: int | None = None,
    accelerator: str | None = None,
    adapter: str | Path | None = None,
) -> Runtime:
    """`gemma_edge.load`; see there."""
    folder = Path(bundle)
    before = _state(folder)
    try:
        manifest = Manifest.load(folder)
        name = choose_backend(folder, manifest, backend)
        used = choose_accelerator(folder, manifest, name, accelerator)
        intact_but_engines(folder, manifest)
        start = time.perf_counter()
        runtime: Runtime = registered()[name].open(folder, manifest, threads, used)
    except InputError:
        if _state(folder) == before:
            raise
    else:
        if _state(folder) == before:
            if adapter is not None:
                runtime.use_adapter(Adapter.open(adapter))
            runtime.stats.load_s = time.perf_counter() - start
            return runtime
    raise InputError(f"{folder} was replaced while it was opened; open it again")


def _state(bundle: Path) -> tuple[str | int, ...] | None:
    """A value that changes when the bundle is replaced; None if there is no bundle."""
    try:
        return identity(bundle / MANIFEST)
    except (OSError, ValueError, RuntimeError):
        return None
