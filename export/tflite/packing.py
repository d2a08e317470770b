"""A weight as the bytes that LiteRT reads, and where they lie in a `.tflite` file.

Source: LiteRT, the INT4 tensor type (two's complement, the even column in the low nibble) and BlockwiseQuantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_edge.model.checkpoint import row_slices, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.recipe import QuantConfig

SIGNS = {4: 0x88, 8: 0x80}  # by bits: turns codes that are stored plus 2^(bits-1) into two's complement, byte by byte


Configs = Mapping[str, QuantConfig | None]


@dataclass(frozen=True)
class Stored:
    """A weight of the file."""

    shape: tuple[int, int]
    config: QuantConfig | None  # None: float32
    codes: str  # name of the buffer of integers, or floats
    scale: str  # name of the buffer of scales, if they have one
    row_scale: NDArray[np.float32] | None  # (rows,) scales of the channels, which lie in the graph; (1,) if `apart`
    apart: bool  # the scales of the channels are multiplied afterwards


@dataclass(frozen=True)
class Packing:
    """How weights and states lie in the file of one backend."""

    channels_apart: bool = False  # a matrix has the scale 1, and the scales of its channels are multiplied afterwards
    # held_in_fours: the slots' positions lie in rows of four. With all of them in one row LiteRT-LM's GPU says that it cannot
    # copy them, and every answer is nonsense
    held_in_fours: bool = False

    def row_bytes(self, config: QuantConfig | None, columns: int) -> dict[str, int]:
        """Bytes of one row of a weight, by part, in buffers behind the graph."""
        if config is None:
            return {"codes": 4 * columns}
        sizes = {"codes": columns * config.bits // 8}
        if config.group_size:
            return {**sizes, "scale": 2 * columns // config.group_size}
        return {**sizes, "scale": 4} if self.channels_apart else sizes

    def parts(self, config: GemmaConfig, configs: Configs) -> dict[str, int]:
        """Every buffer behind the graph with its bytes, in the file's order."""
        return {
            f"{weight}.{part}": rows * size
            for weight, (rows, columns) in weight_shapes(config).items()
            for part, size in self.row_bytes(configs[weight], columns).items()
        }

    def weights_bytes(self, config: GemmaConfig, configs: Configs) -> int:
        """Bytes that the weights take of the file, including scales of channels that lie in its graph."""
        channels = sum(
            12 * rows  # float32, and an int64 of zeros
            for weight, (rows, columns) in weight_shapes(config).items()
            if configs[weight] is not None and "scale" not in self.row_bytes(configs[weight], columns)
        )
        return sum(self.parts(config, configs).values()) + channels

    def stored_weights(self, checkpoint: QuantizedCheckpoint) -> dict[str, Stored]:
        """Every weight, with those scales of channels that lie in the graph."""
        stored = {}
        for weight, shape in weight_shapes(checkpoint.config).items():
            config, scale = checkpoint.configs[weight], None
            channels = config is not None and not config.group_size
            if channels and self.channels_apart:
                scale = np.ones(1, np.float32)
            elif channels:
                scale = checkpoint.scale(weight, 0, shape[0]).float().flatten().numpy()
            apart = channels and self.channels_apart
            stored[weight] = Stored(shape, config, f"{weight}.codes", f"{weight}.scale", scale, apart)
        return stored

    def packed(self, checkpoint: QuantizedCheckpoint, weight: str) -> Iterator[tuple[str, int, Tensor]]:
        """The contents of a weight's buffers, rows at a time: (part, first row, (rows, bytes) uint8)."""
        config, shape = checkpoint.configs[weight], weight_shapes(checkpoint.config)[weight]
        for start, stop in row_slices(shape):
            if config is None:
                yield "codes", start, _bytes(checkpoint.rows(weight, start, stop))
                continue
            yield "codes", start, checkpoint.packed_bytes(weight, start, stop) ^ SIGNS[config.bits]
            if "scale" in self.row_bytes(config, shape[1]):
                dtype = torch.float16 if config.group_size else torch.float32
                yield "scale", start, _bytes(checkpoint.scale(weight, start, stop).to(dtype))


LITERT = Packing()
LITERT_GPU = Packing(held_in_fours=True)
TFLITE_RUNTIME = Packing(channels_apart=True)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).view(len(values), -1)
