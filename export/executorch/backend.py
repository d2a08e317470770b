"""The executorch backend: what XNNPACK's delegates hold of a model, and how it is lowered for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.backend import Advance, Backend, Kernels, StoredWeights
from gemma_edge.export.executorch import packing
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.recipe import QuantConfig

FILE = "model.pte"
METHODS = {"generate": "forward", "score": "score"}  # what a method is for -> its name
KERNELS = Kernels("executorch", "XNNPACK", multiple=32)


class ExecuTorchBackend(Backend):
    """One `.pte` for ExecuTorch's XNNPACK backend and its official LLM runners."""

    name = "executorch"

    def refuse_weight(self, weight: str, config: QuantConfig | None, columns: int, float_bits: int) -> None:
        """See Kernels."""
        KERNELS.refuse_weight(weight, config, columns, float_bits)

    def weights_bytes(self, weights: StoredWeights) -> int:
        """What the weights take of the file. XNNPACK packs them into as many bytes of memory."""
        return packing.weights_bytes(weights.config, weights.configs)

    def write(
        self, checkpoint: QuantizedCheckpoint, cache: CacheGeometry, *, out: Path, float_bits: int, progress: Advance
    ) -> dict[str, Any]:
        """See Backend."""
        from gemma_edge.export.executorch.lowering import write_program

        four = [weight for weight, config in checkpoint.configs.items() if config and config.bits == 4]
        checkpoint.warn_of_rounded_scales(four, torch.bfloat16, self.name)
        write_program(checkpoint, cache, out / FILE, METHODS, progress)
        return {"program": FILE, "methods": METHODS, "min_executorch": "1.5"}

    def check(self, checkpoint: QuantizedCheckpoint, cache: CacheGeometry, *, out: Path, float_bits: int = 32) -> None:
        """See Backend."""
        from gemma_edge.export.executorch.check import check_pte

        check_pte(out / FILE, checkpoint.config, checkpoint.configs, cache, list(METHODS.values()))


BACKEND = ExecuTorchBackend()
