"""Several backends in one bundle: the same integers in each, every one through the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'gemma-edge[executorch]'")
pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed: pip install 'gemma-edge[tflite]'")

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export.api import Export
from gemma_edge.export.executorch.packing import CODES, Constant
from gemma_edge.export.executorch.pte import Pte
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.tflite.check import TFLite
from gemma_edge.model.checkpoint import TABLE, linear_shapes, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.options import QuantizeOptions


@pytest.fixture(scope="module")
def every(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    options = ExportOptions(
        str(checkpoint()),
        out=tmp_path_factory.mktemp("every") / "bundle",
        quantization=QuantizeOptions(bits=4, group_size=32),
        context=16,
        prefill_chunk=7,
        backend="all",
    )
    return pipeline.export(options)


def test_every_backend_passes_the_gate_and_answers_alike(every: Export) -> None:
    assert list(every.manifest.backends) == list(every.manifest.verification) == ["onnx", "executorch", "tflite"]
    assert all(result.passed and result.past_wrap for result in every.manifest.verification.values())
    ids = [int(token) for token in np.random.default_rng(0).integers(3, every.manifest.config.vocab_size, 40)]
    first, *others = (gemma_edge.load(every.bundle, backend=name).score(ids) for name in every.manifest.backends)
    for rows in others:  # each rounds activations to int8 in its own blocks
        assert np.abs(first - rows).max() < 0.15 * np.ptp(first)


def test_integers_of_onnx_and_executorch_are_the_same(every: Export) -> None:
    """Read back from each file by its own format's rules."""
    model = onnx.load(every.bundle / "generate.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pte = Pte.open(every.bundle / "model.pte")
    config = GemmaConfig(**asdict(every.manifest.config))
    for layer in range(config.num_hidden_layers):
        for weight, (rows, columns) in linear_shapes(config, layer).items():
            packed = stored[f"{weight}.weight_packed"].reshape(rows, columns // 2)
            ours = nibbles(packed)
            halved = weight.endswith(("q_proj", "k_proj"))
            pieces = [
                np.frombuffer(pte.constant(Constant(weight, CODES, piece).key), np.uint8).reshape(-1, columns // 2)
                for piece in ((0, 1) if halved else (0,))
            ]
            assert np.array_equal(ours, joined([nibbles(piece) for piece in pieces], config.head_dim))


def test_integers_and_scales_of_onnx_and_tflite_are_the_same(every: Export) -> None:
    """Read back from each file by its own format's rules: every weight of every signature."""
    model = onnx.load(every.bundle / "generate.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found, shapes = TFLite(every.bundle / "model.tflite"), weight_shapes(GemmaConfig(**asdict(every.manifest.config)))
    for signature, role in [(each.name, each.role) for each in every.manifest.backends["tflite"].settings.signatures]:
        seen = set()
        for use in found.uses(found.subgraph(signature)):
            name = use.weight.name.decode()
            seen.add(name)
            codes, packed = found.content(use.weight), stored[f"{name}.weight_packed"]
            if name == TABLE:  # 8 bits per channel
                ours, theirs = np.frombuffer(codes, np.int8), packed.astype(np.int64) - 128
                scale = use.weight.quantization.scale
            else:  # 4 bits in groups; the even column in the low half
                raw = np.frombuffer(codes, np.int8)
                ours, theirs = np.stack([raw << 4 >> 4, raw >> 4], -1), nibbles(packed.reshape(len(packed), -1)) - 8
                scale = np.frombuffer(found.content(use.scales), np.float16).astype(np.float32)
            assert np.array_equal(ours.reshape(shapes[name]), theirs.reshape(shapes[name])), name
            blocks = stored[f"{name}.weight_scale"].reshape(len(packed), -1)
            groups = scale.reshape(len(packed), -1)
            assert np.array_equal(np.repeat(groups, blocks.shape[1] // groups.shape[1], axis=1), blocks), name
        # of the last layer a prefill needs keys and values only
        assert len(seen) == len(shapes) - (5 if role == "prefill" else 0)


def test_manifest_and_plan_state_the_bytes_of_keys_and_values_that_a_runtime_allocates(every: Export) -> None:
    """The rows that a chunk needs behind the end of tflite's ring were left out once."""
    allocated = {
        "onnx": sum(rows.nbytes for rows in gemma_edge.load(every.bundle, backend="onnx")._buffers().values()),
        "tflite": 0,
    }
    for name, buffer in gemma_edge.load(every.bundle, backend="tflite")._caches.items():  # type: ignore[attr-defined]
        if "held" not in name:
            details = buffer.get_tensor_details()
            allocated["tflite"] += int(np.prod(details["shape"])) * np.dtype(details["dtype"]).itemsize
    for backend, size in allocated.items():
        entry = every.manifest.backends[backend]
        assert size == entry.cache.bytes == entry.plan.kv_bytes
    chunk, of_one_slot = 7, 4 * 2 * 2 * 32 * 4  # 4 layers, K and V, 2 heads of 32, float32
    assert allocated["tflite"] - allocated["onnx"] == (chunk - 1) * of_one_slot


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(R, C/2) bytes to (R, C), the low half first; both formats store a code plus 8."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.int64)


def joined(pieces: list[NDArray[np.int64]], head_dim: int) -> NDArray[np.int64]:
    """The halves of every head put together again."""
    if len(pieces) == 1:
        return pieces[0]
    heads = [piece.reshape(-1, head_dim // 2, piece.shape[1]) for piece in pieces]
    return np.concatenate(heads, 1).reshape(-1, pieces[0].shape[1])


@pytest.mark.parametrize("asked", ["onnx,tensorrt", "everything", ""])
def test_an_unknown_backend_is_named(checkpoint: Callable[..., Path], asked: str) -> None:
    with pytest.raises(InputError, match="supported: onnx, executorch.*, several with commas, or all"):
        pipeline.open_model(ExportOptions(str(checkpoint()), backend=asked or ","))
