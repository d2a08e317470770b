"""`gemma-sweep` as a user types it: a small sweep of the demo, what a second one takes over, and every refusal."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed", reason="distributed is not installed: pip install 'gemma-edge[sweep]'")
pytest.importorskip("optuna", reason="optuna is not installed: pip install 'gemma-edge[sweep]'")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gemma-edge[sweep]'")

from support.checkpoints import DEMO
from support.commands import refused
from support.sweeping.command import SMALL, run

from gemma_edge.bundle.manifest import Manifest, check_hashes


def test_a_point_is_measured_and_the_picked_one_is_published_with_its_gate(swept: tuple[Path, dict[str, Any]]) -> None:
    out, found = swept
    (row,) = found["rows"]
    assert row["state"] == "measured" and row["front"] and row["picked"] and 0 < row["kl"] < 0.1
    kinds = ("quantize", "lower", "reference", "evaluate")
    assert found["units"] == {kind: {"computed": 1, "reused": 0} for kind in sorted(kinds)}
    manifest = Manifest.load(out / "bundle")
    check_hashes(out / "bundle", manifest)
    assert manifest.verification["onnx"].passed and manifest.recipe.name == "int4-g32"
    assert row["bytes"] > row["weights_bytes"] and row["export_cpu_s"] > 0
    (line,) = csv.DictReader((out / "sweep.csv").open())
    assert line["option_group_size"] == "32" and float(line["kl"]) == pytest.approx(row["kl"])
    page = (out / "sweep.html").read_text()
    assert "<svg" in page and "PICK" in page
    assert json.loads((out / "sweep.json").read_text())["rows"] == found["rows"]


def test_a_sweep_that_overlaps_takes_over_what_is_done(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, before = swept
    # the second value cannot be exported, so that nothing has to be computed at all
    again = run(
        *(DEMO, "-o", tmp_path / "second", "--bits", "4", "--group-size", "32,33", *SMALL),
        *("--store", out / "units", "--json"),
    )
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert {kind: counts["computed"] for kind, counts in found["units"].items()} == dict.fromkeys(before["units"], 0)
    first, left_out = found["rows"]
    figures = ("bytes", "kl", "ppl", "top1", "export_cpu_s", "recipe")
    assert {name: first[name] for name in figures} == {name: before["rows"][0][name] for name in figures}
    assert left_out["state"] == "left out" and "33 is not a multiple of 32" in left_out["reason"]


def test_a_plan_counts_what_is_not_done_and_computes_nothing(swept: tuple[Path, dict[str, Any]]) -> None:
    out, _ = swept
    before = sorted(out.rglob("*"))
    space = ("--bits", "4", "--method", "rtn,gptq", "--group-size", "32", "--backend", "onnx", "--context", "256")
    done = run("plan", DEMO, "-o", out, *space, "--max-tokens", "128", "--no-bench", "--nodes", "1,3", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["points"] == 2 and {one["kind"]: one["count"] for one in found["work"]} == {
        kind: 1 for kind in ("quantize", "lower", "evaluate")
    }
    assert all(one["seconds"] > 0 for one in found["work"])
    assert 0 < found["seconds"]["3"] <= found["seconds"]["1"] == pytest.approx(sum(w["seconds"] for w in found["work"]))
    assert sorted(out.rglob("*")) == before
    table = run("plan", DEMO, "-o", out, *space, "--max-tokens", "128", "--no-bench")
    assert "4 nodes: at least" in table.stdout
    refused(run("plan", DEMO, "-o", out, *space, "--nodes", "0"), "--nodes 0", "at least one node")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--bits", "5"], ["--bits 5", "supported: 4, 8, 16, 32"]),
        (["--method", "gptz"], ["--method gptz", "supported: rtn"]),
        (["--bits", "4", "--group-size", "33"], ["no point of the space can be exported", "not a multiple of 32"]),
        ([], ["the space is empty", "--bits 4,8"]),
        (
            ["--bits", "4", "--max-size", "1kB"],
            ["--max-size 1000 bytes: no point is that small", "the nearest is bits 4"],
        ),
        (["--bits", "4", "--max-size", "little"], ["--max-size little", "such as 1.5GB"]),
        (["--bits", "4", "--max-ram", "1MB"], ["--max-ram 1000000 bytes", "the nearest is bits 4"]),
        (["--bits", "4", "--max-kl", "0"], ["--max-kl 0 is not above 0"]),
        (["--bits", "4", "--pick", "best"], ["--pick best", "supported: decode, kl, size"]),
        (["--bits", "4", "--pick", "decode", "--no-bench"], ["--pick needs benchmarks", "--no-bench"]),
        (["--bits", "4", "--min-decode", "5", "--no-bench"], ["--min-decode needs benchmarks"]),
        (["--bits", "4", "--budget", "0"], ["--budget 0 is below 1"]),
        (["--bits", "4", "--split"], ["--split needs the nodes of a cluster", "--address"]),
        (["--bits", "4", "--retries", "-1"], ["--retries -1 is below 0"]),
        (["--bits", "4", "--no-bench", "--decode", "5"], ["--decode has no effect beside --no-bench"]),
        (["--bits", "4", "--decode", "0"], ["--decode 0 is not within"]),
        (["--bits", "4", "--target", "toaster"], ["--target toaster", "android"]),
        (["--bits", "4", "--verify", "maybe"], ["--verify maybe"]),
        (["--bits", "4", "--space", "nowhere.toml"], ["--space nowhere.toml does not exist"]),
        (["--bits", "4", "--address", "tcp://127.0.0.1:9"], ["--address tcp://127.0.0.1:9 does not answer"]),
        (["--bits", "4", "--address", "nonsense://x"], ["--address nonsense://x does not answer"]),
    ],
)
def test_what_cannot_be_used_is_one_line(args: list[str], parts: list[str], tmp_path: Path) -> None:
    refused(run(DEMO, "-o", tmp_path / "deep" / "out", *args), *parts)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_none(tmp_path: Path) -> None:
    refused(run(tmp_path / "no-model", "-o", tmp_path / "out", "--bits", "4"), "no-model")


def test_a_folder_that_is_no_sweep_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(run(DEMO, "-o", tmp_path / "mine", "--bits", "4"), "exists and is not the folder of a sweep")
    (tmp_path / "file").write_text("")
    refused(
        run(DEMO, "-o", tmp_path / "out", "--bits", "4", "--store", tmp_path / "file"), "--store", "cannot be written"
    )
    refused(run(DEMO, "-o", tmp_path / "file" / "out", "--bits", "4"), "cannot write")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_a_node_for_a_scheduler_that_is_not_there(tmp_path: Path) -> None:
    refused(run("node", "tcp://127.0.0.1:9"), "does not answer")


def test_limits_that_no_point_keeps_leave_the_table_and_name_the_nearest(swept: tuple[Path, dict[str, Any]]) -> None:
    out, before = swept
    shutil.rmtree(out / "bundle", ignore_errors=True)
    done = run(DEMO, "-o", out, "--bits", "4", "--group-size", "32", *SMALL, "--pick", "kl", "--max-kl", "0.000001")
    refused(done, "no point keeps to --max-kl 1e-06", "the nearest is bits 4")
    assert json.loads((out / "sweep.json").read_text())["rows"][0]["kl"] == before["rows"][0]["kl"]
    assert not (out / "bundle").exists()
