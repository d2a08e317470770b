"""How a long task reports what it is doing: a progress callback, and the time and memory of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from gemma_edge.memory import peak_rss_mib

# Progress: called with what is being done, the total, and whether the total counts bytes (else steps). It returns a context whose
# value is a function, to be called with the number of bytes or steps done since the last call.
Progress = Callable[[str, int, bool], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Stage:
    """How long a stage took, and the process's peak memory at its end."""

    name: str
    seconds: float
    peak_rss_bytes: int


@contextmanager
def stage(stages: list[Stage], name: str) -> Iterator[None]:
    """Measure the block inside, and append it to the stages."""
    start = time.perf_counter()
    yield
    stages.append(Stage(name, time.perf_counter() - start, int(peak_rss_mib() * (1 << 20))))


@contextmanager
def no_progress(what: str, total: int, in_bytes: bool) -> Iterator[Callable[[int], None]]:
    """Show nothing: the default of every function that takes a `Progress`."""
    yield lambda done: None
