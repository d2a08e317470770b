"""gemma-eval's page: one HTML file with the tables and the plots. Needs matplotlib, of the `eval` extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from gemma_edge.evaluate.evaluate import Evaluation, Result
from gemma_edge.evaluate.report import COLUMNS, NAMES, rows, task_rows
from gemma_edge.report import html as html_page
from gemma_edge.report.drawing import Figure, MaxNLocator
from gemma_edge.report.html import axes, colored, finish
from gemma_edge.text.windows import PROTOCOLS


def page(done: Evaluation) -> str:
    """The whole HTML text."""
    texts = ", ".join(escape(Path(text).name) for text in done.texts)
    parts = [
        f"<p>{done.results[0].tokens} tokens of {texts} scored. Protocol <b>{escape(done.protocol)}</b>, windows of"
        f" {done.window}: {escape(PROTOCOLS[done.protocol].what)}. KL is in nats per token, original || model; top-1 is how"
        " often both find the same token the most likely.</p>",
        *(f'<p class="note">Note: {escape(note)}.</p>' for note in done.notes),
        html_page.table(COLUMNS, rows(done), names=NAMES),
    ]
    if scores := task_rows(done):
        parts += [
            "<h2>Tasks</h2>",
            html_page.table(("task", "metric", *(r.name for r in done.results)), scores, names=NAMES),
        ]
    parts += [html_page.plot(*plot) for plot in plots(done.results)]
    return html_page.page("gemma-eval", parts)


def plots(results: Sequence[Result]) -> Iterator[tuple[str, str, Figure]]:
    """(heading, caption, figure) of each plot that there are numbers for."""
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
    figure, plane = axes("bits per weight, scales included", "KL, nats per token")
    for result, color in colored(results):
        if result.bits_per_weight is not None and result.kl is not None:
            plane.plot(result.bits_per_weight, result.kl, "o", color=color, alpha=0.8, label=result.name)
    return finish(figure, plane, [result.kl for result in results if result.kl is not None])


def _positions(results: Sequence[Result]) -> Figure:
    figure, plane = axes("position in the window, tokens", "KL, nats per token")
    for result, color in colored(results):
        if result.kl_by_position:
            middles = [(part["first"] + part["last"]) / 2 for part in result.kl_by_position]
            values = [part["kl"] for part in result.kl_by_position]
            plane.plot(middles, values, color=color, label=result.name)
    return finish(figure, plane, [part["kl"] for result in results for part in result.kl_by_position])


def _layers(results: Sequence[Result]) -> Figure:
    figure, plane = axes("layer", "relative error")
    for result, color in colored(results):
        if result.layers:
            plane.plot(range(len(result.layers)), result.layers, "o-", color=color, markersize=4, label=result.name)
    plane.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(figure, plane, [error for result in results for error in result.layers])
