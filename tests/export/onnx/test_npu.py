"""Bundles for Qualcomm's NPU: on the CPU they compute what ordinary bundles compute, on the emulated NPU nearly so."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.checkpoints import DEMO, hf_holding, hf_windowed, relative_error
from support.commands import refused, run
from support.lowered import lower_bundle, prefilled, some_ids
from support.on_accelerator import logits_on
from support.rewinding import worst_error

import gemma_edge
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.comparison import Comparison
from gemma_edge.errors import InputError
from gemma_edge.export import report
from gemma_edge.export.adapter.make import AdapterOptions, make_adapter
from gemma_edge.export.backend import exporter
from gemma_edge.export.gate import verify as gate
from gemma_edge.export.onnx.backend import FLOAT_ACTIVATIONS, OnnxBackend
from gemma_edge.export.onnx.lowering import STATIC_FILES
from gemma_edge.export.onnx.plain import weights_of
from gemma_edge.export.onnx.plain_check import check_static_graph
from gemma_edge.export.onnx.weights import blobs_of
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.recipe import Recipe, make_recipe
from gemma_edge.runtimes.engines.qualcomm import npu

CONTEXT, CHUNK = 24, 16
# UNEVEN: 73 tokens, the 30 in two chunks: past windows of 5 and 8, and the context
UNEVEN = [7, 3, 1, 7, 2, *[1] * 3, 5, 6, 30, 9]
EXACT = 1e-5  # of the range: two orders of additions in float32; measured 4e-7
needs_emulator = pytest.mark.skipif(
    not npu.has_package() or not npu.is_simulated(),
    reason="Qualcomm's emulated NPU is not here: pip install onnxruntime-qnn, on x86",
)


def make(folder: Path, out: Path, recipe: Recipe, context: int = CONTEXT) -> tuple[QuantizedCheckpoint, Path]:
    return lower_bundle(
        exporter("onnx", "npu:qualcomm"), folder, out, recipe, context, CHUNK, accelerator="npu:qualcomm"
    )


def make_plain(folder: Path, out: Path, recipe: Recipe, context: int = CONTEXT) -> Path:
    """The ordinary bundle of the same integers, with float activations."""
    return lower_bundle(OnnxBackend(accuracy_level=FLOAT_ACTIVATIONS), folder, out, recipe, context, CHUNK)[1]


@pytest.fixture(scope="module")
def odd(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles of a random model with rows of 96 and 160, three query heads for each key head: for the NPU, and ordinary."""
    out, folder = tmp_path_factory.mktemp("odd"), checkpoint("odd_sizes")
    (out / "plain").mkdir()
    return make(folder, out, make_recipe(4))[1], make_plain(folder, out / "plain", make_recipe(4))


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Path]:
    """An unquantized bundle."""
    return make(checkpoint("tiny"), tmp_path_factory.mktemp("tiny"), make_recipe(32))


@pytest.mark.parametrize("shape", ["gemma3_odd", "untied"])
def test_unquantized_graphs_equal_transformers_in_uneven_chunks_past_window_and_context(
    shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(shape)
    quantized, bundle = make(folder, tmp_path, make_recipe(32))
    ids = some_ids(sum(UNEVEN), quantized.config.vocab_size)
    weights = {name: value for name, value in quantized.load().state_dict().items() if "inv_freq" not in name}
    expected = hf_windowed(
        hf_holding(folder, weights),
        torch.tensor(ids),
        local_window=min(CONTEXT, quantized.config.sliding_window),
        global_window=CONTEXT,
    )
    runtime = gemma_edge.load(bundle, accelerator="cpu", threads=1)
    found = prefilled(runtime, ids, UNEVEN)
    assert relative_error(found, expected[np.cumsum(UNEVEN) - 1]) <= EXACT
    assert relative_error(torch.from_numpy(runtime.score(ids)), expected) <= EXACT


def test_integers_compute_on_the_cpu_what_the_ordinary_bundle_computes(odd: tuple[Path, Path]) -> None:
    static, plain = (gemma_edge.load(bundle, accelerator="cpu", threads=1) for bundle in odd)
    ids = some_ids(sum(UNEVEN), static.vocab_size)
    assert static.computes_on == "cpu"
    assert relative_error(prefilled(static, ids, UNEVEN), prefilled(plain, ids, UNEVEN)) <= EXACT


def test_what_is_taken_back_or_restored_leaves_no_trace(odd: tuple[Path, Path]) -> None:
    """A chunk shorter than the graph is filled up: nothing of that may stay in the cache."""
    runtime = gemma_edge.load(odd[0], accelerator="cpu", threads=1)
    ids = some_ids(80, runtime.vocab_size)
    worst, free, _ = worst_error(runtime, ids, (0, 3, 23, 40, 70), (1, 5, 17))
    assert free and worst <= EXACT * 60


def test_the_graphs_hold_plain_operators_four_bits_and_static_shapes(odd: tuple[Path, Path]) -> None:
    settings = Manifest.load(odd[0]).backends["onnx"].settings
    assert settings.roles == {**STATIC_FILES} and settings.genai is None and settings.accuracy_level == 0
    for role in ("generate", "prefill", "score"):
        graph = ir.load(odd[0] / settings.roles[role]).graph
        assert all(isinstance(size, int) for value in (*graph.inputs, *graph.outputs) for size in value.shape or ["?"])
        assert {node.domain for node in graph} == {"", "com.microsoft"}
        assert {node.op_type for node in graph if node.domain} == {"MatMulNBits"}
        assert {node.attributes["bits"].as_int() for node in graph if node.domain} == {4, 8}  # the table has 8


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda graph: _rename(graph, "Tanh", "Erf"), "4 Tanh nodes, expected 5"),
        (lambda graph: _rename(graph, "Expand", "Tile"), "Tile is no plain operator"),
        (lambda graph: _reshape(graph, "mask_0", [1, 22]), r"mask_0', \(1, 22\).*expected .*\(1, 23\)"),
        (lambda graph: _reshape(graph, "inputs_embeds", [1, "tokens", 64]), "inputs_embeds"),
        (lambda graph: graph.inputs.reverse(), "expected"),
    ],
)
def test_a_graph_that_is_not_plain_or_not_the_models_fails_the_check(
    spoil: Callable[[ir.Graph], None], message: str, tiny: tuple[QuantizedCheckpoint, Path], tmp_path: Path
) -> None:
    quantized, bundle = tiny
    blobs = weights_of(quantized.config, blobs_of(quantized, quantized.configs, 32))["generate"]
    cache = Manifest.load(bundle).backends["onnx"].cache

    def check(name: str) -> None:
        check_static_graph(bundle / name, "generate", quantized.config, quantized.configs, cache, blobs)

    check("generate.onnx")
    model = ir.load(bundle / "generate.onnx")
    spoil(model.graph)
    ir.save(model, bundle / "odd.onnx")
    with pytest.raises(RuntimeError, match=message):
        check("odd.onnx")


