"""gemma-eval's page: one HTML file with the tables and, as SVG inside it, the plots. Needs matplotlib, of the `eval` extra."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from gemma_edge.runtimes.eval_report import COLUMNS, NAMES, rows, task_rows
from gemma_edge.runtimes.evaluate import Evaluation, Result
from gemma_edge.runtimes.windows import PROTOCOLS

SIZE = (7.2, 3.6)  # inches
# Text stays text: smaller, and it can be searched. The salt makes the same numbers give the same file.
SETTINGS: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "gemma-eval", "font.family": "sans-serif"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
html { color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .35rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th.names, td.names { text-align: left; } thead th { border-bottom: 2px solid #888; white-space: nowrap; }
figure { margin: 0; overflow-x: auto; } figcaption, .note { color: #555; max-width: 48rem; }
svg { max-width: 100%; height: auto; }
"""


def page(done: Evaluation) -> str:
    """The whole HTML text."""
    texts = ", ".join(escape(Path(text).name) for text in done.texts)
    parts = [
        "<h1>gemma-eval</h1>",
        f"<p>{done.results[0].tokens} tokens of {texts} scored. Protocol <b>{escape(done.protocol)}</b>, windows of"
        f" {done.window}: {escape(PROTOCOLS[done.protocol].what)}. KL is in nats per token, original || model; top-1 is how"
        " often both find the same token the most likely.</p>",
        *(f'<p class="note">Note: {escape(note)}.</p>' for note in done.notes),
        _table(COLUMNS, rows(done)),
    ]
    if scores := task_rows(done):
        parts += ["<h2>Tasks</h2>", _table(("task", "metric", *(result.name for result in done.results)), scores)]
    for heading, caption, figure in plots(done.results):
        parts.append(f"<h2>{heading}</h2><figure>{_svg(figure)}<figcaption>{caption}</figcaption></figure>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>gemma-eval</title><style>{STYLE}</style></head>'
        f"<body>\n{body}\n</body></html>\n"
    )


def _table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns of names to the left, numbers to the right."""
    kinds = [' class="names"' if column in NAMES else "" for column in columns]
    lines = [_row("th", columns, kinds), *(_row("td", row, kinds) for row in body)]
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def _row(tag: str, values: Sequence[str], kinds: Sequence[str]) -> str:
    inner = (f"<{tag}{kind}>{escape(value)}</{tag}>" for value, kind in zip(values, kinds, strict=True))
    return f"<tr>{''.join(inner)}</tr>"


def plots(results: Sequence[Result]) -> Iterator[tuple[str, str, Figure]]:
    """(heading, caption, figure) of each plot that there are numbers for."""
    with matplotlib.rc_context(SETTINGS):
        if any(result.kl is not None and result.bits_per_weight is not None for result in results):
            caption = "Down and to the left is better: smaller, and closer to the original."
            yield "Size and distance from the original", caption, _sizes(results)
        if any(result.kl_by_position for result in results):
            yield "KL by position in the window", "Means over stretches of the window.", _positions(results)
        if any(result.layers for result in results):
            caption = (
                "|x - x_original| / |x_original| of what each block gives to the next: of a folder measured here on the first"
                " tokens, of a bundle as its calibration recorded it."
            )
            yield "Relative error of each layer", caption, _layers(results)


def _sizes(results: Sequence[Result]) -> Figure:
    figure, axes = _axes("bits per weight, scales included", "KL, nats per token")
    for result, color in _colored(results):
        if result.bits_per_weight is not None and result.kl is not None:
            axes.plot(result.bits_per_weight, result.kl, "o", color=color, alpha=0.8, label=result.name)
    return _finish(figure, axes, [result.kl for result in results if result.kl is not None])


def _positions(results: Sequence[Result]) -> Figure:
    figure, axes = _axes("position in the window, tokens", "KL, nats per token")
    for result, color in _colored(results):
        if result.kl_by_position:
            middles = [(part["first"] + part["last"]) / 2 for part in result.kl_by_position]
            values = [part["kl"] for part in result.kl_by_position]
            axes.plot(middles, values, color=color, label=result.name)
    return _finish(figure, axes, [part["kl"] for result in results for part in result.kl_by_position])


def _layers(results: Sequence[Result]) -> Figure:
    figure, axes = _axes("layer", "relative error")
    for result, color in _colored(results):
        if result.layers:
            axes.plot(range(len(result.layers)), result.layers, "o-", color=color, markersize=4, label=result.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, axes, [error for result in results for error in result.layers])


def _colored(results: Sequence[Result]) -> Iterator[tuple[Result, str]]:
    """A model has the same colour in every plot."""
    return ((result, f"C{index % 10}") for index, result in enumerate(results))


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="#ddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, axes: Axes, values: Sequence[float]) -> Figure:
    """The legend beside the plot; a logarithmic scale where the values span more than a decade and none is zero."""
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _svg(figure: Figure) -> str:
    """The figure as an element, without the XML declaration."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
