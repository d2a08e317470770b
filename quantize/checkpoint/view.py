"""Weights read through another model's weights: a view changes how some matrices are seen, and copies none."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.model.checkpoint import Weights
from gemma_edge.model.quantized import QuantConfig, QuantizedTensor


class View(Weights):
    """All that a model's weights say, of a model whose matrices may have other names; `stored` gives the source's."""

    def __init__(self, source: Weights) -> None:
        self.source = source
        self.folder, self.origin, self.text_folder = source.folder, source.origin, source.text_folder
        self.config, self.configs, self.vocabulary = source.config, dict(source.configs), source.vocabulary
        self.is_quantized, self.split_table = source.is_quantized, source.split_table
        self.kv_scales = source.kv_scales

    def stored(self, weight: str) -> str:
        """The source's name of a matrix."""
        return weight

    def files(self) -> list[Path]:
        """See Weights."""
        return self.source.files()

    def dtype(self, weight: str) -> torch.dtype:
        """See Weights."""
        return self.source.dtype(self.stored(weight))

    def float_bytes(self, weight: str) -> int:
        """See Weights."""
        return self.source.float_bytes(self.stored(weight))

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """See Weights."""
        return self.source.rows(self.stored(weight), start, stop)

    def plain_rows(self, weight: str, start: int, stop: int) -> Tensor:
        """See Weights."""
        return self.source.plain_rows(self.stored(weight), start, stop)

    def vector(self, name: str) -> Tensor:
        """See Weights."""
        return self.source.vector(name)

    def keeps(self, weight: str, config: QuantConfig, method: str) -> bool:
        """See Weights."""
        return self.source.keeps(self.stored(weight), config, method)

    def rounded(self, weight: str) -> str | None:
        """See Weights."""
        return self.source.rounded(self.stored(weight))

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """See Weights."""
        return self.source.quantized(self.stored(weight), start, stop)

    def scale_dtype(self, weight: str) -> torch.dtype:
        """See Weights."""
        return self.source.scale_dtype(self.stored(weight))
