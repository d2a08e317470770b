"""Units in order, each once; attempts elsewhere, at most so many; what fails, and what hangs on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed", reason="distributed is not installed: pip install 'gemma-edge[sweep]'")

from distributed.scheduler import KilledWorker
from support.sweeping.fake_units import Done, FakeNodes

from gemma_edge.export.options import ExportOptions
from gemma_edge.sweep.cluster import schedule
from gemma_edge.sweep.cluster.process import UnitFailed
from gemma_edge.sweep.cluster.schedule import Outcome, Runner
from gemma_edge.sweep.cluster.store import Store
from gemma_edge.sweep.units import Job, Unit

JOB = Job(ExportOptions())


def chain() -> Unit:
    first = Unit("quantize", "q", "quantize", JOB, needs={"cores": 1})
    second = Unit("lower", "l", "lower", JOB, {"quantize": first}, {"cores": 1})
    return Unit("evaluate", "e", "evaluate", JOB, {"lower": second}, {"cores": 1})


def run(
    tmp_path: Path, units: Sequence[Unit], failures: Mapping[str, Sequence[Exception]] | None = None, retries: int = 2
) -> tuple[Runner, FakeNodes, list[Outcome]]:
    store = Store(tmp_path)
    nodes = FakeNodes(store, failures or {})
    runner = Runner(nodes, store, retries)  # type: ignore[arg-type]
    seen: list[Outcome] = []

    def then(outcome: Outcome) -> list[Unit]:
        seen.append(outcome)
        return []

    runner.run(units, then)
    return runner, nodes, seen


def test_what_a_unit_needs_comes_first_and_twice_is_once(tmp_path: Path) -> None:
    runner, nodes, seen = run(tmp_path, [chain(), chain()])
    assert [name for name, _, _ in nodes.started] == ["q", "l", "e"]
    assert [outcome.unit.key for outcome in seen] == ["q", "l", "e"] and all(outcome.record for outcome in seen)
    assert runner.computed == {"quantize": 1, "lower": 1, "evaluate": 1} and not runner.reused


def test_a_second_sweep_computes_what_is_new_only(tmp_path: Path) -> None:
    run(tmp_path, [chain()])
    again = chain()
    more = Unit("evaluate", "f", "evaluate", JOB, again.after, {"cores": 1})
    runner, nodes, seen = run(tmp_path, [again, more])
    assert [name for name, _, _ in nodes.started] == ["f"]
    assert runner.reused == {"evaluate": 1, "lower": 1, "quantize": 1} and runner.computed == {"evaluate": 1}
    assert len(seen) == 4  # the figures of the earlier units belong to the row, too


def test_what_may_succeed_elsewhere_is_tried_again_elsewhere(tmp_path: Path) -> None:
    killed = UnitFailed("its process was killed by signal 9, probably for its memory", True, "", "tcp://a")
    runner, nodes, seen = run(tmp_path, [chain()], {"q": [killed, killed]})
    assert nodes.started[:3] == [("q", 0, []), ("q", 1, ["tcp://a"]), ("q", 2, ["tcp://a"])]
    assert runner.repeated == 2 and seen[-1].unit.key == "e" and seen[-1].record


def test_after_so_many_attempts_the_reason_is_told_and_what_hangs_on_it_fails_too(tmp_path: Path) -> None:
    killed = UnitFailed("killed", True, "what it printed", "tcp://a")
    other = Unit("quantize", "x", "quantize", JOB, needs={"cores": 1})
    runner, nodes, seen = run(tmp_path, [chain(), other], {"q": [killed] * 9}, retries=1)
    by_key = {outcome.unit.key: outcome for outcome in seen}
    assert {key: outcome.failure for key, outcome in by_key.items() if not outcome.record} == dict.fromkeys(
        "qle", "killed (2 attempts)"
    )
    assert by_key["q"].log == "what it printed" and by_key["x"].record
    assert sorted(name for name, _, _ in nodes.started) == ["q", "q", "x"]


def test_what_can_never_be_done_is_tried_once(tmp_path: Path) -> None:
    refused = UnitFailed("`bits` 8 in groups: no kernels", False, "", "tcp://a")
    _, nodes, seen = run(tmp_path, [chain()], {"q": [refused]})
    assert [name for name, _, _ in nodes.started] == ["q"]
    assert seen[0].failure == "`bits` 8 in groups: no kernels"


def test_a_unit_whose_nodes_were_all_lost_is_given_up(tmp_path: Path) -> None:
    _, nodes, seen = run(tmp_path, [chain()], {"q": [KilledWorker("q", None, 3)]})
    assert len(nodes.started) == 1 and "every node that worked on it was lost" in seen[0].failure


def test_what_no_node_offers_is_told_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask would wait for ever."""
    monkeypatch.setattr(schedule, "POLL_S", 0.01)
    monkeypatch.setattr(schedule, "GRACE_S", 0.05)

    class Never(Done):
        def add_done_callback(self, call: Callable[[Any], None]) -> None:
            pass

    store = Store(tmp_path)
    nodes = FakeNodes(store, {})
    nodes.start = lambda unit, attempt, avoid: Never(None)  # type: ignore[method-assign]
    runner = Runner(nodes, store, 2)  # type: ignore[arg-type]
    seen: list[Outcome] = []
    needs = {"cores": 1.0, "ram": float(3 << 30), "phone:X": 1.0}
    runner.run([Unit("phone", "p", "time", JOB, needs=needs)], lambda outcome: seen.append(outcome) or [])  # type: ignore[func-returns-value]
    assert seen[0].failure == "no node offers cores 1, 3.0 GiB of memory, phone:X 1"
