"""The course of a sweep: what runs, what is spared under limits and a budget, and what the rows say in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed", reason="distributed is not installed: pip install 'gemma-edge[sweep]'")
pytest.importorskip("optuna", reason="optuna is not installed: pip install 'gemma-edge[sweep]'")

from support.checkpoints import DEMO
from support.sweeping.fake_units import FakeNodes

from gemma_edge.bench.result import Settings
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import Plan
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import make_recipe
from gemma_edge.sweep.cluster.process import UnitFailed
from gemma_edge.sweep.cluster.schedule import Runner
from gemma_edge.sweep.cluster.store import Store
from gemma_edge.sweep.course import Course
from gemma_edge.sweep.options import Limits, Measuring, SweepOptions, Where
from gemma_edge.sweep.points import LeftOut, Planned, Point
from gemma_edge.sweep.result import FAILED, LEFT_OUT, MEASURED, PRUNED, SweepResult
from gemma_edge.sweep.units import GPU, Unit

CONFIG = GemmaConfig.from_hf(DEMO)
BENCH = Settings(threads=1, prefill=4, decode=4)


def point(number: int) -> Point:
    """Three points share each quantization; the weights of point n have n MB."""
    plan = Plan("android", "onnx", "int4", 256, 64, "float32", number * 10**6, 1, 1, 10**7, 10**9, 10**8, 10**8)
    choice = {"bits": number}
    return Point(
        number, f"bits {number}", choice, ExportOptions(), plan, f"q{number // 3}", f"l{number}", make_recipe(4), 0, "m"
    )


def swept(
    tmp_path: Path, options: SweepOptions, count: int = 9, failures: Mapping[str, Sequence[Exception]] | None = None
) -> tuple[SweepResult, list[Unit]]:
    """A sweep whose point n has KL n / 10, and the units that were started."""

    def results(unit: Unit) -> dict[str, Any]:
        started.append(unit)
        if unit.kind == "lower":
            return {"bytes": 7}
        if unit.kind == "bench":
            return {"summary": {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 2.0, "rss_peak_mib": 3.0}}
        number = int(unit.what.split()[2]) if unit.kind == "evaluate" else 0
        return {"kl": number / 10, "top1": 0.9, "ppl": 9.0, "ppl_change": 0.1, "tokens": unit.job.tokens}

    started: list[Unit] = []
    planned = Planned(
        [point(number) for number in range(count)], [LeftOut(count, "no", {"bits": 99}, "why not")], CONFIG
    )
    store = Store(tmp_path)
    runner = Runner(FakeNodes(store, failures or {}, results), store, 0)  # type: ignore[arg-type]
    course = Course(options, planned, ["cpu"], [])
    seen: list[int] = []
    runner.run(course.first(), course.follow(runner, seen.append))
    assert len(seen) <= course.expected
    return course.result(runner, ["a"]), started


def options(tmp_path: Path, **changes: Any) -> SweepOptions:
    measuring = Measuring(tokens=3000, bench=BENCH)
    return SweepOptions(ExportOptions(), tmp_path, {"bits": tuple(range(9))}, measuring=measuring, **changes)


def test_every_point_is_evaluated_and_timed_and_a_quantization_is_shared(tmp_path: Path) -> None:
    result, started = swept(tmp_path, options(tmp_path))
    assert result.units == {
        kind: {"computed": count, "reused": 0}
        for kind, count in {"bench": 9, "evaluate": 9, "lower": 9, "quantize": 3, "reference": 1}.items()
    }
    assert [row.state for row in result.rows] == [MEASURED] * 9 + [LEFT_OUT]
    assert result.rows[4].kl == 0.4 and result.rows[4].bytes == 7 and result.rows[4].decode_tokens_per_s == 2.0
    assert result.rows[4].export_cpu_s == 2.0  # its own lowering, and the quantization that it shares
    assert result.rows[9].reason == "why not"


def test_what_is_known_to_break_a_limit_is_not_computed(tmp_path: Path) -> None:
    result, started = swept(tmp_path, options(tmp_path, limits=Limits(max_size=5 * 10**6, max_kl=0.25)))
    assert [row.state for row in result.rows] == [MEASURED] * 6 + [LEFT_OUT] * 4
    assert "over max size" in result.rows[6].reason
    assert sorted(unit.what for unit in started if unit.kind == "bench") == [f"time bits {n}" for n in range(3)]


def test_under_a_budget_few_points_get_all_tokens_and_only_they_are_timed(tmp_path: Path) -> None:
    result, started = swept(tmp_path, options(tmp_path, budget=9, pick="kl"))
    tokens = {
        number: [u.job.tokens for u in started if u.what.startswith(f"evaluate bits {number} ")] for number in range(9)
    }
    assert all(counts[0] == 333 for counts in tokens.values())
    final = [number for number, counts in tokens.items() if counts[-1] == 3000]
    assert 0 in final and 0 < len(final) <= 4
    assert sorted(unit.what for unit in started if unit.kind == "bench") == [f"time bits {n}" for n in sorted(final)]
    assert [row.state for row in result.rows[:9]] == [MEASURED if n in final else PRUNED for n in range(9)]


def test_a_budget_below_the_number_of_points_tries_so_many(tmp_path: Path) -> None:
    result, started = swept(tmp_path, options(tmp_path, budget=4))
    assert sum(row.reason == "not among those that the budget tries" for row in result.rows) == 5
    assert len({unit.key for unit in started if unit.kind == "lower"}) == 4


@pytest.mark.parametrize("budget", [None, 9])
def test_a_failed_unit_ends_its_points_only(tmp_path: Path, budget: int | None) -> None:
    failures = {"q1": [UnitFailed("killed", True, "", "a")], "l8": [UnitFailed("no kernels", False, "", "a")]}
    result, _ = swept(tmp_path, options(tmp_path, budget=budget), failures=failures)
    assert [row.number for row in result.rows if row.state == FAILED] == [3, 4, 5, 8]
    assert result.rows[4].reason == "quantize: killed (1 attempts)" and result.rows[8].reason == "lower: no kernels"
    assert result.rows[0].state == MEASURED and result.rows[0].decode_tokens_per_s == 2.0


def test_a_distillation_is_placed_on_a_gpu_where_there_is_one(tmp_path: Path) -> None:
    plain, other = point(0), point(3)
    distilled = replace(other, options=ExportOptions(quantization=QuantizeOptions(distill=4096)))
    planned = Planned([plain, distilled], [], CONFIG)
    for gpu in (False, True):
        course = Course(options(tmp_path), planned, gpu=gpu)
        placed = {unit.id for unit in course.everything() if GPU in unit.needs}
        assert placed == ({course.quantizing(distilled).id} if gpu else set())


def test_only_calibrations_are_split_and_only_where_that_is_requested(tmp_path: Path) -> None:
    plain, calibrated = point(0), replace(point(3), calibration_tokens=8192)
    planned = Planned([plain, calibrated], [], CONFIG)
    for split in (False, True):
        course = Course(options(tmp_path, where=Where(split=split)), planned)
        found = {unit.id for unit in course.everything() if unit.job.split}
        assert found == ({course.quantizing(calibrated).id} if split else set())
