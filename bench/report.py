"""What gemma-bench prints: tables for people, CSV for spreadsheets. The JSON is result.py's, the page is html.py's."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from statistics import median

from gemma_edge.bench.choice import advice
from gemma_edge.bench.compare import ALPHA, MIN_CHANGE, MIN_SAMPLES, Change
from gemma_edge.bench.result import Result
from gemma_edge.bench.stats import METRICS, Key, groups, roofline_tokens_per_s, summary, throttling
from gemma_edge.report.console import OUT, print_table, say

# TABLES: heading -> the metrics in its columns.
TABLES = {
    "speed": ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s"),
    "latency of a token, and memory bandwidth": (
        "token_p50_ms", "token_p95_ms", "token_p99_ms", "read_gb_per_s", "bandwidth_percent", "energy_j",
    ),
    "load and resident memory": ("load_cold_s", "load_warm_s", "rss_loaded_mib", "rss_end_mib", "rss_peak_mib"),
}  # fmt: skip
# STATISTICS: how it is decided what has changed, for the end of a comparison.
STATISTICS = (
    f"Changed: medians differ by more than {MIN_CHANGE:.0%} and p < {ALPHA} in a two-sided exact Mann-Whitney test. Each process"
    f" is one sample; each side needs at least {MIN_SAMPLES}: --rounds {MIN_SAMPLES}."
)
# BUSY_CORES: how many cores other processes may keep busy before a measurement counts as disturbed.
BUSY_CORES = 0.1
# KEYS: the heading of a column -> the field of `Key` in it.
KEYS = {"device": "device", "model": "model", "backend": "backend", "t": "threads", "p": "prefill", "n": "decode"}
# TEXT_COLUMNS: the columns that hold text; the others hold numbers.
TEXT_COLUMNS = ("model", "backend", "device")


def spread(samples: Sequence[float], digits: int) -> str:
    """A table cell: the median, and how far the farthest sample lies from it."""
    if not samples:
        return "-"
    middle = median(samples)
    if len(samples) == 1 or not middle:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ±{max(abs(sample / middle - 1) for sample in samples):.0%}"


def table(results: Sequence[Result], metrics: Sequence[str]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """A table of the groups that were measured. A metric without any sample is left out.

    Args:
        metrics: names in METRICS.

    Returns:
        what is the same for all groups, for the heading; the columns; the rows, which are empty where no metric has a sample.
    """
    measured = groups(result for result in results if not result.failure)
    keys = {name: [str(getattr(key, field)) for key in measured] for name, field in KEYS.items()}
    same = {name for name, values in keys.items() if name != "model" and len(set(values)) == 1}
    shown = [METRICS[name] for name in metrics if any(METRICS[name].samples(group) for group in measured.values())]
    cells = {metric.heading: [spread(metric.samples(g), metric.digits) for g in measured.values()] for metric in shown}
    columns = {**{name: values for name, values in keys.items() if name not in same}, **cells}
    common = ", ".join(f"{name} {values[0]}" for name, values in keys.items() if name in same - {"device"})
    return common, tuple(columns), list(zip(*columns.values(), strict=True)) if shown else []


def machine_line(result: Result) -> str:
    """The machine that a result was measured on, in one line."""
    device = result.device
    parts = [str(device.get("name", "?"))]
    if device.get("cores"):
        parts.append(f"{device['cores']} cores")
    if device.get("ram_bytes"):
        parts.append(f"{device['ram_bytes'] / 2**30:.1f} GiB")
    parts += [str(device[name]) for name in ("soc", "system", "governor") if device.get(name)]
    if device.get("read_gb_per_s"):
        parts.append(f"reads {device['read_gb_per_s']} GB/s with {result.settings.threads} threads")
    return ", ".join(parts)


def others_cores(results: Sequence[Result]) -> float:
    """How many cores other processes kept busy: the largest number of all results."""
    return max((result.others_cores or 0.0 for result in results), default=0.0)


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know before quoting a figure: machines, failures, other processes, throttling; what to ship."""
    lines = list(dict.fromkeys(machine_line(result) for result in results))
    for key, group in groups(results).items():
        name = f"{key.model} ({key.backend}, {key.threads} threads, prompt {key.prefill})"
        lines += [f"{name} failed: {failure}" for failure in dict.fromkeys(r.failure for r in group) if failure]
        if (busy := others_cores(group)) > BUSY_CORES:
            lines.append(f"{name}: other processes kept {busy:.1f} cores busy; do not quote its speed")
        if (lost := throttling(group)) is not None:
            lines.append(f"{name}: the slowest minute decoded {lost:.0%} slower than the first one")
    return lines + advice(results)


def print_tables(results: Sequence[Result]) -> None:
    """Print every table that has rows, and the notes."""
    for heading, metrics in TABLES.items():
        common, columns, rows = table(results, metrics)
        if rows:
            print_table(f"{heading}: {common}" if common else heading, columns, rows, names=TEXT_COLUMNS)
    for line in notes(results):
        say(OUT, line)


def print_changes(changes: Sequence[Change]) -> None:
    """Print a comparison: everything that was compared, then what changed."""
    names = ("group", "metric", "")
    columns = ("group", "metric", "before", "after", "change", "p", "")
    rows = [change_cells(change) for change in changes]
    print_table("all that was compared", columns, rows, names=names)
    beyond_noise = [change for change in changes if change.verdict in ("better", "worse")]
    for change in beyond_noise:
        _, metric, before, after, difference, _, verdict = change_cells(change)
        say(OUT, f"{verdict}: {metric} {before} -> {after} ({difference}), {change.group}")
    unknown = sum(change.verdict == "unknown" for change in changes)
    say(
        OUT,
        f"{len(beyond_noise)} of {len(changes)} changed beyond noise, {unknown} have too few samples to tell. {STATISTICS}",
    )


def change_cells(change: Change) -> tuple[str, ...]:
    """A row of the table of changes."""
    metric = METRICS[change.metric]
    middles = (f"{value:.{metric.digits}f}" for value in (change.before, change.after))
    p = "-" if change.p is None else f"{change.p:.2g}"
    verdict = "too few samples" if change.verdict == "unknown" else change.verdict
    return (change.group, metric.title, *middles, f"{change.change:+.1%}", p, verdict)


def to_csv(results: Sequence[Result]) -> str:
    """CSV with one line per group: its key, the number of repetitions, the median of each metric, the failure."""
    out = io.StringIO()
    names = [field.name for field in fields(Key)]
    writer = csv.DictWriter(
        out, [*names, "repetitions", *METRICS, "roofline_tokens_per_s", "failure"], lineterminator="\n"
    )
    writer.writeheader()
    for key, group in groups(results).items():
        figures = {**summary(group), "roofline_tokens_per_s": roofline_tokens_per_s(group)}
        shown = {name: f"{value:.6g}" for name, value in figures.items() if value is not None}
        repetitions = sum(len(result.prefill_s) for result in group)
        failure = next((result.failure for result in group if result.failure), "")
        writer.writerow({**asdict(key), "repetitions": repetitions, **shown, "failure": failure})
    return out.getvalue()
