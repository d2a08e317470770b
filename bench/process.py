"""Runs a child process and records what it prints and when, and its memory over time, in seconds since it was started."""

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

# SAMPLE_S: how often the child's memory is read at first.
SAMPLE_S = 0.05
# MAX_SAMPLES: how many readings are kept. When there are more, every second one is dropped, and they are taken half as often.
MAX_SAMPLES = 500


class ChildFailed(RuntimeError):
    """A child could not be started, or failed. The message is one line."""


@dataclass
class Watched:
    """What was seen of a child."""

    lines: list[tuple[float, str]] = field(default_factory=list)  # when, and the line, of the stream that was stamped
    output: str = ""  # the whole text of the other stream
    samples: list[tuple[float, float]] = field(default_factory=list)  # when, and the resident memory in MiB


class _Sampler(threading.Thread):
    """Reads the child's resident memory from this process, so that the child is not disturbed."""

    def __init__(self, pid: int, started_s: float, watched: Watched) -> None:
        super().__init__(daemon=True)
        self._pid, self._started_s, self._watched = pid, started_s, watched
        self._every_s = SAMPLE_S
        self.ended = threading.Event()

    def run(self) -> None:
        samples = self._watched.samples
        while not self.ended.wait(self._every_s):
            memory = memory_mib(self._pid)
            if "rss" not in memory:  # the child has ended, or the system has no /proc
                continue
            samples.append((round(time.monotonic() - self._started_s, 3), round(memory["rss"], 2)))
            if len(samples) > MAX_SAMPLES:
                del samples[::2]
                self._every_s *= 2


def watch(command: Callable[[float], Sequence[str]], *, stream: str = "stdout") -> Watched:
    """Run a child to its end, in a folder of its own. It is killed when this process is interrupted.

    Args:
        command: called with the time (time.monotonic) at which the child starts, so that a child can tell times on that clock;
            returns the words of the command, whose paths are absolute.
        stream: stdout or stderr: the stream whose lines are stamped with their time. The other one is kept as one text.

    Raises:
        ChildFailed: the child could not be started, or ended with a status other than 0.
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
    stamped, other = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
    watched, rest = Watched(), deque[str]()
    sampler = _Sampler(process.pid, started_s, watched)
    drain = threading.Thread(target=_drain, args=(other, rest), daemon=True)
    try:
        sampler.start()
        drain.start()
        for line in stamped:
            watched.lines.append((time.monotonic() - started_s, line))
        process.wait()
    finally:
        process.kill()
        process.wait()
        sampler.ended.set()
        sampler.join()
        drain.join()
        stamped.close()
        other.close()
    watched.output = "".join(rest)
    if process.returncode:
        errors = watched.output if stream == "stdout" else "".join(line for _, line in watched.lines)
        raise ChildFailed(_reason(process.returncode, errors))
    return watched


def _drain(stream: IO[str], into: deque[str]) -> None:
    into.extend(stream)


def _reason(status: int, stderr: str) -> str:
    """Why a child failed, in one line: its last words, or its status."""
    if status < 0:
        return f"killed by signal {-status}" + (": probably not enough memory" if status == -9 else "")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"ended with status {status}"
