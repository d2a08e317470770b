"""Figures computed from results: samples of each metric, medians, percentiles, speed by position and by minute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median

import numpy as np

from gemma_edge.bench.result import Result
from gemma_edge.bundle.accelerators import CPU

# Group: results of the same model, device and settings, one for each process.
Group = Sequence[Result]


@dataclass(frozen=True)
class Metric:
    """One figure of a group."""

    heading: str
    samples: Callable[
        [Group], list[float]
    ]  # one per repetition or per process; a percentile of all tokens is one sample
    digits: int = 1  # after the decimal point
    more_is_better: bool = False
    what: str = ""  # put before the heading where no table's title says it

    @property
    def title(self) -> str:
        """The heading where it stands alone, without a table around it."""
        return f"{self.what} {self.heading}".strip()


@dataclass(frozen=True)
class Key:
    """What tells groups apart."""

    device: str
    model: str
    backend: str  # and what computes, where that is not the CPU
    threads: int
    prefill: int
    decode: int


def key(result: Result) -> Key:
    """The group that a result belongs to."""
    settings = result.settings
    sizes = (settings.threads, settings.prefill, settings.decode)
    backend, accelerator = str(result.model["backend"]), result.model.get("accelerator", CPU)
    computed = backend if accelerator == CPU else f"{backend} on {accelerator}"
    return Key(str(result.device.get("name", "?")), str(result.model["name"]), computed, *sizes)


def groups(results: Iterable[Result]) -> dict[Key, list[Result]]:
    """Results by key, in the order in which they came."""
    grouped: dict[Key, list[Result]] = {}
    for result in results:
        grouped.setdefault(key(result), []).append(result)
    return grouped


def _each(
    name: str, scale: Callable[[Result, float], float] = lambda result, value: value
) -> Callable[[Group], list[float]]:
    """Samples from a field that has one value per repetition."""
    return lambda group: [scale(result, value) for result in group for value in getattr(result, name)]


def _of(part: str, name: str) -> Callable[[Group], list[float]]:
    """Samples from a field that has one value per process."""

    def samples(group: Group) -> list[float]:
        values = (getattr(result, part).get(name) for result in group)
        return [float(value) for value in values if value is not None]

    return samples


def _percentile(percent: float) -> Callable[[Group], list[float]]:
    """The percentile of the latencies of all tokens of all repetitions together, as one sample."""

    def samples(group: Group) -> list[float]:
        latencies = token_ms(group)
        return [float(np.percentile(latencies, percent))] if latencies else []

    return samples


def token_ms(group: Group) -> list[float]:
    """The latency of every token of every repetition, in ms."""
    return list(chain.from_iterable(row for result in group for row in result.decode_ms))


def _read_speed(result: Result, decode_s: float) -> float:
    """How fast a repetition read memory while it decoded, in 1e9 bytes per second."""
    return float(result.model["read_bytes_per_token"]) * result.settings.decode / decode_s / 1e9


def read_gb_per_s(group: Group) -> list[float]:
    """How fast decoding read memory, per repetition, in 1e9 bytes per second."""
    return [_read_speed(r, s) for r in group if r.model.get("read_bytes_per_token") for s in r.decode_s]


def bandwidth_share(group: Group) -> list[float]:
    """How fast decoding read memory, per repetition, in percent of what the machine was measured to read."""
    limits = {id(result): result.device.get("read_gb_per_s") for result in group}
    return [
        100 * _read_speed(result, decode_s) / float(limit)
        for result in group
        if (limit := limits[id(result)]) and result.model.get("read_bytes_per_token")
        for decode_s in result.decode_s
    ]


def roofline_tokens_per_s(group: Group) -> float | None:
    """The speed of decoding that the machine's read bandwidth allows; None where it is not known."""
    limit, needed = group[0].device.get("read_gb_per_s"), group[0].model.get("read_bytes_per_token")
    return 1e9 * float(limit) / float(needed) if limit and needed else None


def _energy(group: Group) -> list[float]:
    """Joules per generated token, per process."""
    counted = [result for result in group if result.energy]
    return [float(r.energy["decode_j"]) / (r.settings.decode * len(r.decode_s)) for r in counted if r.decode_s]


# METRICS: name -> metric, in the order in which they are shown.
METRICS = {
    "prefill_tokens_per_s": Metric(
        "prefill, tok/s", _each("prefill_s", lambda r, s: r.settings.prefill / s), more_is_better=True
    ),
    "decode_tokens_per_s": Metric(
        "decode, tok/s", _each("decode_s", lambda r, s: r.settings.decode / s), digits=2, more_is_better=True
    ),
    "ttft_s": Metric("TTFT, s", _each("ttft_s"), digits=3),
    "token_p50_ms": Metric("p50, ms", _percentile(50), digits=2, what="token"),
    "token_p95_ms": Metric("p95, ms", _percentile(95), digits=2, what="token"),
    "token_p99_ms": Metric("p99, ms", _percentile(99), digits=2, what="token"),
    "load_cold_s": Metric("cold, s", _of("load", "cold_s"), digits=2, what="load"),
    "load_warm_s": Metric("warm, s", _of("load", "warm_s"), digits=2, what="load"),
    "rss_loaded_mib": Metric("loaded, MiB", _of("memory", "loaded_mib"), digits=0, what="RSS"),
    "rss_end_mib": Metric("end, MiB", _of("memory", "end_mib"), digits=0, what="RSS"),
    "rss_peak_mib": Metric("peak, MiB", _of("memory", "peak_mib"), digits=0, what="RSS"),
    "read_gb_per_s": Metric("reads, GB/s", read_gb_per_s, more_is_better=True),
    "bandwidth_percent": Metric("of limit, %", bandwidth_share, digits=0, more_is_better=True),
    "energy_j": Metric("J/token", _energy, digits=2),
}


def summary(group: Group) -> dict[str, float | None]:
    """The median of each metric; None where there is no sample."""
    every = {name: metric.samples(group) for name, metric in METRICS.items()}
    return {name: median(samples) if samples else None for name, samples in every.items()}


def by_position(group: Group) -> list[tuple[int, float]]:
    """Position in the context, and tokens per second there: from the median latency of all repetitions."""
    rows = [row for result in group for row in result.decode_ms if row]
    if not rows:
        return []
    first = group[0].settings.prefill
    return [(first + i, 1e3 / median(column)) for i, column in enumerate(zip(*rows, strict=True))]


def by_minute(group: Group) -> list[tuple[int, float]]:
    """Minute since the process started, and tokens per second of decoding in it. A phone that throttles falls off."""
    tokens: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for result in group:
        for at_s, row in zip(result.decode_at_s, result.decode_ms, strict=False):
            for end_ms, latency_ms in zip(np.cumsum(row), row, strict=True):
                minute = int((at_s + end_ms / 1e3) // 60)
                tokens[minute] = tokens.get(minute, 0) + 1
                seconds[minute] = seconds.get(minute, 0.0) + latency_ms / 1e3
    return [(minute, tokens[minute] / seconds[minute]) for minute in sorted(tokens)]


def throttling(group: Group) -> float | None:
    """How much slower the slowest minute was than the first one: 0.2 is a fifth. None for less than two minutes."""
    minutes = [speed for _, speed in by_minute(group)]
    return 1 - min(minutes) / minutes[0] if len(minutes) > 1 else None
