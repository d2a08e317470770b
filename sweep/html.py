"""gemma-sweep's page: one HTML file with the tables and plots of the points, the front and the picked one."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_edge.report.drawing import Figure, axes, finish, svg
from gemma_edge.report.html import Plot, Table, render
from gemma_edge.sweep.report import (
    COLUMNS,
    PHONE_COLUMNS,
    TEXT_COLUMNS,
    cells,
    notes,
    ordered,
    phone_rows,
    unmeasured,
)
from gemma_edge.sweep.result import Row, SweepResult

# PLANES: heading -> the figures on the axes, with what the axes are called
PLANES = {
    "Size and distance from the original": (
        ("bytes", "size of the bundle, MB", 1e6),
        ("kl", "KL, nats per token", 1.0),
    ),
    "Speed and distance from the original": (
        ("decode_tokens_per_s", "decode, tok/s", 1.0),
        ("kl", "KL, nats per token", 1.0),
    ),
    "Size and speed": (("bytes", "size of the bundle, MB", 1e6), ("decode_tokens_per_s", "decode, tok/s", 1.0)),
}
CAPTION = "Every point is a bundle. Filled points are on the Pareto front of size, KL and decoding speed."


def page(result: SweepResult) -> str:
    """The whole HTML text."""
    tables = [Table(COLUMNS, [cells(row) for row in ordered(result.rows)], TEXT_COLUMNS, "Points")]
    if rows := phone_rows(result.rows):
        tables.append(Table(PHONE_COLUMNS, rows, TEXT_COLUMNS, "Phones"))
    if others := unmeasured(result.rows):
        tables.append(Table(("point", "state", "why"), others, TEXT_COLUMNS, "Points without figures"))
    drawn = [Plot(heading, CAPTION, svg(figure)) for heading, figure in plots(ordered(result.rows))]
    return render("gemma_edge.sweep", title="gemma-sweep", notes=notes(result), tables=tables, plots=drawn)


def plots(rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    """Heading and figure of each plane that there are numbers for."""
    for heading, ((x, xlabel, scale), (y, ylabel, _)) in PLANES.items():
        drawn = [row for row in rows if getattr(row, x) is not None and getattr(row, y) is not None]
        if not drawn:
            continue
        figure, plane = axes(xlabel, ylabel)
        for label, color, chosen in (
            ("beaten by another point", "none", [row for row in drawn if not row.front and not row.picked]),
            ("front", "C0", [row for row in drawn if row.front and not row.picked]),
            ("picked", "C1", [row for row in drawn if row.picked]),
        ):
            if chosen:
                places = [[getattr(row, name) / part for row in chosen] for name, part in ((x, scale), (y, 1.0))]
                edge = "#888" if color == "none" else color
                plane.plot(*places, "o", markerfacecolor=color, markeredgecolor=edge, label=label)
        yield heading, finish(figure, plane, [getattr(row, y) for row in drawn])
