"""The locks that keep a machine quiet: ordinary work side by side, a benchmark alone, and no work passes one that waits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gemma_edge.sweep.cluster.quiet import VARIABLE, working

PATIENCE_S = 30


def test_a_benchmark_is_alone_and_later_work_waits_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    together, may_end = threading.Barrier(2, timeout=PATIENCE_S), threading.Event()
    order: list[str] = []
    inside = set[str]()

    def work(name: str) -> None:
        with working(alone=False):
            inside.add(name)
            together.wait()  # only passes if both are inside at once
            may_end.wait(PATIENCE_S)
            inside.discard(name)

    def bench() -> None:
        with working(alone=True):
            order.append("bench")
            assert inside == set()

    def late() -> None:
        with working(alone=False):
            order.append("late")

    workers = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in workers:
        thread.start()
    while len(inside) < 2:
        pass
    timed = threading.Thread(target=bench)
    timed.start()
    door = tmp_path / "door"
    while not _held(door):  # the benchmark stands at the door
        pass
    last = threading.Thread(target=late)
    last.start()
    assert order == []
    may_end.set()
    for thread in (*workers, timed, last):
        thread.join(PATIENCE_S)
    assert order == ["bench", "late"]


def _held(path: Path) -> bool:
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
