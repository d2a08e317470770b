"""What the pages of gemma-eval and gemma-bench share: style, tables, and plots as SVG inside the page. Needs matplotlib.

A page is one file that loads nothing from outside.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from html import escape
from typing import Any, TypeVar

from gemma_edge.report.drawing import Axes, Figure, LogLocator, NullLocator, matplotlib

T = TypeVar("T")
SIZE = (7.2, 3.6)  # inches
# Text stays text: smaller, and it can be searched. The salt makes the same numbers give the same file.
SETTINGS: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "gemma-edge", "font.family": "sans-serif"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
html { color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .35rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th.names, td.names { text-align: left; } thead th { border-bottom: 2px solid #888; white-space: nowrap; }
figure { margin: 0; overflow-x: auto; } figcaption, .note { color: #555; max-width: 48rem; }
svg { max-width: 100%; height: auto; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole HTML text around its parts."""
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def table(columns: Sequence[str], body: Sequence[Sequence[str]], *, names: Collection[str]) -> str:
    """Columns of names to the left, numbers to the right."""
    kinds = [' class="names"' if column in names else "" for column in columns]
    lines = [_row("th", columns, kinds), *(_row("td", row, kinds) for row in body)]
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def _row(tag: str, values: Sequence[str], kinds: Sequence[str]) -> str:
    inner = (f"<{tag}{kind}>{escape(value)}</{tag}>" for value, kind in zip(values, kinds, strict=True))
    return f"<tr>{''.join(inner)}</tr>"


def plot(heading: str, caption: str, figure: Figure) -> str:
    """A heading with the figure as an element below it."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]  # without the XML declaration
    return f"<h2>{heading}</h2><figure>{svg}<figcaption>{caption}</figcaption></figure>"


def colored(things: Iterable[T]) -> Iterator[tuple[T, str]]:
    """The same thing has the same colour in every plot."""
    return ((thing, f"C{index % 10}") for index, thing in enumerate(things))


def axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty plot."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=SIZE, layout="constrained")
        plane = figure.add_subplot()
    plane.set_xlabel(xlabel)
    plane.set_ylabel(ylabel)
    plane.grid(color="#ddd", linewidth=0.7)
    plane.set_axisbelow(True)
    plane.spines[["top", "right"]].set_visible(False)
    return figure, plane


def finish(figure: Figure, plane: Axes, values: Sequence[float]) -> Figure:
    """The legend beside the plot; a logarithmic scale where the values span more than a decade and none is zero."""
    if min(values) > 0 and max(values) > 10 * min(values):
        plane.set_yscale("log")
        plane.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plane.yaxis.set_minor_locator(NullLocator())
        plane.yaxis.set_major_formatter("{x:g}")
    else:
        plane.set_ylim(bottom=0)
    plane.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
