"""The integers of every weight, layer by layer: as a table for the terminal and as a drawing (SVG)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from rich.table import Table

from gemma_edge.quantize.recipe import QuantConfig

Configs = Mapping[str, QuantConfig | None]  # by weight, as in checkpoint.weight_shapes

CELL_WIDTH, CELL_HEIGHT, MARGIN = 76, 20, 60  # pixels
FILLS = {4: (0xDC, 0xEA, 0xF7), 8: (0x2B, 0x6C, 0xB0)}  # lightest and darkest
INK = {4: "#1a202c", 8: "#ffffff"}
FLOAT_FILL = (0x55, 0x55, 0x55)


def label(config: QuantConfig | None) -> str:
    """4/128: 4 bits in groups of 128; 8/row: one scale per output channel."""
    return "float" if config is None else f"{config.bits}/{config.group_size or 'row'}"


def by_layer(configs: Configs) -> dict[str, dict[str, QuantConfig | None]]:
    """Layer -> kind of linear -> integers; what is in no layer comes first, as a row of its own name."""
    rows: dict[str, dict[str, QuantConfig | None]] = {}
    for weight, config in configs.items():
        head, _, rest = weight.partition(".layers.")
        layer, _, kind = rest.partition(".") if rest else (head.removeprefix("model."), "", "")
        rows.setdefault(layer, {})[kind.rpartition(".")[2].removesuffix("_proj")] = config
    return rows


def bits_table(configs: Configs) -> Table:
    """One row per layer, and the table's."""
    rows = by_layer(configs)
    kinds = max(map(list, rows.values()), key=len)
    table = Table(title="bits/group by layer", title_justify="left")
    for column in ("layer", *kinds):
        table.add_column(column)
    for layer, found in rows.items():
        alone = [label(config) for kind, config in found.items() if not kind]
        table.add_row(layer, *(alone or [label(found[kind]) for kind in kinds]))
    return table


def svg(title: str, configs: Configs) -> str:
    """The same as a drawing: the more bits per weight, the darker."""
    rows = by_layer(configs)
    kinds = max(map(list, rows.values()), key=len)
    width, height = 2 * MARGIN + len(kinds) * CELL_WIDTH, (len(rows) + 3) * CELL_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(MARGIN, CELL_HEIGHT, f"{title}: bits/group of every weight", INK[4], "start"),
        *(_text(_left(i) + CELL_WIDTH / 2, 2 * CELL_HEIGHT, kind, INK[4]) for i, kind in enumerate(kinds)),
    ]
    for row, (layer, found) in enumerate(rows.items(), start=2):
        top = row * CELL_HEIGHT + CELL_HEIGHT / 2
        parts.append(_text(2 * MARGIN - 8, top + 14, layer, INK[4], "end"))
        for kind, config in found.items():
            left = _left(kinds.index(kind) if kind else 0)
            span = CELL_WIDTH if kind else CELL_WIDTH * len(kinds)
            fill = "#{:02x}{:02x}{:02x}".format(*_fill(config))
            parts += [
                f'<rect x="{left}" y="{top}" width="{span - 1}" height="{CELL_HEIGHT - 1}" fill="{fill}"/>',
                _text(left + span / 2, top + 14, label(config), INK[config.bits if config else 8]),
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _left(column: int) -> int:
    return 2 * MARGIN + column * CELL_WIDTH


def _fill(config: QuantConfig | None) -> tuple[int, ...]:
    if config is None:
        return FLOAT_FILL
    part = (config.bits - 4 + (16 / config.group_size if config.group_size else 0)) / 4
    return tuple(round(low + part * (high - low)) for low, high in zip(FILLS[4], FILLS[8], strict=True))


def _text(x: float, y: float, text: str, ink: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{ink}" text-anchor="{anchor}">{escape(text)}</text>'
