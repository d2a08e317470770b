"""The plots of docs/measure/benchmarks.md: how far contenders are from the original, over what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.files import write_whole
from gemma_edge.report.drawing import axes, svg

OURS, PEER = "C0", "#888888"


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
    for point in points:
        color = OURS if point.ours else PEER
        plane.plot(point.cost, point.kl, "o", color=color)
        at = (point.cost, point.kl)
        plane.annotate(point.name, at, (5, 4), textcoords="offset points", fontsize=8, color=color, parse_math=False)
    plane.set_yscale("log")
    write_whole(path, svg(figure) + "\n")
