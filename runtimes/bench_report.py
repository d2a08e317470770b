"""What gemma-bench prints: tables for people, CSV for spreadsheets. JSON is bench_result.py's, the page bench_html.py's."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from statistics import median

from gemma_edge.console import OUT, print_table
from gemma_edge.runtimes.bench_result import Result
from gemma_edge.runtimes.bench_stats import METRICS, Key, groups, roofline_tokens_per_s, summary, throttling

TABLES = {  # heading -> metrics
    "speed": ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s"),
    "latency of a token, and memory bandwidth": (
        "token_p50_ms", "token_p95_ms", "token_p99_ms", "read_gb_per_s", "bandwidth_percent", "energy_j",
    ),
    "load and resident memory": ("load_cold_s", "load_warm_s", "rss_loaded_mib", "rss_end_mib", "rss_peak_mib"),
}  # fmt: skip
BUSY_CORES = 0.1  # more than this disturbs what is measured
KEYS = {"device": "device", "model": "model", "backend": "backend", "t": "threads", "p": "prefill", "n": "decode"}
NAMES = ("model", "backend", "device")  # columns of text


def spread(samples: Sequence[float], digits: int) -> str:
    """The median, and how far the farthest sample lies from it, as a table cell."""
    if not samples:
        return "-"
    middle = median(samples)
    if len(samples) == 1 or not middle:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ±{max(abs(sample / middle - 1) for sample in samples):.0%}"


def table(results: Sequence[Result], metrics: Sequence[str]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """What is the same for all, columns and rows; metrics of which nobody has a sample are left out."""
    found = groups(result for result in results if not result.failure)
    keys = {name: [str(getattr(key, field)) for key in found] for name, field in KEYS.items()}
    same = {name for name, values in keys.items() if name != "model" and len(set(values)) == 1}
    shown = [METRICS[name] for name in metrics if any(METRICS[name].samples(group) for group in found.values())]
    cells = {metric.heading: [spread(metric.samples(g), metric.digits) for g in found.values()] for metric in shown}
    columns = {**{name: values for name, values in keys.items() if name not in same}, **cells}
    common = ", ".join(f"{name} {values[0]}" for name, values in keys.items() if name in same - {"device"})
    return common, tuple(columns), list(zip(*columns.values(), strict=True)) if shown else []


def machine_line(result: Result) -> str:
    """What was measured on, in one line."""
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


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know before quoting: the machines, failures, who else was busy, throttling."""
    lines = list(dict.fromkeys(machine_line(result) for result in results))
    for key, group in groups(results).items():
        name = f"{key.model} ({key.backend}, {key.threads} threads, prompt {key.prefill})"
        lines += [f"{name} failed: {failure}" for failure in dict.fromkeys(r.failure for r in group) if failure]
        busy = max((result.others_cores or 0.0 for result in group), default=0.0)
        if busy > BUSY_CORES:
            lines.append(f"{name}: other processes kept {busy:.1f} cores busy; do not quote its speed")
        if (lost := throttling(group)) is not None:
            lines.append(f"{name}: the slowest minute decoded {lost:.0%} slower than the first one")
    return lines


def print_tables(results: Sequence[Result]) -> None:
    """The end of `gemma-bench`."""
    for heading, metrics in TABLES.items():
        common, columns, rows = table(results, metrics)
        if rows:
            print_table(f"{heading}: {common}" if common else heading, columns, rows, names=NAMES)
    for line in notes(results):
        OUT.print(line, highlight=False, soft_wrap=True, markup=False)


def to_csv(results: Sequence[Result]) -> str:
    """One line per group: what was measured, the median of each metric, the number of repetitions, the failure."""
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