def _rename(graph: ir.Graph, old: str, new: str) -> None:
    next(node for node in graph if node.op_type == old).op_type = new


def _reshape(graph: ir.Graph, name: str, shape: list[int | str]) -> None:
    next(value for value in graph.inputs if value.name == name).shape = ir.Shape(shape)


@needs_emulator
def test_the_emulated_npu_computes_what_the_cpu_computes(odd: tuple[Path, Path], tmp_path: Path) -> None:
    """In float16, and nothing of it on the CPU: past window and context, in uneven chunks."""
    compare(odd[0], odd[1], UNEVEN, tmp_path, relative=0.01)


@needs_emulator
def test_the_emulated_npu_computes_the_demo(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    bundle, recipe = make(DEMO, tmp_path, make_recipe(4))[1], make_recipe(4)
    compare(bundle, make_plain(DEMO, tmp_path / "plain", recipe), [16, 9, 1, 16, 3, 1], tmp_path, relative=0.01)


def compare(bundle: Path, plain: Path, chunks: list[int], out: Path, *, relative: float) -> None:
    """The bundle on the NPU against the ordinary one of the same integers on the CPU."""
    ids = some_ids(sum(chunks), Manifest.load(bundle).config.vocab_size)
    found = logits_on(bundle, "npu:qualcomm", ids, chunks, out / "npu.npy")
    expected = prefilled(gemma_edge.load(plain, threads=1), ids, chunks).numpy()
    compared = Comparison()
    compared.add(found, expected, np.zeros(len(found), np.int64))
    figures = compared.to_json()
    assert figures["kl"] <= 2e-3 and figures["top1"] >= 0.98, figures
    assert figures["max_abs_logit_difference"] <= relative * figures["logit_range"], figures
    assert figures["max_abs_logit_difference"] > 1e-5 * figures["logit_range"], "float16 was not computed with"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ("--backend", "executorch"),
            ("the executorch backend is made for cpu or coreml or vulkan only", "--backend onnx"),
        ),
        (("--backend", "tflite"), ("the tflite backend is made for cpu or gpu only", "--backend onnx")),
        (("--kv-bits", "8"), ("the onnx backend for npu:qualcomm keeps its cache in float32", "--kv-bits 32")),
        (("--pinned", "4"), ("the onnx backend for npu:qualcomm keeps no beginning of a text", "--pinned 0")),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    refused(run("plan", DEMO, "--accelerator", "npu:qualcomm", *options), *parts)


def test_without_the_package_for_an_ordinary_bundle_and_with_an_adapter_the_npu_is_refused(
    odd: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="was made for the cpu; export it with accelerator npu:qualcomm"):
        gemma_edge.load(odd[1], accelerator="npu:qualcomm")
    with pytest.raises(InputError, match="was made for the npu:qualcomm, where adapters are not switched"):
        make_adapter(AdapterOptions(adapter="nowhere", base=odd[0], out=odd[0].parent / "adapter"))
    monkeypatch.setattr(npu, "PACKAGE", "onnxruntime_of_nobody")
    with pytest.raises(InputError, match=r"onnxruntime-qnn is not installed: pip install 'gemma-edge\[qnn\]'"):
        gemma_edge.load(odd[0])


def test_the_gate_takes_the_emulator_for_small_models_only_and_says_where_it_judged(
    odd: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu, "PACKAGE", "onnxruntime")  # something that is installed
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert gate.place_of("npu:qualcomm", 1000) == gate.Place("npu:qualcomm")
    assert gate.place_of("npu:qualcomm", gate.MAX_SIMULATED + 1) == gate.Place("cpu")
    monkeypatch.setattr(platform, "machine", lambda: "ARM64")  # a machine that may have one
    assert gate.place_of("npu:qualcomm", 10**10) == gate.Place("npu:qualcomm")
    monkeypatch.setattr(npu, "PACKAGE", "onnxruntime_of_nobody")
    assert gate.place_of("npu:qualcomm", 1000) == gate.Place("cpu")
    backends, result = Manifest.load(odd[0]).backends, type("Result", (), {"judged_on": "cpu"})()
    (line,) = report.unjudged_lines(backends, {"onnx": result})
    assert "NOT VERIFIED on the npu:qualcomm" in line
    result.judged_on = npu.SIMULATOR
    assert report.unjudged_lines(backends, {"onnx": result}) == []
