"""The backends tflite and tflite-runtime: two runtimes of `.tflite` models, what they hold, and how a model is lowered for them.

tflite-runtime is the interpreter of 2023, whose last release is 2.14. It multiplies by int8 matrices with one scale each, and
silently gives zeros for matrices with a scale per channel, which LiteRT has. So its matrices' scales are 1, and the channels'
scales are multiplied afterwards, which is the same. Its signatures copy their inputs and outputs, so its caches are variables
inside the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.signature import Signature
from gemma_edge.export.backend import Backend, Kernels, LoweringTask, StoredWeights
from gemma_edge.export.tflite import packing
from gemma_edge.export.tflite.packing import Packing
from gemma_edge.export.tflite.seams import PREFILL, signatures, two_signatures
from gemma_edge.model.checkpoint import TABLE, Weights, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.recipe import QuantConfig

GRAPH_PER_ROW = 20  # bytes per signature and row of a weight: scales and zero points, stored more than once


@dataclass(frozen=True)
class TFLiteBackend(Backend):
    """A `.tflite` with one signature per chunk size over one set of weights."""

    name: str
    file: str
    kernels: Kernels
    packing: Packing
    variables: bool = False  # caches are variables made by `reset`; False: inputs that come back as outputs
    needs: dict[str, str] = field(default_factory=dict)  # oldest version that runs it, for the manifest
    signatures: Callable[[CacheGeometry], list[Signature]] = signatures  # of the model
    group_size: int | None = None
    slot_multiple: int = 1

    def refuse_weight(self, weight: str, config: QuantConfig | None, columns: int, float_bits: int) -> None:
        """See Kernels."""
        self.kernels.refuse_weight(weight, config, columns, float_bits)

    def weights_bytes(self, weights: StoredWeights) -> int:
        """What the weights take of the file."""
        return self.packing.weights_bytes(weights.config, weights.configs)

    def resident_bytes(self, weights: StoredWeights) -> int:
        """What is multiplied by is mapped and read whole, or packed into as many bytes of memory."""
        return self.weights_bytes(weights) - self.looked_up_bytes(weights)

    def looked_up_bytes(self, weights: StoredWeights) -> int:
        """The buffers behind the graph of a table beside a head of its own."""
        parts = {} if weights.config.tie_word_embeddings else self.packing.parts(weights.config, weights.configs)
        return sum(size for part, size in parts.items() if part.startswith(f"{TABLE}."))

    def own_ram(self, config: GemmaConfig, cache: CacheGeometry) -> int:
        """What each signature holds for itself: its graph, and what goes from layer to layer around the caches."""
        passed = config.hidden_size + (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        every = self.signatures(cache)
        tokens = sum(each.tokens for each in every if each.role == PREFILL)
        rows = sum(rows for rows, _ in weight_shapes(config).values())
        return len(every) * GRAPH_PER_ROW * rows + 4 * tokens * passed * config.num_hidden_layers

    def slots_behind(self, prefill_chunk: int) -> int:
        """A chunk is written in one piece, so all its tokens but one may lie behind the ring's end."""
        return prefill_chunk - 1

    def stored(self, bundle: Path, settings: Any, config: ModelConfig) -> Weights | None:
        """See Backend."""
        from gemma_edge.export.tflite.stored import stored_weights

        return stored_weights(bundle, settings, config)

    def write(self, task: LoweringTask) -> dict[str, Any]:
        """See Backend."""
        from gemma_edge.export.tflite.file import write_model
        from gemma_edge.export.tflite.lowering import build_model

        checkpoint, cache = task.checkpoint, task.cache
        for grouped, dtype in ((True, torch.float16), (False, torch.float32)):
            weights = [
                name for name, config in checkpoint.configs.items() if config and bool(config.group_size) == grouped
            ]
            checkpoint.check_scales(weights, dtype, self.name)
        model = build_model(checkpoint, cache, self.packing, self.signatures(cache), variables=self.variables)
        write_model(model, self.packing, checkpoint, task.out / self.file, task.progress)
        return {
            "program": self.file,
            "signatures": [asdict(each) for each in self.signatures(cache)],
            **self.needs,
        }

    def check(self, task: LoweringTask) -> None:
        """See Backend."""
        from gemma_edge.export.tflite.check import check_tflite

        checkpoint, cache = task.checkpoint, task.cache
        signed = self.signatures(cache)
        check_tflite(task.out / self.file, self.packing, checkpoint.config, checkpoint.configs, cache, signed)


LITERT = TFLiteBackend(
    "tflite", "model.tflite", Kernels("tflite", "XNNPACK"), packing.LITERT, needs={"min_litert": "2.3"}
)
# Each signature is compiled anew for a GPU, which takes seconds, so there are two. WebGPU copies rows of a multiple of 256 bytes
# only: 64 of the slots' positions.
LITERT_GPU = replace(
    LITERT,
    packing=packing.LITERT_GPU,
    kernels=Kernels("tflite", "LiteRT's GPU delegate", no_groups="LiteRT's GPU delegate ends the process over them"),
    signatures=two_signatures,
    group_size=0,
    slot_multiple=64,
)
TFLITE_RUNTIME = TFLiteBackend(
    "tflite-runtime",
    "model_2_14.tflite",
    # its int4 kernel silently takes -8 for another number: measured
    Kernels("tflite-runtime", "tflite-runtime", bits=(8,)),
    packing.TFLITE_RUNTIME,
    variables=True,
    needs={"min_tflite_runtime": "2.14"},
)
