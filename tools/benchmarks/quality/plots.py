"""The plots of docs/measure/benchmarks.md: how far contenders are from the original, over what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.files import write_whole
from gemma_edge.report.drawing import Axes, Bbox, axes, svg

OURS, PEER = "C0", "#888888"
# PLACES: of a name, in points from its dot
PLACES = [(side, height) for height in (4, -11, 15, -22, 26, -33, 37) for side in (6, -6)]


@dataclass(frozen=True)
class Point:
    """One contender."""

    name: str
    ours: bool
    cost: float
    kl: float  # nats per token


def write_plot(path: Path, points: Sequence[Point], cost: str) -> None:
    """Draw KL, on a logarithmic axis, over a cost: ours in colour and peers in grey, each with its name.

    Args:
        path: the SVG file.
        points: the contenders.
        cost: what the horizontal axis shows, with its unit.
    """
    figure, plane = axes(cost, "KL to the original, nats per token")
    figure.set_size_inches(9, 5.5)
    plane.set_yscale("log")
    for point in points:
        plane.plot(point.cost, point.kl, "o", color=OURS if point.ours else PEER)
    plane.margins(x=0.22)
    figure.draw_without_rendering()  # only then it is known where things are
    placed = [_dot(plane, point) for point in points]
    for point in points:
        placed.append(_label(plane, point, placed))
    write_whole(path, svg(figure) + "\n")


def _dot(plane: Axes, point: Point) -> Bbox:
    x, y = plane.transData.transform((point.cost, point.kl))
    return Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)


def _label(plane: Axes, point: Point, placed: Sequence[Bbox]) -> Bbox:
    """Write a point's name at the first of PLACES where it covers nothing, else at the last; return where it stands."""
    text = plane.annotate(
        point.name,
        (point.cost, point.kl),
        PLACES[0],
        textcoords="offset points",
        fontsize=8,
        color=OURS if point.ours else PEER,
        parse_math=False,
    )
    for offset in PLACES:
        text.set_position(offset)
        text.set_horizontalalignment("left" if offset[0] > 0 else "right")
        box = text.get_window_extent()
        if not any(box.overlaps(other) for other in placed):
            break
    return box
