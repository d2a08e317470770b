"""The weights that a finished bundle holds, read back from its files and dequantized. The gate compares the bundle with them when
there is no checkpoint any more. Which bytes are a matrix's is each backend's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.model.checkpoint import Weights, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.quantized import QuantConfig, QuantizedTensor
from gemma_edge.quantize.checkpoint.packing import unpack


@dataclass(frozen=True)
class Piece:
    """A tensor in a file."""

    path: Path
    offset: int  # of its first byte
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of it, in memory of their own."""
        width = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        count = (self.shape[0] if stop is None else stop) - start
        raw = np.fromfile(self.path, np.uint8, count * width, offset=self.offset + start * width)
        return torch.from_numpy(raw).view(self.dtype).view(count, *self.shape[1:])


@dataclass(frozen=True)
class Matrix:
    """A matrix of a bundle: floats, or integers with their scales."""

    values: (
        Piece  # (rows, columns) floats, or (rows, bytes) uint8: codes plus 2^(bits-1) once `flipped`, the even one low
    )
    scale: Callable[[int, int], Tensor] | None = None  # of some rows: (rows, groups); None: floats
    bits: int = 0
    flipped: int = 0  # what each byte of the codes is combined with by an exclusive or

    def config(self, columns: int) -> QuantConfig | None:
        """Bits and group of its integers; None for floats."""
        if self.scale is None:
            return None
        groups = self.scale(0, 1).shape[1]
        return QuantConfig(self.bits, 0 if groups == 1 else columns // groups)


class BundleWeights(Weights):
    """A bundle's own weights."""

    is_quantized = True

    def __init__(
        self,
        bundle: Path,
        config: ModelConfig,
        matrices: Mapping[str, Matrix],
        norms: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Take what a backend found.

        Args:
            bundle, config: the folder, and the model.
            matrices: by name without `.weight`.
            norms: by name: what the file multiplies by, which is 1 + the checkpoint's weight.
        """
        self.folder = self.origin = self.text_folder = bundle
        self.config = GemmaConfig(**asdict(config))
        self._matrices, self._norms = matrices, norms
        self._shapes = weight_shapes(self.config)
        self.configs = {name: matrices[name].config(shape[1]) for name, shape in self._shapes.items()}

    def files(self) -> list[Path]:
        """See Weights."""
        return sorted({matrix.values.path for matrix in self._matrices.values()})

    def dtype(self, weight: str) -> torch.dtype:
        """See Weights."""
        return self._matrices[weight].values.dtype if self.configs[weight] is None else torch.float32

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """See Weights."""
        matrix, config = self._matrices[weight], self.configs[weight]
        if config is None or matrix.scale is None:
            return super().quantized(weight, start, stop)
        codes = unpack(matrix.values.rows(start, stop) ^ matrix.flipped, config.bits, self._shapes[weight][1])
        return QuantizedTensor(codes, matrix.scale(start, stop), config)

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """See Weights."""
        if self.configs[weight] is None:
            return self._matrices[weight].values.rows(start, stop).float()
        return self.quantized(weight, start, stop).dequantize()

    def vector(self, name: str) -> Tensor:
        """See Weights."""
        return torch.from_numpy(self._norms[name].astype(np.float32)) - 1.0
