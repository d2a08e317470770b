"""GPTQ and AWQ folders: each linear is stored as (in, out), in packed integers with zero points, and read here as (out, in).

A matrix whose zero points are all in the middle, and whose groups are ordered and of a size that the kernels take, keeps its
integers. Any other matrix is dequantized, and is a float weight to an export. Source: GPTQModel `nn_modules/qlinear/torch.py`,
AutoAWQ `modules/linear/gemm.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import FLOATS, Shards, Weights, finite, open_tensors, tensor_names, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.quantized import GROUP_MULTIPLE, QUANTIZED_BITS, QuantConfig, QuantizedTensor

logger = logging.getLogger(__name__)

DEFAULT_VERSION = {"gptq": "gptq", "awq": "gemm"}  # the version of a configuration that names none
HINT = "pass the original float folder"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Layout:
    """How one of the two formats packs integers into words of 32 bits."""

    packed_axis: int  # of qweight: 0 packs inputs, 1 packs outputs; zero points are packed along the outputs
    order: tuple[int, ...] | None  # which of eight outputs each nibble holds, the lowest first; None: in order
    zero_offset: int  # the number that was subtracted from the zero points before they were stored

    def unpack(self, words: Tensor, bits: int, axis: int) -> Tensor:
        """Unpack the words along one of their two axes: uint8."""
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        if self.order is not None:
            shifts = shifts[torch.tensor(self.order).argsort()]
        shape = list(words.shape)
        values = torch.empty([*shape[: axis + 1], len(shifts), *shape[axis + 1 :]], dtype=torch.uint8)
        for index, shift in enumerate(shifts.tolist()):  # one by one: a head has a gigabyte of words
            values.select(axis + 1, index).copy_((words >> shift) & ((1 << bits) - 1))
        return values.flatten(axis, axis + 1)


LAYOUTS = {
    ("gptq", "gptq"): Layout(0, None, 1),
    ("gptq", "gptq_v2"): Layout(0, None, 0),
    ("awq", "gemm"): Layout(1, (0, 2, 4, 6, 1, 3, 5, 7), 0),
}


@dataclass(frozen=True)
class Packed:
    """One matrix, unpacked."""

    codes: Tensor  # (out, in) uint8
    zeros: Tensor  # (out, groups) uint8
    scale: Tensor  # (out, groups), as stored
    group_of: Tensor  # (in,) the group that each input belongs to

    def dequantize(self) -> Tensor:
        """(out, in) float32: (code - zero) * scale."""
        zeros = self.zeros[:, self.group_of].float()
        values: Tensor = self.scale.float()[:, self.group_of] * (self.codes.float() - zeros)
        return values


class PackedCheckpoint(Weights):
    """A GPTQ or AWQ folder. The norms are float, and so is the table; a head of its own may be either."""

    def __init__(self, folder: Path, config: GemmaConfig, shards: Shards, layout: Layout, bits: int) -> None:
        super().__init__(folder, config, shards)
        self._layout, self._bits, self._shapes = layout, bits, weight_shapes(config)
        self._read = lru_cache(maxsize=1)(self._unpacked)  # callers go through a matrix slice by slice
        self.configs = {name: self._config_of(name) for name in self._shapes}
        self.is_quantized = any(self.configs.values())
        dequantized = [name for name, config in self.configs.items() if config is None and self._is_packed(name)]
        if dequantized:
            logger.warning(
                "%s: the integers of %d matrices have zero points or groups that not every backend runs; they are read as float"
                " weights and rounded again",
                folder,
                len(dequantized),
            )

    @classmethod
    def open(cls, folder: Path, quantization: Mapping[str, Any]) -> PackedCheckpoint:
        """Check the folder's layout, tensors and shapes. Reads headers, zero points and the order of groups.

        Raises:
            InputError: the layout or the number of bits is not supported, or a tensor is missing or has a wrong shape.
        """
        method = quantization.get("quant_method")
        version = quantization.get(
            "checkpoint_format" if method == "gptq" else "version", DEFAULT_VERSION.get(str(method))
        )
        layout = LAYOUTS.get((str(method), str(version).lower()))
        if layout is None:
            known = ", ".join(f"{a} / {b}" for a, b in LAYOUTS)
            raise InputError(f"{folder} is quantized as {method} / {version}; supported: {known}", hint=HINT)
        bits = quantization.get("bits", quantization.get("w_bit"))
        if type(bits) is not int or bits not in QUANTIZED_BITS or (layout.order is not None and bits != 4):
            raise InputError(f"{folder} has weights of {bits} bits; supported: 4, and 8 in a gptq folder", hint=HINT)
        config, shards, _ = open_tensors(folder, codes="qweight")
        shards.refuse_others(tensor_names(config, ("weight", *PARTS)), config.hf_class)
        return cls(folder, config, shards, layout, bits)

    def files(self) -> list[Path]:
        """Every file that the weights are read from."""
        return self._shards.files()

    def dtype(self, weight: str) -> torch.dtype:
        """The type in which a float matrix is stored; float32 for one that is dequantized."""
        return torch.float32 if self._is_packed(weight) else FLOATS[self._shards.header(f"{weight}.weight")[1]]

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as float32."""
        if self._is_packed(weight):
            packed = self._read(weight)
            part = Packed(packed.codes[start:stop], packed.zeros[start:stop], packed.scale[start:stop], packed.group_of)
            return finite(part.dequantize(), f"{weight}.scales", self.folder)
        return self._floats(f"{weight}.weight", start, stop)

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of a matrix that keeps its integers."""
        config = self.configs[weight]
        assert config is not None, f"{weight} is not quantized"
        packed = self._read(weight)
        codes = (packed.codes[start:stop].to(torch.int16) - (1 << (self._bits - 1))).to(torch.int8)
        scale = packed.scale[start:stop]
        finite(scale.float(), f"{weight}.scales", self.folder)
        return QuantizedTensor(codes, scale, config)

    def scale_dtype(self, weight: str) -> torch.dtype:
        """The type in which a quantized matrix's scales are stored."""
        return FLOATS[self._shards.header(f"{weight}.scales")[1]]

    def _is_packed(self, weight: str) -> bool:
        return f"{weight}.qweight" in self._shards

    def _groups(self, weight: str) -> int:
        return self._shards.header(f"{weight}.scales")[0][0]

    def _zeros(self, weight: str) -> Tensor:
        """(groups, out)."""
        stored = self._layout.unpack(self._shards.rows(f"{weight}.qzeros"), self._bits, 1)
        return (stored + self._layout.zero_offset) & ((1 << self._bits) - 1)

    def _group_of(self, weight: str) -> Tensor:
        columns = self._shapes[weight][1]
        if f"{weight}.g_idx" in self._shards:
            return self._shards.rows(f"{weight}.g_idx").long()
        return torch.arange(columns) // (columns // self._groups(weight))

    def _config_of(self, weight: str) -> QuantConfig | None:
        """How the integers of a matrix are kept; None: it is float, or is read as float."""
        rows, columns = self._shapes[weight]
        if not self._is_packed(weight):
            self._shards.expect(f"{weight}.weight", (rows, columns))
            return None
        groups, per_word = self._groups(weight), 32 // self._bits
        words = (columns // per_word, rows) if self._layout.packed_axis == 0 else (columns, rows // per_word)
        expected = {"qweight": words, "qzeros": (groups, rows // per_word)}
        for part, shape in expected.items():
            actual, dtype = self._shards.header(f"{weight}.{part}")
            if actual != shape or dtype != "I32" or columns % groups:
                raise InputError(
                    f"{self.folder}: {weight}.{part} has shape {list(actual)}, expected {list(shape)} of I32",
                    hint=HINT,
                )
        self._shards.expect(f"{weight}.scales", (groups, rows))
        order, size = self._group_of(weight), columns // groups
        if order.shape != (columns,) or order.min() < 0 or order.max() >= groups:
            raise InputError(f"{self.folder}: {weight}.g_idx does not name one of {groups} groups for each input")
        ordered = torch.equal(order, torch.arange(columns) // size)
        middle = bool((self._zeros(weight) == 1 << (self._bits - 1)).all())
        if not (ordered and middle) or (groups > 1 and size % GROUP_MULTIPLE):
            return None
        return QuantConfig(self._bits, 0 if groups == 1 else size)

    def _unpacked(self, weight: str) -> Packed:
        codes = self._layout.unpack(self._shards.rows(f"{weight}.qweight"), self._bits, self._layout.packed_axis)
        scale = self._shards.rows(f"{weight}.scales")
        return Packed(
            codes.T.contiguous(), self._zeros(weight).T.contiguous(), scale.T.contiguous(), self._group_of(weight)
        )
