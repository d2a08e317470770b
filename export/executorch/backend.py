"""The executorch backend: what XNNPACK's delegates hold of a model, and how it is lowered for them."""

from __future__ import annotations

from typing import Any

import torch

from gemma_edge.export.backend import Backend, Kernels, LoweringTask, StoredWeights
from gemma_edge.export.executorch import packing
from gemma_edge.model.checkpoint import TABLE
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
        """What the weights take of the file."""
        return packing.weights_bytes(weights.config, weights.configs)

    def resident_bytes(self, weights: StoredWeights) -> int:
        """XNNPACK packs what it multiplies by into as many bytes of memory."""
        return self.weights_bytes(weights) - self.looked_up_bytes(weights)

    def looked_up_bytes(self, weights: StoredWeights) -> int:
        """The table as the embedding reads it, unless the head reads the same bytes."""
        quant = weights.configs[TABLE]
        if packing.shares_table(weights.config, quant):
            return 0
        return sum(packing.embedding_bytes(weights.config, quant).values())

    def write(self, task: LoweringTask) -> dict[str, Any]:
        """See Backend."""
        from gemma_edge.export.executorch.lowering import write_program

        checkpoint = task.checkpoint
        for bits, dtype in ((4, torch.bfloat16), (8, torch.float32)):
            weights = [weight for weight, config in checkpoint.configs.items() if config and config.bits == bits]
            checkpoint.check_scales(weights, dtype, self.name)
        write_program(checkpoint, task.cache, task.out / FILE, METHODS, task.progress)
        return {"program": FILE, "methods": METHODS, "min_executorch": "1.5"}

    def check(self, task: LoweringTask) -> None:
        """See Backend."""
        from gemma_edge.export.executorch.check import check_pte

        checkpoint = task.checkpoint
        check_pte(task.out / FILE, checkpoint.config, checkpoint.configs, task.cache, list(METHODS.values()))


BACKEND = ExecuTorchBackend()
