"""The executorch backend: what XNNPACK's delegates hold of a model, and how it is lowered for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gemma_edge.bundle.accelerators import COREML, DELEGATES, VULKAN
from gemma_edge.bundle.backends import Package
from gemma_edge.errors import InputError
from gemma_edge.export.backend import Backend, Configs, Kernels, LoweringTask, StoredWeights
from gemma_edge.export.executorch import packing
from gemma_edge.model.checkpoint import TABLE, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.recipe import QuantConfig

FILE = "model.pte"
METHODS = {"generate": "forward", "score": "score"}  # what a method is for -> its name
SETTINGS = {"program": FILE, "methods": METHODS, "min_executorch": "1.5"}
COPIES = 3  # of all delegates in memory, while a program with other delegates than XNNPACK's is made
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
        return SETTINGS

    def check(self, task: LoweringTask) -> None:
        """See Backend."""
        from gemma_edge.export.executorch.check import check_pte

        checkpoint = task.checkpoint
        check_pte(task.out / FILE, checkpoint.config, checkpoint.configs, task.cache, list(METHODS.values()))


@dataclass(frozen=True)
class AheadBackend(ExecuTorchBackend):
    """The same program with another library's delegates. An experiment: nothing here can run it."""

    accelerator: str  # Core ML or Vulkan
    delegate: str  # the id of its delegates
    made_with: Package

    def refuse_unsupported(self, config: GemmaConfig, configs: Configs, float_bits: int) -> None:
        """See Backend."""
        super().refuse_unsupported(config, configs, float_bits)
        command = self.made_with.how_to_install()
        if command is not None:
            raise InputError(
                f"`accelerator` {self.accelerator} needs {self.made_with.module}: {command}",
                field="accelerator",
                value=self.accelerator,
            )

    def weights_bytes(self, weights: StoredWeights) -> int:
        """What the weights take of the file: the scales are float32, and the head has a copy of the table."""
        config, configs = weights.config, weights.configs
        multiplied = sum(
            rows * sum(packing.row_bytes(configs[weight], columns, embedding=True).values())
            for weight, (rows, columns) in weight_shapes(config).items()
            if weight != TABLE or config.tie_word_embeddings
        )
        return multiplied + self.looked_up_bytes(weights)

    def export_ram(self, weights: StoredWeights) -> int:
        """Every delegate is in memory, and is copied into the program and into the file."""
        return COPIES * self.weights_bytes(weights)

    def looked_up_bytes(self, weights: StoredWeights) -> int:
        """The table as the embedding reads it."""
        return sum(packing.embedding_bytes(weights.config, weights.configs[TABLE]).values())

    def write(self, task: LoweringTask) -> dict[str, Any]:
        """See Backend."""
        from gemma_edge.export.executorch.ahead import write_ahead

        write_ahead(task.checkpoint, task.cache, task.out / FILE, METHODS, self.accelerator, task.progress)
        return SETTINGS

    def check(self, task: LoweringTask) -> None:
        """See Backend."""
        from gemma_edge.export.executorch.check import check_ahead

        check_ahead(task.out / FILE, task.checkpoint.config, task.cache, list(METHODS.values()), self.delegate)


BACKEND = ExecuTorchBackend()
COREML_BACKEND = AheadBackend(COREML, DELEGATES[COREML], Package("coremltools", "coremltools", "(Linux and macOS)"))
VULKAN_BACKEND = AheadBackend(VULKAN, DELEGATES[VULKAN], Package("executorch", "gemma-edge[executorch]"))
