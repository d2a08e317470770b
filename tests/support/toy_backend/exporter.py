"""The toy's exporting half."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.errors import InputError
from gemma_edge.export.backend import Backend, LoweringTask, StoredWeights
from gemma_edge.model.checkpoint import norm_names, weight_shapes
from gemma_edge.quantize.recipe import QuantConfig
from support.toy_backend.engine import FILE


class ToyBackend(Backend):
    """Every weight as float32."""

    name = "toy"

    def refuse_weight(self, weight: str, config: QuantConfig | None, columns: int, float_bits: int) -> None:
        """8 bits are refused, so that a test sees a refusal."""
        if config is not None and config.bits == 8 and config.group_size:
            raise InputError(f"{weight} has 8 bits in groups, which toys cannot count", field="bits", value=8)

    def weights_bytes(self, weights: StoredWeights) -> int:
        """Four bytes for each weight."""
        return 4 * sum(rows * columns for rows, columns in weight_shapes(weights.config).values())

    def own_ram(self, config: Any, cache: CacheGeometry) -> int:
        """Something, so that a test sees it in the plan."""
        return 12345

    def write(self, task: LoweringTask) -> dict[str, Any]:
        """One file with everything that the engine reads."""
        checkpoint = task.checkpoint
        arrays: dict[str, Any] = {name: checkpoint.matrix(name).numpy() for name in weight_shapes(checkpoint.config)}
        task.progress(sum(values.nbytes for values in arrays.values()))
        arrays |= {name: checkpoint.vector(name).numpy() for name in norm_names(checkpoint.config)}
        np.savez(task.out / FILE, config=np.array(json.dumps(checkpoint.config.to_json())), **arrays)
        return {"weights": FILE}

    def check(self, task: LoweringTask) -> None:
        """The file names every weight."""
        names = np.load(task.out / FILE).files
        if not set(weight_shapes(task.checkpoint.config)) < set(names):
            raise RuntimeError(f"{FILE} lacks a weight")


BACKEND = ToyBackend()
