"""A child process that is watched: what it prints and when, and its memory over time. The clock is its own age in seconds."""

from __future__ import annotations

import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

from gemma_edge.children import Place, own_place
from gemma_edge.memory import memory_mib

SAMPLE_S = 0.05
MOST_SAMPLES = 500  # of a long run, every second one is dropped, again and again


class ChildFailed(RuntimeError):
    """The process did not end well; the message is one line."""


@dataclass
class Watched:
    """What a child did."""

    lines: list[tuple[float, str]] = field(default_factory=list)  # of the stream that was watched
    output: str = ""  # of the other one
    samples: list[tuple[float, float]] = field(default_factory=list)  # at_s, resident MiB


class _Sampler(threading.Thread):
    """Reads the resident set from outside, so that the child is not disturbed."""

    def __init__(self, pid: int, started_s: float, seen: Watched) -> None:
        super().__init__(daemon=True)
        self._pid, self._started_s, self._seen = pid, started_s, seen
        self._every_s = SAMPLE_S
        self.ended = threading.Event()

    def run(self) -> None:
        samples = self._seen.samples
        while not self.ended.wait(self._every_s):
            memory = memory_mib(self._pid)
            if "rss" not in memory:  # gone, or a system without /proc
                continue
            samples.append((round(time.monotonic() - self._started_s, 3), round(memory["rss"], 2)))
            if len(samples) > MOST_SAMPLES:
                del samples[::2]
                self._every_s *= 2


def watch(command: Callable[[float], Sequence[str]], *, stream: str = "stdout") -> Watched:
    """Run a child to its end, in a folder of its own; it is killed when this is interrupted.

    Args:
        command: made from the moment the child starts, of time.monotonic, for a child that tells times on the same clock;
            its paths are absolute.
        stream: whose lines are stamped; the other one is kept whole.

    Raises:
        ChildFailed: it could not be started, or ended with another status than 0.
    """
    with own_place() as place:
        return _watch(command, stream, place)


def _watch(command: Callable[[float], Sequence[str]], stream: str, place: Place) -> Watched:
    started_s = time.monotonic()
    words = command(started_s)
    try:
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=place.cwd,
            env=place.env,
        )
    except OSError as error:
        raise ChildFailed(f"cannot run {words[0]}: {error.strerror}") from None
    assert process.stdout is not None and process.stderr is not None
    watched, other = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
    seen, rest = Watched(), deque[str]()
    sampler = _Sampler(process.pid, started_s, seen)
    drain = threading.Thread(target=_drain, args=(other, rest), daemon=True)
    try:
        sampler.start()
        drain.start()
        for line in watched:
            seen.lines.append((time.monotonic() - started_s, line))
        process.wait()
    finally:
        process.kill()
        process.wait()
        sampler.ended.set()
        sampler.join()
        drain.join()
        watched.close()
        other.close()
    seen.output = "".join(rest)
    if process.returncode:
        said = seen.output if stream == "stdout" else "".join(line for _, line in seen.lines)
        raise ChildFailed(_why(process.returncode, said))
    return seen


def _drain(stream: IO[str], into: deque[str]) -> None:
    into.extend(stream)


def _why(status: int, stderr: str) -> str:
    """One line."""
    if status < 0:
        return f"killed by signal {-status}" + (": probably not enough memory" if status == -9 else "")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"ended with status {status}"
