"""An int8 KV cache through the real pipeline: when it is taken, what the bundle then holds, and how a wrong one is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import DEMO, hf_model
from support.kv8 import kv_ranges
from tokenizers import Tokenizer

import gemma_edge
from gemma_edge.bundle.backends import BackendInfo
from gemma_edge.bundle.manifest import MANIFEST, Manifest, check_hashes
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export.api import Export
from gemma_edge.export.cli import main
from gemma_edge.export.gate import verify
from gemma_edge.export.onnx.check import check_graph
from gemma_edge.export.onnx.weights import layout
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import MIB, Requested, choose_kv_dtype, geometry, make_plan
from gemma_edge.export.targets import TARGETS
from gemma_edge.model import layerwise
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.model.config import GEMMA2_2B
from gemma_edge.quantize.checkpoint.kv_scales import KVRanges, write_kv_scales
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import make_recipe

TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.
In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was upon the face
of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be light: and there was light."""


@pytest.fixture(scope="session")
def ranges() -> KVRanges:
    """Of the demo model over a little text, twice: also at positions that it alone does not reach."""
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    return kv_ranges(hf_model(DEMO), torch.tensor([2, *ids, *reversed(ids)]))


@pytest.fixture(scope="session")
def model(ranges: KVRanges, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, quantized and with scales: what `--save-checkpoint` leaves of a calibrated export."""
    folder = tmp_path_factory.mktemp("calibrated") / "checkpoint"
    write_quantized(Checkpoint.open(DEMO), make_recipe(8), folder)
    write_kv_scales(folder, ranges.scales())
    return folder


@pytest.fixture(scope="session")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exported with defaults: for a phone."""
    folder = tmp_path_factory.mktemp("int8_kv")
    return pipeline.export(
        ExportOptions(model=str(model), out=folder / "bundle", save_checkpoint=folder / "checkpoint")
    )


def test_phones_get_an_int8_cache_that_passes_the_gate_where_scales_are_there(done: Export) -> None:
    manifest = Manifest.load(done.bundle)
    assert manifest.backends["onnx"].cache.dtype == manifest.backends["onnx"].plan.kv_dtype == "int8"
    result = manifest.verification["onnx"]
    assert result.passed and result.past_wrap and result.quality.kl < 0.01


def test_cache_and_weights_file_have_exactly_the_planned_bytes(done: Export) -> None:
    manifest = done.manifest
    names = ("generate.onnx", "score.onnx", "genai.onnx")
    assert all(manifest.files[name].bytes < 300_000 for name in names)
    assert manifest.files["model.onnx.data"].bytes == manifest.backends["onnx"].plan.weights_bytes
    session = ort.InferenceSession(done.bundle / "generate.onnx")
    shapes = [node.shape for node in session.get_inputs() if node.name.startswith("past_key_values.")]
    assert {node.type for node in session.get_inputs() if node.name.startswith("past_key_values.")} == {"tensor(int8)"}
    assert (
        sum(int(np.prod(shape)) for shape in shapes)
        == manifest.backends["onnx"].cache.bytes
        == manifest.backends["onnx"].plan.kv_bytes
    )


def test_the_saved_checkpoint_keeps_the_scales(done: Export, model: Path) -> None:
    kept, given = (QuantizedCheckpoint.open(folder).kv_scales for folder in (done.bundle.parent / "checkpoint", model))
    assert kept is not None and given is not None
    for layer, pair in given.items():
        for found, expected in zip(kept[layer], pair, strict=True):
            assert torch.equal(found, expected)


def test_genai_gives_the_same_greedy_tokens_with_int8_caches(done: Export) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    prompt, length = [2, 300, 17, 999, 45], 300  # more than the local window of 128
    parameters = genai.GeneratorParams(genai.Model(str(done.bundle)))
    parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = genai.Generator(genai.Model(str(done.bundle)), parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)]
    runtime = gemma_edge.load(done.bundle)
    ours, logits = list(prompt), runtime.prefill(prompt)
    while len(ours) < length:
        logits[[1, 5]] = -np.inf  # with min_length genai bans the stop ids
        ours.append(int(logits.argmax()))
        logits = runtime.decode(ours[-1])
    assert ours == theirs


