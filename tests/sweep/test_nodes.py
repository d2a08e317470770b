"""Real nodes: processes that are killed, nodes that are lost, resources, and what remains when a sweep is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="distributed is not installed: pip install 'gemma-edge[sweep]'")

from support.sweeping.cluster import PATIENCE_S, cluster, wait_until
from support.sweeping.fake_units import FakeStore

from gemma_edge.errors import InputError
from gemma_edge.export.options import ExportOptions
from gemma_edge.sweep.cluster import process
from gemma_edge.sweep.cluster.nodes import nodes, own_resources
from gemma_edge.sweep.cluster.schedule import Outcome, Runner
from gemma_edge.sweep.units import CORES, GPU, QUIET, RAM, Job, Unit

JOB = Job(ExportOptions())


def unit(key: str, kind: str = "phone", **needs: float) -> Unit:
    return Unit(kind, key, key, JOB, needs=needs or {CORES: 1})


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Units of these tests need no torch, and locks of their own."""
    monkeypatch.setattr(process, "LOADED", ())
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
def two_nodes(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Only the first one may time things."""
    with cluster(tmp_path, {"first": {CORES: 1, RAM: 1e12, QUIET: 1}, "second": {CORES: 1, RAM: 1e12}}) as started:
        yield started


def test_work_goes_where_its_resources_are_and_a_lost_nodes_work_is_done_by_the_other(
    two_nodes: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path
) -> None:
    address, (first, second) = two_nodes
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


def test_work_that_can_use_a_gpu_goes_where_one_is_and_other_work_does_not_see_it(tmp_path: Path) -> None:
    """No GPU is needed for this: a resource is a name, and a process sees what its environment says."""
    offers = {CORES: 1.0, RAM: 1e12}
    names = {"plain": offers, "fast": {**offers, GPU: 1.0}}
    store = FakeStore(tmp_path)
    units = [unit(f"slow-{number}") for number in range(4)]
    units += [unit(f"distill-{number}", cores=1, gpu=1) for number in range(3)]
    variables = {name: {"CUDA_VISIBLE_DEVICES": "7"} for name in names}
    with (
        cluster(tmp_path, names, environments=variables) as (address, (_, fast)),
        nodes(address, store, 0, []) as running,
    ):
        ended = run_all(Runner(running, store, 0), units)
    places = {key: int(node.rpartition(":")[2]) for key, _, node in store.begun()}
    assert {places[key] for key in places if key.startswith("distill")} == {fast.pid}
    assert {places[key] for key in places if key.startswith("slow")} - {fast.pid}
    assert {key: outcome.result["gpus"] for key, outcome in ended.items()} == {
        key: "7" if key.startswith("distill") else "" for key in places
    }


@pytest.mark.parametrize("there", [False, True])
def test_a_machine_offers_the_gpu_that_torch_sees(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    fake = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: there))
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert (own_resources([]).get(GPU) == 1.0) == there
    assert GPU not in own_resources([], gpu=False)
    monkeypatch.delitem(sys.modules, "torch")
    asked: list[list[str]] = []

    def answer(words: list[str], **more: object) -> SimpleNamespace:
        asked.append(words)
        return SimpleNamespace(returncode=int(not there))

    monkeypatch.setattr(subprocess, "run", answer)
    assert (GPU in own_resources([])) == there and "torch.cuda.is_available()" in asked[0][2]


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
