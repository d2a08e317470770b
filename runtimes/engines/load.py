"""Opens a bundle in the engine that runs it, and checks what every engine checks before it loads."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gemma_edge.bundle.backends import choose_backend, registered
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime


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


def open_runtime(bundle: str | Path, *, backend: str | None = None, threads: int | None = None) -> Runtime:
    """`gemma_edge.load`; see there."""
    folder = Path(bundle)
    manifest = Manifest.load(folder)
    chosen = registered()[choose_backend(folder, manifest, backend)]
    start = time.perf_counter()
    runtime: Runtime = chosen.open(folder, manifest, threads)
    runtime.stats.load_s = time.perf_counter() - start
    return runtime
