"""Several backends in one bundle: the same integers in each, every one through the gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'gemma-edge[executorch]'")

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export import pipeline
from gemma_edge.export.executorch.packing import CODES, Constant
from gemma_edge.export.executorch.pte import Pte
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.pipeline import Export
from gemma_edge.model.checkpoint import linear_shapes
from gemma_edge.model.config import Gemma2Config


@pytest.fixture(scope="module")
def both(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    options = ExportOptions(
        str(checkpoint()),
        out=tmp_path_factory.mktemp("both") / "bundle",
        bits=4,
        group_size=32,
        context=16,
        prefill_chunk=7,
        backend="onnx,executorch",
    )
    return pipeline.export(options)


def test_every_backend_passes_the_gate_and_answers_alike(both: Export) -> None:
    assert list(both.manifest.backends) == list(both.manifest.verification) == ["onnx", "executorch"]
    assert all(result["passed"] and result["past_wrap"] for result in both.manifest.verification.values())
    ids = [int(token) for token in np.random.default_rng(0).integers(3, both.manifest.config["vocab_size"], 40)]
    onnx_rows, executorch_rows = (
        gemma_edge.load(both.bundle, backend=name).score(ids) for name in both.manifest.backends
    )
    # each rounds activations to int8 in its own blocks
    assert np.abs(onnx_rows - executorch_rows).max() < 0.15 * np.ptp(onnx_rows)


def test_the_integers_of_both_files_are_the_same(both: Export) -> None:
    """Read back from each file by its own format's rules."""
    model = onnx.load(both.bundle / "generate.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pte = Pte.open(both.bundle / "model.pte")
    config = Gemma2Config.from_json(both.manifest.config)
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
