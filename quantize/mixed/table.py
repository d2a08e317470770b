"""The integers of every weight, layer by layer, as a table for the terminal. The drawing is plot.py's."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from gemma_edge.quantize.recipe import QuantConfig

# Configs: the name of a weight, as in checkpoint.weight_shapes -> its integers, or None where it stays float.
Configs = Mapping[str, QuantConfig | None]


def label(config: QuantConfig | None) -> str:
    """Bits and group size: 4/128 is 4 bits in groups of 128; 8/row is 8 bits with one scale per output channel."""
    return "float" if config is None else f"{config.bits}/{config.group_size or 'row'}"


def by_layer(configs: Configs) -> dict[str, dict[str, QuantConfig | None]]:
    """Layer -> kind of linear -> integers. A weight that belongs to no layer is a row of its own, under the kind ""."""
    rows: dict[str, dict[str, QuantConfig | None]] = {}
    for weight, config in configs.items():
        head, _, rest = weight.partition(".layers.")
        layer, _, kind = rest.partition(".") if rest else (head.removeprefix("model."), "", "")
        rows.setdefault(layer, {})[kind.rpartition(".")[2].removesuffix("_proj")] = config
    return rows


def bits_table(configs: Configs) -> Table:
    """One row per layer, and one for the embedding table."""
    rows = by_layer(configs)
    kinds = max(map(list, rows.values()), key=len)
    table = Table(title="bits/group by layer", title_justify="left")
    for column in ("layer", *kinds):
        table.add_column(column)
    for layer, cells in rows.items():
        alone = [label(config) for kind, config in cells.items() if not kind]
        table.add_row(layer, *(alone or [label(cells[kind]) for kind in kinds]))
    return table