def _rename_scales(node: onnx.NodeProto) -> None:
    node.input[12] = "model.layers.1.self_attn.k_scale"


def _swap_scales(node: onnx.NodeProto) -> None:
    node.input[12], node.input[13] = node.input[13], node.input[12]


def _swap_caches(node: onnx.NodeProto) -> None:
    node.input[3], node.input[4] = node.input[4], node.input[3]


def _per_tensor(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "v_quant_type").s = b"PER_TENSOR"


DAMAGE: dict[str, tuple[Callable[[onnx.NodeProto], None], str]] = {
    "another layer's scales": (_rename_scales, "attention 0 reads model.layers.1.self_attn.k_scale, expected"),
    "scales of K and V swapped": (_swap_scales, "attention 0 reads model.layers.0.self_attn.v_scale, expected"),
    "caches swapped": (_swap_caches, "attention 0 reads past_key_values.0.value, expected past_key_values.0.key"),
    "one scale per tensor": (_per_tensor, "layer 0 attends with v_quant_type PER_TENSOR over a cache of int8"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_wrong_wiring_of_caches_and_scales_is_refused_after_lowering(
    damage: Callable[[onnx.NodeProto], None], message: str, done: Export, model: Path, tmp_path: Path
) -> None:
    graph = onnx.load(done.bundle / "generate.onnx", load_external_data=False)
    damage(next(node for node in graph.graph.node if node.op_type == "GroupQueryAttention"))
    path = tmp_path / "generate.onnx"
    onnx.save(graph, path)
    quantized = QuantizedCheckpoint.open(model)
    blobs = layout(quantized.config, quantized.configs, {}, int8_kv=True)
    cache = done.manifest.backends["onnx"].cache
    with pytest.raises(RuntimeError, match=message):
        check_graph(path, quantized.config, quantized.configs, cache, blobs, windowed=True)
    floats = replace(cache, dtype="float32")
    with pytest.raises(RuntimeError, match="attention 0 reads model.layers.0.self_attn.k_scale, expected None"):
        check_graph(done.bundle / "generate.onnx", quantized.config, quantized.configs, floats, blobs, windowed=True)


def test_runtime_refuses_a_graph_whose_caches_are_of_another_type_than_the_manifest_says(
    done: Export, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(done.bundle, tmp_path / "copy"))
    data = json.loads((copy / MANIFEST).read_text())
    entry = data["backends"]["onnx"]
    entry["cache"]["dtype"] = entry["plan"]["kv_dtype"] = "float32"  # the manifest itself agrees
    entry["plan"]["kv_bytes"] *= 4
    (copy / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"past_key_values.0.key is tensor\(int8\) .* manifest says tensor\(float\)"):
        gemma_edge.load(copy)


def test_scales_that_clip_everything_fail_the_gate_and_the_default_goes_back_to_float32(
    ranges: KVRanges, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    write_kv_scales(folder, ranges.scales(0.05))
    options = ExportOptions(model=str(folder), out=tmp_path / "out")
    with pytest.raises(InputError, match="differs too much from the original"):
        pipeline.export(replace(options, kv_bits=8))
    done = pipeline.export(options)
    assert "with its KV cache in int8 the onnx bundle differs too much" in caplog.text and "lowering" in caplog.text
    manifest = Manifest.load(done.bundle)
    assert (
        manifest.backends["onnx"].cache.dtype == manifest.backends["onnx"].plan.kv_dtype == "float32"
        and manifest.verification["onnx"].passed
    )
    assert manifest.backends["onnx"].cache.bytes == manifest.backends["onnx"].plan.kv_bytes
    assert manifest.files["model.onnx.data"].bytes == manifest.backends["onnx"].plan.weights_bytes
    assert [stage.name for stage in done.stages] == ["quantize", *2 * ["lower onnx", "hash", "verify"]]


def test_a_second_try_makes_and_judges_only_what_failed_by_the_same_references(
    toy: BackendInfo, ranges: KVRanges, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything was lowered and judged again, and the references, most of the time, were computed again."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    write_kv_scales(folder, ranges.scales(0.05))
    references, judged, judge, hidden_states = [], [], verify._judge, layerwise.hidden_states

    def count_references(*args: Any, **options: Any) -> torch.Tensor:
        references.append(args)
        return hidden_states(*args, **options)

    def count_judged(gate: Path, *args: Any) -> dict[str, Any]:
        judged.append(json.loads((gate / "task.json").read_text())["backend"]["name"])
        return judge(gate, *args)

    monkeypatch.setattr(layerwise, "hidden_states", count_references)
    monkeypatch.setattr(verify, "_judge", count_judged)
    options = ExportOptions(model=str(folder), out=tmp_path / "out", backend="toy,onnx", context=512)
    done = pipeline.export(options)
    once = ["quantize", "lower toy", "lower onnx", "hash", "verify"]
    assert [stage.name for stage in done.stages] == [*once, "lower onnx", "hash", "verify"]
    assert judged == ["toy", "onnx", "onnx"] and len(references) == 2
    assert list(done.manifest.verification) == list(done.manifest.backends) == ["toy", "onnx"]
    assert all(result.passed for result in done.manifest.verification.values())
    assert done.manifest.backends["onnx"].cache.dtype == "float32"
    check_hashes(done.bundle, Manifest.load(done.bundle))


def test_which_cache_is_taken() -> None:
    found = {
        (asked, target.name, calibrated): choose_kv_dtype(
            asked, target, "onnx", head_dim=48, calibrated=calibrated, hint=""
        )
        for asked in (None, 8, 32)
        for target in TARGETS.values()
        for calibrated in (False, True)
        if not (asked == 8 and not calibrated)
    }
    int8 = {(8, name, True) for name in TARGETS} | {(None, "android", True)}
    assert {case for case, dtype in found.items() if dtype == "int8"} == int8
    assert {dtype for case, dtype in found.items() if case not in int8} == {"float32"}


@pytest.mark.parametrize(
    ("bits", "message"),
    [("8", "error: --kv-bits 8 needs calibration, which finds"), ("4", "error: --kv-bits 4; supported: 8, 32")],
)
def test_a_cache_that_cannot_be_is_refused_in_one_line(bits: str, message: str) -> None:
    result = CliRunner().invoke(main, ["plan", str(DEMO), "--quality", "fast", "--kv-bits", bits])
    assert result.exit_code == 2 and result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_a_head_that_the_kernel_cannot_take_gets_a_float32_cache(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """It was planned, lowered, and then refused by ONNX Runtime, by default too: its head_dim is 24."""
    folder = tmp_path / "model"
    quantized = write_quantized(Checkpoint.open(checkpoint("gemma1")), make_recipe(8), folder)
    unit = torch.ones(quantized.config.num_key_value_heads, quantized.config.head_dim)
    write_kv_scales(folder, {layer: (unit, unit) for layer in range(quantized.config.num_hidden_layers)})
    options = ExportOptions(model=str(folder), prefill_chunk=7)
    assert pipeline.open_model(options, plan_only=True).plans["onnx"].kv_dtype == "float32"
    with pytest.raises(InputError, match="head_dim is 24, .* onnx backend needs a multiple of 16; use kv_bits 32"):
        pipeline.open_model(replace(options, kv_bits=8), plan_only=True)


def test_plan_of_an_int8_cache_is_a_quarter_and_lets_a_larger_context_fit(model: Path) -> None:
    whole, quarter = (geometry(GEMMA2_2B, 8192, 128, dtype).bytes for dtype in ("float32", "int8"))
    assert whole == 4 * quarter == 8192 * (13 * (4096 + 127) + 13 * (8192 + 127))
    source, recipe, desktop = QuantizedCheckpoint.open(model), make_recipe(8), TARGETS["desktop"]
    int8, floats = (
        make_plan(source, recipe, desktop, "onnx", Requested(kv_dtype=dtype)) for dtype in ("int8", "float32")
    )
    assert floats.kv_bytes == 4 * int8.kv_bytes
    scales = 12 * 4096  # K and V of 6 layers, each 4 x 64 float32 in a page of its own
    assert floats.weights_bytes < int8.weights_bytes <= floats.weights_bytes + scales
    tight = replace(desktop, ram_bytes=int8.device_ram_bytes + 3 * MIB)
    assert make_plan(source, recipe, tight, "onnx", Requested(kv_dtype="int8")).context == 512
    assert make_plan(source, recipe, tight, "onnx").context == 256
