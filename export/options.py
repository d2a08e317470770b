"""What an export is asked for, and how it tells what it is doing: options, stages, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.export.calibration import Source
from gemma_edge.model.hub import DEFAULT_MODEL
from gemma_edge.runtimes.memory import peak_rss_mib

# (what, total, in bytes or in steps) -> a context that yields a function to call with what was done
Progress = Callable[[str, int, bool], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class ExportOptions:
    """What a user can choose. None = the default that fits model and target."""

    model: str = DEFAULT_MODEL
    out: Path | None = None
    target: str = "android"
    bits: int | None = None
    group_size: int | None = None
    table_bits: int | None = None
    size: str | None = None  # these three instead of bits, group size and table bits: see mixed.py
    bpw: float | None = None
    recipe: Path | None = None
    method: str | None = None
    quality: str | None = None
    text: Source = Source()
    distill: int = 0  # tokens; 0: not at all
    context: int | None = None
    prefill_chunk: int | None = None
    kv_bits: int | None = None
    backend: str | None = None
    lora: Path | None = None
    ram_gib: float | None = None
    verify: str = "quick"
    runtime_python: Path | None = None  # runs the gate of backends that this Python does not have
    keep_failed: bool = False
    save_checkpoint: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Stage:
    """How long a stage took, and the highest memory until its end."""

    name: str
    seconds: float
    peak_rss_bytes: int


@contextmanager
def stage(stages: list[Stage], name: str) -> Iterator[None]:
    """Time what is inside, and append it."""
    start = time.perf_counter()
    yield
    stages.append(Stage(name, time.perf_counter() - start, int(peak_rss_mib() * (1 << 20))))


@contextmanager
def no_progress(what: str, total: int, in_bytes: bool) -> Iterator[Callable[[int], None]]:
    """For callers that do not look."""
    yield lambda done: None
