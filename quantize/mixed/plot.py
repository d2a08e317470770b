"""The integers of every weight, layer by layer, as a drawing. It needs matplotlib, which the `eval` extra installs."""

from __future__ import annotations

from gemma_edge.quantize.mixed.table import Configs, by_layer, label
from gemma_edge.quantize.recipe import QuantConfig
from gemma_edge.report.drawing import Rectangle, blank
from gemma_edge.report.drawing import svg as to_svg

# CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH: the size of a cell and of the column with the layers' names, in inches.
CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH = 1.05, 0.28, 1.3
FONT_SIZE = 8  # points
# LIGHTEST, DARKEST: the colours of 4 bits and of 8 bits per weight, as red, green and blue.
LIGHTEST, DARKEST = (0xDC, 0xEA, 0xF7), (0x2B, 0x6C, 0xB0)
FLOAT_FILL = "#555555"
INK, INK_ON_DARK = "#1a202c", "#ffffff"


def svg(title: str, configs: Configs) -> str:
    """Draw one row per layer and one cell per weight: the more bits per weight, the darker.

    Args:
        title: of the drawing: the name of the recipe.
        configs: the integers of every weight.

    Returns:
        the text of an SVG file.
    """
    rows = by_layer(configs)
    kinds = max(map(list, rows.values()), key=len)
    width, height = LABEL_WIDTH + len(kinds) * CELL_WIDTH, (len(rows) + 2) * CELL_HEIGHT
    figure, plane = blank((width, height))
    # 1 unit is 1 inch, and y points down; row 0 holds the title, row 1 the kinds
    plane.set(xlim=(0, width), ylim=(height, 0))
    plane.axis("off")

    def write(x: float, row: int, text: str, ink: str = INK, align: str = "center") -> None:
        y = (row + 0.5) * CELL_HEIGHT
        plane.text(x, y, text, color=ink, ha=align, va="center", fontsize=FONT_SIZE, parse_math=False)

    write(0, 0, f"{title}: bits/group of every weight", align="left")
    for column, kind in enumerate(kinds):
        write(LABEL_WIDTH + (column + 0.5) * CELL_WIDTH, 1, kind)
    for row, (layer, cells) in enumerate(rows.items(), start=2):
        write(LABEL_WIDTH - 0.1, row, layer, align="right")
        for kind, config in cells.items():
            # a weight that belongs to no layer takes the whole row
            left, span = (LABEL_WIDTH + kinds.index(kind) * CELL_WIDTH, 1) if kind else (LABEL_WIDTH, len(kinds))
            corner = (left, row * CELL_HEIGHT)
            plane.add_patch(
                Rectangle(corner, span * CELL_WIDTH, CELL_HEIGHT, facecolor=_fill(config), edgecolor="#fff")
            )
            write(left + span * CELL_WIDTH / 2, row, label(config), _ink(config))
    return to_svg(figure)


def _fill(config: QuantConfig | None) -> str:
    """The colour of a cell: between LIGHTEST and DARKEST by bits per weight, scales included."""
    if config is None:
        return FLOAT_FILL
    part = (config.bits - 4 + (16 / config.group_size if config.group_size else 0)) / 4
    mixed = (round(light + part * (dark - light)) for light, dark in zip(LIGHTEST, DARKEST, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*(min(255, max(0, value)) for value in mixed))


def _ink(config: QuantConfig | None) -> str:
    return INK if config is not None and config.bits == 4 else INK_ON_DARK
