"""What a user can choose of a quantization, as data. No torch here, so that a command line can list its options quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CalibrationText:
    """Where the calibration text comes from, and how much of it is used."""

    paths: tuple[Path, ...] = ()  # files or folders; empty: the books that are shipped
    tokens: int = 0  # number of tokens; 0: as many as the quality uses
    chat: bool = False  # whether plain text is put into the form of a chat, for models that were tuned for one
    seed: int = 0  # seed for choosing the passages


@dataclass(frozen=True)
class QuantizeOptions:
    """How a model's weights become integers. None means the default that suits the model and the other options.

    Three groups of options exclude each other: `recipe`; `size` or `bpw`; `bits`, `group_size` and those of the table.
    """

    bits: int | None = None  # bits of the linears, one of recipe.BITS; with 16 and 32 they stay float
    group_size: int | None = None  # weights per scale, a multiple of 32; 0: one scale per output channel
    table_bits: int | None = None  # bits of the embedding table, and of the head as the same integers: 4 or 8
    embedding_bits: int | None = None  # bits of the table where rows are looked up, beside a head of other integers
    head_bits: int | None = None  # bits of the head where it is multiplied, beside a table of other integers
    size: str | None = None  # mixed precision: largest size of the weights file, such as "1.4GB"
    bpw: float | None = None  # mixed precision: bits per weight of all matrices, a scale counted as 16 bits
    recipe: Path | None = None  # file with a saved recipe, or a bundle's manifest.json
    method: str | None = None  # how integers are found, one of recipe.METHODS
    quality: str | None = None  # how much work 4-bit integers are worth, one of recipe.QUALITIES
    calibration_text: CalibrationText = CalibrationText()
    distill: int = 0  # tokens to train scales and norms on afterwards; 0: no training

    @property
    def has_budget(self) -> bool:
        """Whether the bits of each weight are chosen under a budget: mixed precision."""
        return self.size is not None or self.bpw is not None
