"""A matrix stored as integers: how many bits and scales it has, and its rows. No torch at run time, so that a command line can
list what is supported. Which weight gets which integers is quantize/recipe.py's; how they are computed is quantize/integers.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_edge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZED_BITS = (4, 8)  # bits of a quantized weight
GROUP_MULTIPLE = 32  # every backend's kernels take groups of a multiple of 32


@dataclass(frozen=True)
class QuantConfig:
    """The integers of one weight."""

    bits: int  # 4 or 8
    group_size: int  # along in_features; 0 = one scale per output channel
    symmetric: bool = True  # no zero point; the only form that every backend runs exactly

    def __post_init__(self) -> None:
        if self.bits not in QUANTIZED_BITS:
            raise InputError(f"{self.bits} bits; quantized weights have 4 or 8", field="bits", value=self.bits)
        if self.group_size < 0 or self.group_size % GROUP_MULTIPLE:
            nearest = max(GROUP_MULTIPLE, round(self.group_size / GROUP_MULTIPLE) * GROUP_MULTIPLE)
            raise InputError(
                f"group size {self.group_size} is not a multiple of {GROUP_MULTIPLE}, which the kernels need",
                field="group_size",
                value=self.group_size,
                hint=f"use `group_size` {nearest}, or 0 for one scale per channel",
            )
        if not self.symmetric:
            raise InputError("asymmetric weights (zero points) are not supported: not every backend runs them exactly")

    def fit(self, in_features: int) -> QuantConfig:
        """The same configuration with the largest group that divides a row: a row of 96 at group 128 gets one group of 96.

        Raises:
            InputError: no multiple of 32 divides the row.
        """
        if self.group_size == 0:
            return self
        sizes = range(min(self.group_size, in_features), 0, -1)
        fitting = next((g for g in sizes if g % GROUP_MULTIPLE == 0 and in_features % g == 0), None)
        if fitting is None:
            raise InputError(
                f"rows of {in_features} cannot be cut into groups of a multiple of {GROUP_MULTIPLE}",
                field="group_size",
                value=self.group_size,
                hint="use `group_size` 0 (one scale per channel)",
            )
        return QuantConfig(self.bits, fitting, self.symmetric)

    def __str__(self) -> str:
        return (
            f"{self.bits} bits {f'in groups of {self.group_size}' if self.group_size else 'with one scale per channel'}"
        )

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix (rows, columns): its codes, and its scales in bfloat16."""
        return rows * (-(-columns * self.bits // 8) + 2 * self.groups(columns))

    def groups(self, columns: int) -> int:
        """Number of scales of a row with `columns` weights."""
        return columns // self.group_size if self.group_size else 1


@dataclass(frozen=True)
class QuantizedTensor:
    """Rows of a weight as integers: w = code * scale."""

    codes: Tensor  # (rows, in) int8
    scale: Tensor  # (rows, groups), or (rows, 1) per channel; bfloat16, or as a folder or a GGUF file stores it
    config: QuantConfig

    def dequantize(self) -> Tensor:
        """The weights: (rows, in) float32."""
        groups = self.codes.view(len(self.codes), self.scale.shape[1], -1).float()  # (rows, groups, G)
        values: Tensor = groups * self.scale.float().unsqueeze(-1)
        return values.flatten(1)
