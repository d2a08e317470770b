"""How long work tells what it is doing: a progress callback, and the time and memory of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from gemma_edge.memory import peak_rss_mib

# (what, total, in bytes or in steps) -> a context that yields a function to call with what was done
Progress = Callable[[str, int, bool], AbstractContextManager[Callable[[int], None]]]


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
