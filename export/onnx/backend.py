"""The onnx backend: what ONNX Runtime holds of a model, and how it is lowered for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.export.backend import Backend, LoweringTask, StoredWeights
from gemma_edge.export.onnx import weights as storage
from gemma_edge.model.checkpoint import TABLE, Weights
from gemma_edge.quantize.recipe import QuantConfig

INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits: activations are rounded to int8 per block
FLOAT_ACTIVATIONS = 0


@dataclass(frozen=True)
class OnnxBackend(Backend):
    """Graphs for ONNX Runtime over one weights file."""

    signed_scales: ClassVar[bool] = True
    name: str = "onnx"
    accuracy_level: int = INT8_ACTIVATIONS  # or FLOAT_ACTIVATIONS: exact, slower
    static: bool = False  # graphs in plain operators, with static shapes: plain.py
    pins: bool = True
    int8_kv: bool = True

    def refuse_weight(self, weight: str, config: QuantConfig | None, columns: int, float_bits: int) -> None:
        """Refuse rows that no block size of the kernels divides."""
        if config is not None:
            storage.block_size(config, columns)

    def weights_bytes(self, weights: StoredWeights) -> int:
        """Size of the weights file."""
        return storage.file_bytes(_blobs(weights))

    def resident_bytes(self, weights: StoredWeights) -> int:
        """See weights.py: scales are there three times, float matrices are widened."""
        return storage.resident_bytes(_multiplied(weights))

    def looked_up_bytes(self, weights: StoredWeights) -> int:
        """Codes and scales of a table beside a head of its own."""
        return sum(blob.nbytes for blob in _blobs(weights)) - sum(blob.nbytes for blob in _multiplied(weights))

    def stored(self, bundle: Path, settings: Any, config: ModelConfig) -> Weights | None:
        """See Backend."""
        from gemma_edge.export.onnx.stored import stored_weights

        return stored_weights(bundle, settings, config)

    def write(self, task: LoweringTask) -> dict[str, Any]:
        """See Backend."""
        from gemma_edge.export.onnx import lowering
        from gemma_edge.export.onnx.seams import make_layers

        checkpoint, configs = task.checkpoint, task.checkpoint.configs
        dtypes = storage.float_dtypes(checkpoint, configs, task.float_bits)
        layers = make_layers(configs, dtypes, self.accuracy_level)
        write = lowering.write_static_files if self.static else lowering.write_files
        files = write(task, _blobs(_stored(task)), layers)
        return {**files, "accuracy_level": self.accuracy_level, "min_onnxruntime": "1.29"}

    def check(self, task: LoweringTask) -> None:
        """See Backend."""
        from gemma_edge.export.onnx import lowering

        check = lowering.check_static_files if self.static else lowering.check_files
        check(task, _blobs(_stored(task)))


def _stored(task: LoweringTask) -> StoredWeights:
    return StoredWeights(task.checkpoint, task.checkpoint.configs, task.float_bits, task.cache.dtype)


def _blobs(weights: StoredWeights) -> list[storage.Blob]:
    """The weights file's layout."""
    return storage.blobs_of(weights.source, weights.configs, weights.float_bits, int8_kv=weights.kv_dtype == "int8")


def _multiplied(weights: StoredWeights) -> list[storage.Blob]:
    """The tensors of the file but for a table that is only looked up in: ONNX Runtime leaves that one where it is mapped."""
    blobs = _blobs(weights)
    return blobs if weights.config.tie_word_embeddings else [b for b in blobs if not b.name.startswith(f"{TABLE}.")]


BACKEND = OnnxBackend()
STATIC = OnnxBackend(accuracy_level=FLOAT_ACTIVATIONS, static=True, pins=False, int8_kv=False)
