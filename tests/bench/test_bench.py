"""gemma-bench measures what it says: counts, bytes and memory against figures got in another way. No speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import ROOT

from gemma_edge.bench import bench, machine
from gemma_edge.bench import result as bench_result
from gemma_edge.bench import stats as bench_stats
from gemma_edge.bench.process import ChildFailed, watch
from gemma_edge.bench.result import Result, Settings
from gemma_edge.errors import InputError
from gemma_edge.export.api import Export


@pytest.fixture(scope="module")
def measured(demo: Export) -> list[Result]:
    """The demo's bundle with two prompts."""
    contenders, notes = bench.bundle_contenders([demo.bundle], None)
    assert notes == []
    return list(bench.Plan(contenders, [Settings(1, 8, 5, 3), Settings(1, 40, 5, 3)]).run())


def test_every_repetition_and_token_is_there_and_sums_agree(measured: list[Result]) -> None:
    for result, prefill in zip(measured, (8, 40), strict=True):
        assert (result.failure, result.settings.prefill) == ("", prefill)
        assert [len(row) for row in result.decode_ms] == [5, 5, 5]
        lists = (result.prefill_s, result.ttft_s, result.decode_s, result.decode_at_s)
        assert [len(values) for values in lists] == [3, 3, 3, 3]
        assert result.decode_s == pytest.approx([sum(row) / 1e3 for row in result.decode_ms])
        assert all(0 < prefill_s <= ttft_s for prefill_s, ttft_s in zip(result.prefill_s, result.ttft_s, strict=True))
        # what is not counted lies between: a repetition begins after the one before it has ended
        ends = [at_s + decode_s for at_s, decode_s in zip(result.decode_at_s, result.decode_s, strict=True)]
        assert all(end < next_at_s for end, next_at_s in zip(ends, result.decode_at_s[1:], strict=False))


def test_loads_and_memory_of_the_measured_process(measured: list[Result], demo: Export) -> None:
    for result in measured:
        assert set(result.load) == {"cold_s", "warm_s"} and min(result.load.values()) > 0
        memory = result.memory
        weights_mib = (demo.bundle / "model.onnx.data").stat().st_size / 2**20
        # a process of its own: this one, with torch in it, is several times as large
        assert weights_mib < memory["loaded_mib"] < 200
        assert memory["peak_mib"] >= memory["end_mib"] > weights_mib
        assert all(0 <= at_s and 0 < mib <= memory["peak_mib"] + 1 for at_s, mib in memory["samples"])


def test_bytes_per_token_are_the_weights_and_the_part_of_the_cache_that_is_seen(
    measured: list[Result], demo: Export
) -> None:
    cache = demo.manifest.backends["onnx"].cache
    row = 2 * cache.kv_heads * cache.head_dim * {"int8": 1, "float32": 4}[cache.dtype]
    for depth in (10, 200, 5000):
        rows = sum(min(depth, layer.window) for layer in cache.layers)
        assert bench.kv_bytes(cache, depth) == row * rows
    weights = (demo.bundle / "model.onnx.data").stat().st_size
    assert [result.model["read_bytes_per_token"] for result in measured] == [
        weights + bench.kv_bytes(cache, depth) for depth in (8 + 2, 40 + 2)
    ]


