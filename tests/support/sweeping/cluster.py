"""A scheduler and nodes as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.checkpoints import ROOT

PATIENCE_S = 120
NODE = (
    "import sys, json; from gemma_edge.sweep.cluster import nodes, process;"
    " process.LOADED = tuple(json.loads(sys.argv[4])); nodes.join(sys.argv[1], json.loads(sys.argv[3]), sys.argv[2])"
)


@contextmanager
def cluster(
    folder: Path,
    nodes: Mapping[str, Mapping[str, float]],
    loaded: Sequence[str] = (),
    environments: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """The scheduler's address, and the nodes' processes.

    Args:
        folder: for logs.
        nodes: name -> what it offers.
        loaded: modules that a process of a unit has from the start.
        environments: name -> variables of that node.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    shared = {**os.environ, "PYTHONPATH": path, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "2"}
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **more: str) -> None:
        with (folder / f"log-{len(started)}").open("wb") as log:
            started.append(subprocess.Popen([sys.executable, *words], env={**shared, **more}, stdout=log, stderr=log))

    try:
        file = folder / "scheduler.json"
        start("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
              "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file))  # fmt: skip
        wait_until(file.exists)
        address = json.loads(file.read_text())["address"]
        for name, offers in nodes.items():
            start(
                "-c", NODE, address, name, json.dumps(offers), json.dumps(loaded), **(environments or {}).get(name, {})
            )
        logs = [folder / f"log-{number + 1}" for number in range(len(nodes))]
        wait_until(lambda: all(b"Starting established" in log.read_bytes() for log in logs))
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for something that will be true within PATIENCE_S."""
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)
