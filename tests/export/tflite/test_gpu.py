"""Bundles for LiteRT's GPU, run on SwiftShader where Chromium's is installed: the numbers of the CPU, past window and context."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import DEMO
from support.commands import refused, run
from support.lowered import lower_bundle, some_ids
from support.on_accelerator import logits_on
from support.tflite_bundles import UNEVEN

import gemma_edge
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.comparison import Comparison
from gemma_edge.errors import InputError
from gemma_edge.export import report
from gemma_edge.export.backend import exporter
from gemma_edge.export.gate import verify as gate
from gemma_edge.export.plan import geometry
from gemma_edge.model.config import GEMMA2_2B
from gemma_edge.quantize.recipe import make_recipe
from gemma_edge.runtimes.engines import software_gpu

CHANNELS = make_recipe(8, group_size=0, method="rtn")
CONTEXT, CHUNK = 24, 16
needs_swiftshader = pytest.mark.skipif(
    software_gpu.swiftshader() is None, reason="SwiftShader is not installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def odd(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the GPU of a random model with one key head, five query heads and windows of five."""
    out, half = tmp_path_factory.mktemp("odd"), exporter("tflite", "gpu")
    return lower_bundle(half, checkpoint("gemma3_odd"), out, CHANNELS, CONTEXT, CHUNK, accelerator="gpu")[1]


def test_a_bundle_for_the_gpu_has_two_signatures_and_slots_of_a_multiple_of_64(odd: Path) -> None:
    entry = Manifest.load(odd).backends["tflite"]
    assert entry.accelerator == entry.plan.accelerator == "gpu"
    assert [each.name for each in entry.settings.signatures] == [f"prefill_{CHUNK}", "decode"]
    assert {layer.slots % 64 for layer in entry.cache.layers} == {0}
    sizes = [geometry(GEMMA2_2B, 2048, 128, backend="tflite", accelerator=each) for each in ("cpu", "gpu")]
    assert all(cpu.slots <= gpu.slots < cpu.slots + 64 for cpu, gpu in zip(*(s.layers for s in sizes), strict=True))


@needs_swiftshader
def test_the_gpu_computes_what_the_cpu_computes(odd: Path, tmp_path: Path) -> None:
    """The same file on both, past window and context, in uneven chunks. The CPU rounds activations to int8, the GPU does not."""
    ids = some_ids(sum(UNEVEN), Manifest.load(odd).config.vocab_size)
    cpu, gpu = (logits_on(odd, where, ids, UNEVEN, tmp_path / f"{where}.npy") for where in ("cpu", "gpu"))
    compared = Comparison()
    compared.add(gpu, cpu, np.zeros(len(cpu), np.int64))
    figures = compared.to_json()
    assert figures["kl"] <= 2e-3 and figures["top1"] >= 0.98, figures


def test_the_cpu_runs_a_bundle_for_the_gpu_and_no_gpu_one_for_the_cpu(
    odd: Path, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gemma_edge.load(odd, accelerator="cpu", threads=1).computes_on == "cpu"
    plain = lower_bundle(exporter("tflite"), checkpoint("gemma3_odd"), tmp_path, CHANNELS, CONTEXT, CHUNK)[1]
    with pytest.raises(
        InputError, match="the tflite backend of .* was made for the cpu; export it with accelerator gpu"
    ):
        gemma_edge.load(plain, accelerator="gpu")
    onnx = lower_bundle(exporter("onnx"), checkpoint(), tmp_path / "onnx", CHANNELS, CONTEXT, CHUNK)[1]
    with pytest.raises(InputError, match="cannot run the onnx backend on the gpu; use accelerator cpu"):
        gemma_edge.load(onnx, accelerator="gpu")
    with pytest.raises(InputError, match="accelerator tpu; supported: cpu, gpu, npu:qualcomm"):
        gemma_edge.load(odd, accelerator="tpu")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--accelerator", "tpu"), ("--accelerator tpu", "cpu, gpu, npu:qualcomm")),
        (("--accelerator", "gpu"), ("the onnx backend is made for cpu or npu:qualcomm only", "--backend tflite")),
        (
            ("--backend", "executorch", "--accelerator", "gpu"),
            ("the executorch backend is made for cpu or coreml or vulkan only",),
        ),
        (("--backend", "tflite", "--accelerator", "npu:qualcomm"), ("the tflite backend is made for cpu or gpu only",)),
        (
            ("--backend", "tflite", "--accelerator", "gpu", "--group-size", "32"),
            ("has groups of 32: LiteRT's GPU delegate ends the process over them", "--group-size 0"),
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    refused(run("plan", DEMO, *options), *parts)


def test_without_a_gpu_or_a_stand_in_the_gate_runs_on_the_cpu_and_the_bundle_says_so(
    odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(software_gpu.DRIVERS, raising=False)
    monkeypatch.setattr(software_gpu, "NODES", ())
    folder = software_gpu.swiftshader()
    if folder is not None:
        assert gate.place_of("gpu", 1000) == gate.Place("gpu", {software_gpu.VARIABLE: str(folder)})
        assert gate.place_of("gpu", 2 * gate.MAX_STAND_IN) == gate.Place("cpu")
    monkeypatch.setattr(software_gpu, "PLACES", ())
    assert gate.place_of("gpu", 1000) == gate.Place("cpu") == gate.place_of("cpu", 1000)
    monkeypatch.setenv(software_gpu.DRIVERS, os.devnull)  # the user has named a driver
    assert gate.place_of("gpu", 1000) == gate.Place("gpu")
    backends, result = Manifest.load(odd).backends, type("Result", (), {"judged_on": "cpu"})()
    (line,) = report.unjudged_lines(backends, {"tflite": result})
    assert "NOT VERIFIED on the gpu" in line
    result.judged_on = software_gpu.NAME
    assert report.unjudged_lines(backends, {"tflite": result}) == []