def test_the_json_comes_back_as_it_went(measured: list[Result], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(bench_result.to_json(measured))
    assert bench_result.to_json(bench_result.load([path])) == path.read_text()


def test_every_key_of_a_result_is_documented(measured: list[Result]) -> None:
    page = (ROOT / "docs" / "measure" / "benchmarking.md").read_text(encoding="utf-8")
    document = json.loads(bench_result.to_json(measured))
    found = set(document["results"][0])
    for part in ("model", "settings", "device", "load", "memory", "state"):
        found |= set(document["results"][0][part])
    found |= set(document["results"][0]["state"]["before"])
    assert {name for name in found if f"`{name}`" not in page} == set()


def test_rounds_go_in_turns(demo: Export) -> None:
    """A B, A B: not A A, B B."""
    order: list[tuple[str, int]] = []

    class Toy:
        tool = "toy"

        def __init__(self, name: str) -> None:
            self.model = {"name": name, "backend": "none"}

        def device(self, settings: Settings) -> dict[str, object]:
            return {"name": "here"}

        def measure(self, settings: Settings) -> dict[str, object]:
            order.append((self.model["name"], settings.prefill))
            if self.model["name"] == "b":
                raise ChildFailed("it broke")
            return {"prefill_s": [1.0]}

    results = list(bench.Plan([Toy("a"), Toy("b")], [Settings(1, 1, 1), Settings(1, 2, 1)], rounds=2).run())
    assert order == [("a", 1), ("a", 2), ("b", 1), ("b", 2)] * 2
    assert [result.failure for result in results] == ["", "", "it broke", "it broke"] * 2
    groups = list(bench_stats.groups(results).values())
    assert [len(group) for group in groups] == [2, 2, 2, 2]
    assert bench_stats.METRICS["prefill_tokens_per_s"].samples(groups[1]) == [2.0, 2.0]


def toy_result(decode_ms: Sequence[Sequence[float]], **changes: object) -> Result:
    settings = Settings(threads=2, prefill=100, decode=len(decode_ms[0]), repeat=len(decode_ms))
    rows = [list(row) for row in decode_ms]
    result = Result("gemma-bench", "", {"name": "m", "backend": "onnx"}, settings, {"name": "d"}, decode_ms=rows)
    result.decode_s = [sum(row) / 1e3 for row in rows]
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def test_statistics_against_numpy_and_by_hand() -> None:
    rng = np.random.default_rng(0)
    rows = rng.gamma(4.0, 10.0, (4, 50))
    result = toy_result(rows.tolist(), model={"name": "m", "backend": "onnx", "read_bytes_per_token": 2e9})
    result.device = {"name": "d", "read_gb_per_s": 100}
    found = bench_stats.summary([result])
    assert found["token_p95_ms"] == pytest.approx(np.percentile(rows, 95))
    assert found["decode_tokens_per_s"] == pytest.approx(np.median(50 / rows.sum(1) * 1e3))
    assert found["bandwidth_percent"] == pytest.approx(2 * np.median(50 / rows.sum(1) * 1e3))
    assert bench_stats.roofline_tokens_per_s([result]) == 50
    positions = bench_stats.by_position([result])
    assert [position for position, _ in positions] == list(range(100, 150))
    assert positions[3][1] == pytest.approx(1e3 / np.median(rows[:, 3]))
    assert found["load_cold_s"] is None and found["energy_j"] is None


def test_a_device_that_slows_down_is_seen_by_minute() -> None:
    # 50 ms a token for a minute, 100 ms in the second one: 1200 tokens, then 600
    result = toy_result([[50.0] * 1190], decode_at_s=[0.0])
    result.decode_ms.append([100.0] * 590)
    result.decode_at_s.append(60.0)
    assert dict(bench_stats.by_minute([result])) == pytest.approx({0: 20, 1: 10})
    assert bench_stats.throttling([result]) == pytest.approx(0.5)
    assert bench_stats.throttling([toy_result([[50.0] * 10], decode_at_s=[0.0])]) is None


def test_energy_counters_are_summed_over_packages_and_wrap(tmp_path: Path) -> None:
    for zone, value in (("intel-rapl:0", 900), ("intel-rapl:1", 50), ("intel-rapl:0:0", 10)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{value}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000\n")
    energy = machine.Energy(tmp_path)
    assert energy.source == "RAPL packages"
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")  # 200 further, past the end
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("80\n")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("99\n")  # a part of package 0
    assert energy.joules() == pytest.approx(230e-6)
    assert energy.joules() == 0
    assert machine.Energy(tmp_path / "none").source is None


def test_read_bandwidth_is_that_of_memory() -> None:
    """Wide bounds: no machine reads slower than 0.2 GB/s, none that fits on a desk faster than 2000."""
    assert 0.2 < machine.read_gb_per_s(1, size=1 << 24, passes=2) < 2000


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise on this system")
def test_files_are_dropped_from_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 22))
    assert bench.drop_from_cache([path])
    if cached(path) is None:
        pytest.skip("fincore of util-linux is not installed, or this file system has no page cache of its own")
    path.read_bytes()
    assert cached(path) == 1 << 22
    bench.drop_from_cache([path])
    assert cached(path) == 0


def cached(path: Path) -> int | None:
    """Bytes of a file in the system's cache, by util-linux."""
    try:
        done = subprocess.run(["fincore", "-b", "-n", "-o", "RES", path], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return int(done.stdout)


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("import sys; print('noise'); sys.exit('error: the reason')", "the reason"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9: probably not enough memory"),
        ("raise SystemExit(3)", "ended with status 3"),
    ],
)
def test_a_child_that_fails_says_why_in_one_line(code: str, part: str) -> None:
    with pytest.raises(ChildFailed) as caught:
        watch(lambda started_s: [sys.executable, "-c", code])
    assert str(caught.value) == part


def test_memory_of_a_child_is_followed_and_much_output_does_not_block() -> None:
    code = (
        "import sys, time; block = bytearray(60_000_000); print('ready', flush=True);"
        "print('x' * 1_000_000, file=sys.stderr); time.sleep(1)"
    )
    seen = watch(lambda started_s: [sys.executable, "-c", code])
    assert [line for _, line in seen.lines] == ["ready\n"] and len(seen.output) == 1_000_001
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc: memory is followed on Linux only")
    assert max(mib for _, mib in seen.samples) > 60_000_000 / 2**20


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "holds no results"),
        ("[]", "holds no results"),
        ('{"schema_version": 2, "results": []}', "schema_version 2, this gemma-bench reads 1"),
        ('{"schema_version": 1, "results": []}', "holds no result;"),
        ('{"schema_version": 1, "results": [{"tool": "x"}]}', "holds no results"),
    ],
)
def test_a_file_that_holds_no_results_is_refused(text: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        bench_result.read(text, "a.json")


def test_the_least_that_a_writer_must_tell_is_enough_and_more_is_ignored() -> None:
    least = {
        "tool": "x",
        "started": "",
        "model": {"name": "m", "backend": "b"},
        "settings": {"threads": 1, "prefill": 2, "decode": 3, "later": 4},
        "device": {"name": "d"},
        "new": 1,
    }
    (result,) = bench_result.read(json.dumps({"schema_version": 1, "results": [least]}), "a.json")
    assert result.settings == Settings(1, 2, 3) and result.failure == ""
    assert set(bench_stats.summary([result]).values()) == {None}
