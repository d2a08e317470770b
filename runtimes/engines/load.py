"""Opens a bundle in the engine that runs it, and checks what every engine checks before it loads."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path

from gemma_edge.bundle.backends import RUNTIMES, choose_backend
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime


def refuse_older(package: str, version: str, oldest: tuple[int, int]) -> None:
    """Refuse a runtime's package that does not know what bundles ask of it.

    Raises:
        InputError: `version` lies before `oldest`.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < oldest:
        wanted = ".".join(map(str, oldest))
        raise InputError(
            f"{package} {version} is too old, bundles need {wanted} or newer; pip install -U '{package}>={wanted}'"
        )


def thread_count(asked: int | None, manifest: Manifest) -> int:
    """Threads to use: those asked for, else the target's; no more than the machine has.

    Raises:
        InputError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise InputError(f"threads {asked} is below 1")
    return min(asked or manifest.target.threads, os.cpu_count() or 1)


def open_runtime(bundle: str | Path, *, backend: str | None = None, threads: int | None = None) -> Runtime:
    """`gemma_edge.load`; see there."""
    folder = Path(bundle)
    manifest = Manifest.load(folder)
    module, cls, _, _ = RUNTIMES[choose_backend(folder, manifest, backend)]
    start = time.perf_counter()
    runtime: Runtime = getattr(importlib.import_module(module), cls)(folder, manifest, threads=threads)
    runtime.stats.load_s = time.perf_counter() - start
    return runtime
