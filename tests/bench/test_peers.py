"""--peer: onnxruntime-genai on the demo's own bundle, llama-bench where it is installed, and its output as it was recorded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.toys import write_toy_bundle

from gemma_edge.bench import result as bench_result
from gemma_edge.bench.cli import main
from gemma_edge.export.api import Export

# What `llama-bench -o json --progress` of llama.cpp 0c1e570 prints, keys that are not read left out.
LLAMA_BENCH = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
*" -p 0 "*)
    echo "llama-bench: benchmark 1/1: starting" >&2
    echo "llama-bench: benchmark 1/1: warmup generation run" >&2
    echo "llama-bench: benchmark 1/1: generation run 1/2" >&2
    echo '[{{"build_commit": "0c1e570", "model_size": 96576768, "n_prompt": 0, "n_gen": 4, "n_depth": 3,
           "samples_ns": [ 400000000, 200000000 ], "samples_ts": [ 10, 20 ]}}]' ;;
*)
    echo "llama-bench: benchmark 1/1: starting" >&2
    echo "llama-bench: benchmark 1/1: warmup prompt run" >&2
    echo "llama-bench: benchmark 1/1: prompt run 1/2" >&2
    echo '[{{"build_commit": "0c1e570", "model_size": 96576768, "n_prompt": 3, "n_gen": 0, "n_depth": 0,
           "samples_ns": [ 30000000, 60000000 ], "samples_ts": [ 100, 50 ]}}]' ;;
esac
"""
FEW = ("-p", "3", "-n", "4", "-r", "2", "-t", "1")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A `llama-bench` on the PATH; where it logs its calls."""
    program, log = folder / "llama-bench", folder / "calls"
    program.write_text(script.format(log=log))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.mark.skipif(os.name != "posix", reason="no sh on this system")
def test_llama_bench_is_asked_for_the_same_and_its_numbers_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = stand_in(tmp_path, monkeypatch, LLAMA_BENCH)
    model, saved = tmp_path / "model.gguf", tmp_path / "out.json"
    model.write_bytes(b"GGUF")
    done = run("--peer", f"llama.cpp:{model}", *FEW, "--save", saved)
    assert done.exit_code == 0, done.output
    prompt, decode = log.read_text().splitlines()
    assert f"-m {model} -t 1 -p 3 -n 0 -r 2 -o json --progress" in prompt
    assert f"-m {model} -t 1 -p 0 -n 4 -d 3 -r 2 -o json --progress" in decode
    (result,) = bench_result.load([saved])
    assert (result.tool, result.model["name"], result.model["backend"]) == ("llama-bench", "model.gguf", "llama.cpp")
    assert result.prefill_s == [0.03, 0.06] and result.decode_s == [0.4, 0.2]
    assert (result.decode_ms, result.ttft_s) == ([], [])
    assert result.versions == {"llama.cpp": "0c1e570"} and result.model["read_bytes_per_token"] == 96576768
    assert set(result.load) == {"warm_s"}


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("#!/bin/sh\necho 'error: failed to load model' >&2\nexit 1\n", "failed: failed to load model"),
        ("#!/bin/sh\necho nonsense\n", "printed no result: 'nonsense"),
        ("#!/bin/sh\nkill -SEGV $$\n", "failed: killed by signal 11"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="no sh on this system")
def test_a_llama_bench_that_fails_is_one_line(
    script: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, script)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    done = run("--peer", f"llama.cpp:{tmp_path / 'model.gguf'}", *FEW)
    assert done.exit_code == 1 and part in done.stdout and "Traceback" not in done.output


def test_genai_runs_our_bundle_beside_our_runtime(demo: Export, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    saved = tmp_path / "out.json"
    done = run(demo.bundle, "--peer", "genai", "-p", "8", "-n", "4", "-r", "2", "-t", "1", "--save", saved)
    assert done.exit_code == 0, done.output
    ours, theirs = bench_result.load([saved])
    assert (ours.tool, theirs.tool) == ("gemma-bench", "onnxruntime-genai")
    assert (ours.model["name"], ours.model["backend"]) == ("bundle", "onnx") and theirs.model["backend"] == "genai"
    assert [len(row) for row in theirs.decode_ms] == [4, 4] and "onnxruntime-genai" in theirs.versions
    # the same weights file is mapped by both
    assert theirs.memory["peak_mib"] > (demo.bundle / "model.onnx.data").stat().st_size / 2**20


def test_more_than_genai_holds_is_one_line(demo: Export) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    done = run("--peer", f"genai:{demo.bundle}", "-p", "510", "-n", "4", "-r", "1", "-t", "1")
    assert done.exit_code == 1
    assert "failed: onnxruntime-genai holds 512 tokens here, 515 are asked for" in done.stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["{toy}", "--peer", "mlc"], ["--peer mlc", "none of llama.cpp, genai"]),
        (["{toy}", "--peer", "llama.cpp"], ["--peer llama.cpp:FILE.gguf"]),
        (["{toy}", "--peer", "llama.cpp:{tmp}/no.gguf"], ["there is no file"]),
        (["{toy}", "--peer", "genai"], ["toy has no genai_config.json", "onnxruntime-genai"]),
        (["--peer", "genai:{tmp}"], ["has no genai_config.json", "onnxruntime-genai"]),
    ],
)
def test_a_peer_that_cannot_run_is_refused(
    args: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    stand_in(tmp_path, monkeypatch, LLAMA_BENCH)
    toy = write_toy_bundle(tmp_path / "toy")
    done = run(*(arg.format(toy=toy, tmp=tmp_path) for arg in args), *FEW)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    for part in parts:
        assert part in line, line


def test_a_peer_that_is_not_installed_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("--peer", "llama.cpp:x.gguf", *FEW)
    assert done.exit_code == 2 and "needs llama-bench on the PATH" in done.stderr
