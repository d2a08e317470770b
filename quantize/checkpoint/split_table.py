"""A tied model read as one whose head is a matrix of its own: the table's rows, rounded once for look-ups and once for products.

A decoded token multiplies by every row of the head, and looks up one row of the table. So the head may have fewer bits than the
table, which then lies in a mapped file and is hardly ever in memory.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import HEAD, TABLE, Weights
from gemma_edge.model.quantized import QuantConfig, QuantizedTensor
from gemma_edge.quantize.recipe import Recipe


class SplitTable(Weights):
    """The weights of a tied model, with the table under both names."""

    split_table = True

    def __init__(self, source: Weights) -> None:
        self.source = source
        self.folder, self.origin, self.text_folder = source.folder, source.origin, source.text_folder
        self.config = replace(source.config, tie_word_embeddings=False)
        self.is_quantized, self.kv_scales = source.is_quantized, source.kv_scales
        table, *others = source.configs
        self.configs = {name: source.configs[_stored(name)] for name in (table, HEAD, *others)}

    def files(self) -> list[Path]:
        """See Weights."""
        return self.source.files()

    def dtype(self, weight: str) -> torch.dtype:
        """See Weights."""
        return self.source.dtype(_stored(weight))

    def float_bytes(self, weight: str) -> int:
        """See Weights."""
        return self.source.float_bytes(_stored(weight))

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """See Weights."""
        return self.source.rows(_stored(weight), start, stop)

    def plain_rows(self, weight: str, start: int, stop: int) -> Tensor:
        """See Weights."""
        return self.source.plain_rows(_stored(weight), start, stop)

    def vector(self, name: str) -> Tensor:
        """See Weights."""
        return self.source.vector(name)

    def keeps(self, weight: str, config: QuantConfig, method: str) -> bool:
        """See Weights."""
        return self.source.keeps(_stored(weight), config, method)

    def rounded(self, weight: str) -> str | None:
        """See Weights."""
        return self.source.rounded(_stored(weight))

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """See Weights."""
        return self.source.quantized(_stored(weight), start, stop)

    def scale_dtype(self, weight: str) -> torch.dtype:
        """See Weights."""
        return self.source.scale_dtype(_stored(weight))


def _stored(weight: str) -> str:
    return TABLE if weight == HEAD else weight


def split_where_needed(source: Weights, recipe: Recipe) -> Weights:
    """The weights, with a head of its own if the recipe makes other integers of a tied head than of the table.

    Raises:
        InputError: the table shall have integers, and the head none.
    """
    if not source.config.tie_word_embeddings or source.configs[TABLE] is not None:
        return source
    table, head = recipe.rule_for(TABLE), recipe.rule_for(HEAD)
    if (table.config, table.method) == (head.config, head.method) or table.config == head.config is None:
        return source
    if head.config is None:
        raise InputError(
            f"the head of {source.origin.name} is its table, which shall become {table.config}, but the head shall stay float;"
            " give the head integers, too",
            field="recipe",
        )
    return SplitTable(source)
