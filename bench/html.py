"""gemma-bench's page: one HTML file with the tables and the plots. It needs matplotlib, which the `eval` extra installs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from gemma_edge.bench.report import KEYS, TABLES, TEXT_COLUMNS, notes, table
from gemma_edge.bench.result import Result
from gemma_edge.bench.stats import METRICS, Group, Key, by_minute, by_position, groups, roofline_tokens_per_s, token_ms
from gemma_edge.report.drawing import (
    Figure,
    MaxNLocator,
    StrMethodFormatter,
    axes,
    colored,
    finish,
    legend,
    svg,
)
from gemma_edge.report.html import Plot, Table, render

Groups = Mapping[str, Group]  # label -> the results of one group
# LATENCY_BINS: how many bins the plot of latencies has.
LATENCY_BINS = 60


def page(results: Sequence[Result]) -> str:
    """The whole HTML text."""
    tables = []
    for heading, metrics in TABLES.items():
        common, columns, rows = table(results, metrics)
        if rows:
            tables.append(Table(columns, rows, TEXT_COLUMNS, f"{heading}: {common}" if common else heading))
    drawn = [Plot(heading, caption, svg(figure)) for heading, caption, figure in plots(labelled(results))]
    return render("gemma_edge.bench", title="gemma-bench", notes=notes(results), tables=tables, plots=drawn)


def labelled(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The groups that were measured, by the model's name and by the keys that differ between groups."""
    measured = groups(result for result in results if not result.failure)
    names = [name for name in KEYS if name == "model" or len({getattr(key, KEYS[name]) for key in measured}) > 1]
    return {" ".join(_word(name, key) for name in names): group for key, group in measured.items()}


def _word(name: str, key: Key) -> str:
    value = str(getattr(key, KEYS[name]))
    return f"{name}{value}" if len(name) == 1 else value


def plots(measured: Groups) -> Iterator[tuple[str, str, Figure]]:
    """Heading, caption and figure of each plot that there are numbers for."""
    bars = "Medians, with the range of all repetitions."
    for name, caption in (
        ("prefill_tokens_per_s", bars),
        ("decode_tokens_per_s", f"{bars} Dashed: what memory allows."),
    ):
        if any(METRICS[name].samples(group) for group in measured.values()):
            yield METRICS[name].heading.capitalize(), caption, _bars(measured, name)
    if any(roofline_tokens_per_s(group) for group in measured.values()):
        caption = (
            "Each line is what the machine reads with so many threads: a token that reads so much cannot come faster."
            " A model on its line is limited by memory, one below it by computing."
        )
        yield "Roofline of decoding", caption, _roofline(measured)
    if any(token_ms(group) for group in measured.values()):
        caption = "The median of the repetitions at each position of the context."
        yield "Tokens per second by position", caption, _lines(measured, by_position, "position in the context, tokens")
        caption = "Of all repetitions; the slowest 1 % of tokens are counted in the last bin."
        yield "Latency of a token", caption, _latencies(measured)
    if any(len(by_minute(group)) > 1 for group in measured.values()):
        caption = "While decoding. A device that gets too hot falls off."
        yield "Tokens per second by minute", caption, _lines(measured, by_minute, "minute since the start")
    if any(result.memory.get("samples") for group in measured.values() for result in group):
        yield "Memory over time", "Resident memory of the process, of the first round.", _memory(measured)


def _bars(measured: Groups, name: str) -> Figure:
    bars = [(label, color, METRICS[name].samples(group)) for (label, group), color in colored(measured.items())]
    bars = [bar for bar in bars if bar[2]]
    figure, plane = axes(METRICS[name].heading, "")
    figure.set_figheight(0.9 + 0.45 * len(bars))
    for row, (label, color, samples) in enumerate(bars):
        middle = median(samples)
        reach = [[middle - min(samples)], [max(samples) - middle]]
        plane.barh(row, middle, xerr=reach, color=color, alpha=0.8, ecolor="#222", capsize=3)
        if name == "decode_tokens_per_s" and (limit := roofline_tokens_per_s(measured[label])):
            plane.plot([limit, limit], [row - 0.4, row + 0.4], "--", color="#222", linewidth=1)
    plane.set_yticks(range(len(bars)), [label for label, _, _ in bars], parse_math=False)
    plane.invert_yaxis()
    plane.set_xlim(left=0)
    return figure


def _roofline(measured: Groups) -> Figure:
    figure, plane = axes("read for a token, GB", "decode, tok/s")
    points = {}
    for label, group in measured.items():
        if roofline_tokens_per_s(group):
            speed = median(METRICS["decode_tokens_per_s"].samples(group))
            points[label] = (float(group[0].model["read_bytes_per_token"]) / 1e9, speed)
    limits = {
        (str(result.device["name"]), result.settings.threads): float(result.device["read_gb_per_s"])
        for label in points
        for result in measured[label]
    }
    sizes = [size for size, _ in points.values()]
    span = np.geomspace(min(sizes) / 2, max(sizes) * 2, 2)
    for (_, threads), limit in limits.items():
        plane.plot(span, limit / span, "--", color="#888", linewidth=1)
        plane.annotate(f"{limit:.1f} GB/s, {threads} threads", (span[0], limit / span[0]), fontsize=8, color="#555")
    for label, color in colored(measured):
        if label in points:
            plane.plot(*points[label], "o", color=color, label=label)
    plane.loglog()
    for axis in (plane.xaxis, plane.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(StrMethodFormatter(""))
    legend(plane)
    return figure


def _lines(measured: Groups, series: Callable[[Group], list[tuple[int, float]]], xlabel: str) -> Figure:
    figure, plane = axes(xlabel, "tok/s")
    values: list[float] = []
    for (label, group), color in colored(measured.items()):
        if pairs := series(group):
            plane.plot(*zip(*pairs, strict=True), color=color, label=label)
            values += [value for _, value in pairs]
    plane.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(figure, plane, values)


def _latencies(measured: Groups) -> Figure:
    figure, plane = axes("latency, ms", "tokens, %")
    everything = np.concatenate([token_ms(group) for group in measured.values()])
    edges = np.linspace(0, float(np.percentile(everything, 99)), LATENCY_BINS + 1).tolist()
    for (label, group), color in colored(measured.items()):
        latencies = np.minimum(token_ms(group), edges[-1])
        if latencies.size:
            weights = np.full(latencies.size, 100 / latencies.size)
            plane.hist(latencies, edges, weights=weights, histtype="step", color=color, label=label)
    legend(plane)
    return figure


def _memory(measured: Groups) -> Figure:
    figure, plane = axes("seconds since the process started", "MiB")
    for (label, group), color in colored(measured.items()):
        if samples := group[0].memory.get("samples"):
            plane.plot(*zip(*samples, strict=True), color=color, label=label)
    plane.set_ylim(bottom=0)
    legend(plane)
    return figure
