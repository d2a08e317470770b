"""Plots as SVG by matplotlib, which the `eval` extra installs. Every module that draws takes matplotlib from here.

When it is imported, matplotlib reads a file `matplotlibrc` of the current folder, which may be a stranger's model folder. So it
is imported while the current folder is an empty one. The user's own configuration folder counts as ever.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from gemma_edge.children import own_place

with own_place() as _place, contextlib.chdir(_place.cwd):
    import matplotlib

from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure as Figure
from matplotlib.patches import Rectangle as Rectangle
from matplotlib.ticker import LogLocator as LogLocator
from matplotlib.ticker import MaxNLocator as MaxNLocator
from matplotlib.ticker import NullLocator as NullLocator
from matplotlib.ticker import StrMethodFormatter as StrMethodFormatter
from matplotlib.transforms import Bbox as Bbox

T = TypeVar("T")
# SIZE: width and height of a plot in inches.
SIZE = (7.2, 3.6)
# SETTINGS: text stays text, which is smaller than outlines and can be searched. The salt gives equal figures equal files.
SETTINGS: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "gemma-edge", "font.family": "sans-serif"}


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, which is also a whole SVG file."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration


def png(figure: Figure, dots_per_inch: int) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


def colored(things: Iterable[T]) -> Iterator[tuple[T, str]]:
    """Each thing with its colour, which is the same in every plot of the same things."""
    return ((thing, f"C{index % 10}") for index, thing in enumerate(things))


def axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty plot."""
    figure, plane = blank(SIZE)
    plane.set_xlabel(xlabel)
    plane.set_ylabel(ylabel)
    plane.grid(color="#ddd", linewidth=0.7)
    plane.set_axisbelow(True)
    plane.spines[["top", "right"]].set_visible(False)
    return figure, plane


def blank(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of a size in inches, with one plane and nothing on it."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot()


def legend(plane: Axes) -> None:
    """Put the legend beside the plot."""
    for text in plane.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)).get_texts():
        text.set_parse_math(False)  # a dollar sign in a model's name is not a formula


def finish(figure: Figure, plane: Axes, values: Sequence[float]) -> Figure:
    """Add the legend, and choose the scale: logarithmic where the values span more than a decade and none of them is zero."""
    if min(values) > 0 and max(values) > 10 * min(values):
        plane.set_yscale("log")
        plane.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plane.yaxis.set_minor_locator(NullLocator())
        plane.yaxis.set_major_formatter("{x:g}")
    else:
        plane.set_ylim(bottom=0)
    legend(plane)
    return figure
