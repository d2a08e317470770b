"""Real nodes: processes that are killed, nodes that are lost, resources, and what remains when a sweep is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="distributed is not installed: pip install 'gemma-edge[sweep]'")

from support.checkpoints import ROOT
from support.sweeping.fake_units import FakeStore

from gemma_edge.errors import InputError
from gemma_edge.export.options import ExportOptions
from gemma_edge.sweep.cluster import work
from gemma_edge.sweep.cluster.nodes import nodes
from gemma_edge.sweep.cluster.schedule import Outcome, Runner
from gemma_edge.sweep.units import CORES, QUIET, Job, Unit

PATIENCE_S = 120
JOB = Job(ExportOptions())


def unit(key: str, kind: str = "phone", **needs: float) -> Unit:
    return Unit(kind, key, key, JOB, needs=needs or {CORES: 1})


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Units of these tests need no torch, and locks of their own."""
    monkeypatch.setattr(work, "LOADED", ())
    monkeypatch.setenv("GEMMA_EDGE_QUIET", str(tmp_path / "quiet"))


def run_all(runner: Runner, units: Sequence[Unit]) -> dict[str, Outcome]:
    runner.run(units, lambda outcome: [])
    return {outcome.unit.key: outcome for outcome in runner.outcomes.values()}


def test_a_killed_process_is_tried_again_and_the_rest_goes_on(tmp_path: Path) -> None:
    store = FakeStore(tmp_path)
    with nodes(None, store, 1, []) as running:
        runner = Runner(running, store, 1)
        ended = run_all(runner, [unit("killed-1"), unit("slow-1"), unit("timed", "bench", bench=1)])
    assert ended["slow-1"].record and ended["timed"].record
    assert ended["killed-1"].failure == ("its process was killed by signal 9, probably for its memory (2 attempts)")
    assert sorted(key for key, _, _ in store.begun()) == ["killed-1", "killed-1", "slow-1", "timed"]


def test_stopping_ends_what_runs_and_keeps_what_is_done(tmp_path: Path) -> None:
    store = FakeStore(tmp_path)
    with nodes(None, store, 0, []) as running:
        runner = Runner(running, store, 0)
        thread = threading.Thread(target=run_all, args=(runner, [unit("slow-1"), unit("endless")]))
        thread.start()
        wait_until(lambda: len(store.begun()) == 2 and store.record(unit("slow-1")) is not None)
        running.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    pids = {key: pid for key, pid, _ in store.begun()}
    wait_until(lambda: not alive(pids["endless"]))
    assert store.record(unit("slow-1")) is not None and store.record(unit("endless")) is None


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two nodes as processes: only the first one may time things."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "2"}
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        with (tmp_path / f"log-{len(started)}").open("wb") as log:
            started.append(subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log))

    file = tmp_path / "scheduler.json"
    start("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
          "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file))  # fmt: skip
    wait_until(file.exists)
    import json

    address = json.loads(file.read_text())["address"]
    code = (
        "from gemma_edge.sweep.cluster import nodes, work; import sys; work.LOADED = ();"
        " nodes.join(sys.argv[1], {'cores': 1.0, 'ram': 1e12, **({'bench': 1.0} if sys.argv[2] == 'first' else {})}, sys.argv[2])"
    )
    for name in ("first", "second"):
        start("-c", code, address, name)
    wait_until(lambda: all(b"Starting established" in (tmp_path / f"log-{n}").read_bytes() for n in (1, 2)))
    yield address, started[1:]
    for process in started:
        process.kill()
        process.wait()


def test_work_goes_where_its_resources_are_and_a_lost_nodes_work_is_done_by_the_other(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path
) -> None:
    address, (first, second) = cluster
    store = FakeStore(tmp_path)
    ordinary = [unit(f"slow-{number}") for number in range(12)]
    timed = [Unit("bench", f"timed-{number}", "", JOB, needs={QUIET: 1.0}) for number in range(3)]
    with nodes(address, store, 2, []) as running:
        assert {node.name: QUIET in node.resources for node in running.now()} == {"first": True, "second": False}
        runner = Runner(running, store, 2)
        runner.run(timed, lambda outcome: [])

        def kill_in_the_middle() -> None:
            wait_until(lambda: len(store.begun()) > 7)
            second.kill()

        killer = threading.Thread(target=kill_in_the_middle)
        killer.start()
        ended = run_all(runner, ordinary)
        killer.join(PATIENCE_S)
    assert all(outcome.record for outcome in ended.values())
    where = {name: {key for key, _, node in store.begun() if node.endswith(f":{process.pid}")}
             for name, process in (("first", first), ("second", second))}  # fmt: skip
    assert {one.key for one in timed} <= where["first"]
    assert where["second"] and where["first"] | where["second"] == {one.key for one in (*ordinary, *timed)}
    finished = [str(outcome.record["node"]) for outcome in ended.values() if outcome.record]
    assert len(finished) == 15


def test_without_a_shared_folder_results_travel_through_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "node"))
    store, first = FakeStore(tmp_path / "driver"), unit("slow-1")
    with nodes(None, store, 0, []) as running:
        running.carries = True
        ended = run_all(Runner(running, store, 0), [Unit("lower", "l", "", JOB, {"phone": first}, {CORES: 1})])
    assert all(outcome.record for outcome in ended.values()) and len(ended) == 2
    own = FakeStore(tmp_path / "node" / "sweep" / "carried")
    assert [key for key, _, _ in own.begun()] == ["slow-1", "l"] and store.begun() == []
    for one in (first, Unit("lower", "l", "", JOB)):
        assert store.record(one) == own.record(one) is not None


def test_workers_that_do_not_say_what_they_offer_are_refused(tmp_path: Path) -> None:
    """Dask would wait for a node with cores for ever."""
    from distributed import LocalCluster

    with (
        LocalCluster(
            n_workers=1, processes=False, dashboard_address="127.0.0.1:0", protocol="tcp", host="127.0.0.1"
        ) as plain,
        pytest.raises(InputError, match="none of its 1 workers says how many cores"),
        nodes(plain.scheduler_address, FakeStore(tmp_path), 0, []),
    ):
        pass


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)
