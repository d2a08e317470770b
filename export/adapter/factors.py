"""The factors of a LoRA as a bundle's graphs take them, and the bundle's weights with them added.

A bundle may hold another form of the same model: AWQ divides what a linear reads by channel scales, and multiplies its columns by
them (quantize/calibration/awq.py). Factors were trained on the original, so the scales go into them here. A norm's scale is
exact; that of a linear's rows is the one with which the original's rows come nearest to the bundle's integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import Weights, linear_shapes, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.lora import Lora
from gemma_edge.quantize.calibration.awq import expand
from gemma_edge.quantize.calibration.block import gemma_topology
from gemma_edge.runtimes.engines.adapter import SIDES

Factors = dict[str, tuple[Tensor, Tensor]]  # linear -> A (in, r), and B (r, out) scaled; float32
DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
LARGEST = 127  # of an integer


def factors_of(lora: Lora, config: GemmaConfig) -> Factors:
    """The factors of an adapter that changes linears of the layers only.

    Raises:
        InputError: it changes something else, which a graph cannot switch.
    """
    linears = {name for layer in range(config.num_hidden_layers) for name in linear_shapes(config, layer)}
    for name in (*lora.whole, *lora.bases, *lora.pairs):
        if name not in linears:
            raise InputError(
                f"{lora.folder} changes {name}: only updates of the layers' linears can be switched at run time",
                field="adapter",
                value=lora.folder,
                hint="merge it into a bundle of its own with gemma-export --lora",
            )
    return {name: (pair.a.T.contiguous(), pair.b.T * pair.scaling) for name, pair in lora.pairs.items()}


def refolded(factors: Factors, original: Weights, base: Weights) -> Factors:
    """The same update of a bundle's own form of the model.

    Args:
        factors: of the original.
        original: the float model that the bundle was made from.
        base: the bundle's weights.
    """
    topology, result = gemma_topology(base.config), dict(factors)
    shapes = weight_shapes(base.config)
    for layer in range(base.config.num_hidden_layers):
        reads: dict[str, Tensor] = {}  # linear -> scale of what it reads (in,)
        writes: dict[str, Tensor] = {}  # linear -> scale of its rows (out,)
        prefix = f"model.layers.{layer}."
        for fold in reversed(topology.folds):  # norms first: they scale the columns of the linears that are folded too
            name = prefix + fold.producer
            if fold.plus_one:
                scale = (1.0 + original.vector(f"{name}.weight")) / (1.0 + base.vector(f"{name}.weight"))
            else:
                scale = _row_scale(original, base, name, reads[name], shapes[name][0])
                writes[name] = scale
            reads |= {prefix + consumer: expand(scale, fold) for consumer in fold.consumers}
        for name, scale in reads.items():
            if name in result:
                a, b = result[name]
                result[name] = a * scale[:, None], b / writes[name] if name in writes else b
    return result


def _row_scale(original: Weights, base: Weights, name: str, reads: Tensor, rows: int) -> Tensor:
    """By what the rows of a linear were divided (rows,): least squares, row by row."""
    before, after = original.rows(name, 0, rows) * reads, base.rows(name, 0, rows)
    along = torch.linalg.vecdot(before, after)
    usable = along > 0  # a row of zeros has no scale, and its output is nothing
    return torch.where(usable, torch.linalg.vecdot(before, before) / torch.where(usable, along, 1.0), 1.0)


def stored(factors: Factors, kind: str) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """The tensors of factors.safetensors.

    Args:
        factors: as the graph takes them.
        kind: of DTYPES; int8 has a scale for each rank.

    Raises:
        InputError: a factor is too large for float16.
    """
    tensors = {}
    for linear, pair in factors.items():
        for side, values in zip(SIDES, pair, strict=True):
            name = f"{linear}.{side}"
            if kind == "int8":
                scale = values.abs().amax(SIDES.index(side), keepdim=True).clamp_min(1e-30) / LARGEST
                values, tensors[f"{name}_scale"] = (values / scale).round(), scale.flatten().numpy()
            array = values.contiguous().numpy().astype(DTYPES[kind])
            if not np.isfinite(array).all():
                raise InputError(
                    f"a factor of {linear} is NaN, infinite or too large for `factors` {kind}",
                    field="factors",
                    value=kind,
                    hint="use float32, or train the adapter again",
                )
            tensors[name] = array
    return tensors


class AdaptedWeights(Weights):
    """A model's weights with an adapter's update added, as its graph computes them."""

    def __init__(self, base: Weights, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.folder, self.origin, self.text_folder, self.config = (
            base.folder,
            base.origin,
            base.text_folder,
            base.config,
        )
        self.configs = dict.fromkeys(base.configs)
        self._base, self._factors = base, factors

    def files(self) -> list[Path]:
        """See Weights."""
        return self._base.files()

    def dtype(self, weight: str) -> torch.dtype:
        """See Weights."""
        return torch.float32

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """See Weights."""
        values = self._base.rows(weight, start, stop)
        if weight in self._factors:
            a, b = self._factors[weight]
            values = values + (a @ b[:, start:stop]).T
        return values

    def vector(self, name: str) -> Tensor:
        """See Weights."""
        return self._base.vector(name)
