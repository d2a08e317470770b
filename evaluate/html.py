"""gemma-eval's page: one HTML file with the tables and the plots. It needs matplotlib, which the `eval` extra installs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma_edge.evaluate.report import (
    COLUMNS,
    MEMORIZATION_COLUMNS,
    TEXT_COLUMNS,
    memorization_rows,
    rows,
    task_columns,
    task_rows,
)
from gemma_edge.evaluate.result import Evaluation, Result
from gemma_edge.report.drawing import Figure, MaxNLocator, axes, colored, finish, svg
from gemma_edge.report.html import Plot, Table, render
from gemma_edge.text.windows import PROTOCOLS


def page(evaluation: Evaluation) -> str:
    """The whole HTML text."""
    tables = [Table(COLUMNS, rows(evaluation), TEXT_COLUMNS)]
    if scores := task_rows(evaluation):
        tables.append(Table(task_columns(evaluation), scores, TEXT_COLUMNS, "Tasks"))
    if found := memorization_rows(evaluation):
        tables.append(Table(MEMORIZATION_COLUMNS, found, TEXT_COLUMNS, "Memorization"))
    return render(
        "gemma_edge.evaluate",
        title="gemma-eval",
        evaluation=evaluation,
        tokens=evaluation.results[0].tokens,
        texts=", ".join(Path(text).name for text in evaluation.texts),
        protocol=PROTOCOLS[evaluation.protocol],
        tables=tables,
        plots=[Plot(heading, caption, svg(figure)) for heading, caption, figure in plots(evaluation.results)],
    )


def plots(results: Sequence[Result]) -> Iterator[tuple[str, str, Figure]]:
    """Heading, caption and figure of each plot that there are numbers for."""
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
