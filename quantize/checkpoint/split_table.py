"""A tied model read as one whose head is a matrix of its own: the table's rows, rounded once for look-ups and once for products.

A decoded token multiplies by every row of the head, and looks up one row of the table. So the head may have fewer bits than the
table, which then lies in a mapped file and is hardly ever in memory.
"""

from __future__ import annotations

from dataclasses import replace

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import HEAD, TABLE, Weights
from gemma_edge.quantize.checkpoint.view import View
from gemma_edge.quantize.recipe import Recipe


class SplitTable(View):
    """The weights of a tied model, with the table under both names."""

    def __init__(self, source: Weights) -> None:
        super().__init__(source)
        self.split_table = True
        self.config = replace(source.config, tie_word_embeddings=False)
        table, *others = source.configs
        self.configs = {name: source.configs[self.stored(name)] for name in (table, HEAD, *others)}

    def stored(self, weight: str) -> str:
        """See View."""
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
