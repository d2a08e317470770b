"""Which backend of a bundle a phone should run: a sentence for every phone and bundle of which several backends were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import geometric_mean, median

from gemma_edge.bench.result import Result
from gemma_edge.bench.stats import METRICS, Group, groups

PHONES = "gemma-edge-android"  # `Result.tool` of phones
# Sizes: threads, prompt tokens, generated tokens.
Sizes = tuple[int, int, int]
# ByBackend: the results of one bundle on one phone, by backend and sizes.
ByBackend = dict[str, dict[Sizes, list[Result]]]


def advice(results: Iterable[Result]) -> list[str]:
    """Which backend to ship, in one line for each phone and bundle."""
    bundles: dict[tuple[str, str], ByBackend] = {}
    measured = (result for result in results if result.tool == PHONES and not result.failure and result.decode_s)
    for key, group in groups(measured).items():
        backends = bundles.setdefault((key.device, key.model), {})
        backends.setdefault(key.backend, {})[key.threads, key.prefill, key.decode] = group
    chosen = ((name, _choose(backends)) for name, backends in bundles.items())
    return [f"{device}, {model}: {text}" for (device, model), text in chosen if text]


def _answers_s(group: Group) -> list[float]:
    """Seconds for the prompt and the whole answer, per repetition."""
    return [first + rest for result in group for first, rest in zip(result.ttft_s, result.decode_s, strict=True)]


def _peak_mib(by_sizes: Mapping[Sizes, Group]) -> float:
    """The most memory that a backend took."""
    metric = METRICS["rss_peak_mib"]
    return max((value for group in by_sizes.values() for value in metric.samples(group)), default=0.0)


def _choose(backends: ByBackend) -> str:
    """Which of several backends to ship, and why; "" where nothing can be compared."""
    shared = set.intersection(*(set(by_sizes) for by_sizes in backends.values()))
    if len(backends) < 2 or not shared:
        return ""
    answers = {name: [_answers_s(by_sizes[sizes]) for sizes in shared] for name, by_sizes in backends.items()}
    seconds = {name: geometric_mean(map(median, samples)) for name, samples in answers.items()}
    first, second = sorted(seconds, key=lambda name: seconds[name])[:2]
    peaks = {name: _peak_mib(backends[name]) for name in (first, second)}
    pairs = zip(answers[first], answers[second], strict=True)
    if any(max(faster) >= min(slower) for faster, slower in pairs):
        small, large = sorted((first, second), key=lambda name: peaks[name])
        return (
            f"{first} and {second} are equally fast within noise; ship {small}, which takes {peaks[small]:.0f} MiB"
            f" of memory at its peak, {large} takes {peaks[large]:.0f} MiB"
        )
    return (
        f"ship {first}: prompt and answer take {seconds[first]:.2f} s and {peaks[first]:.0f} MiB of memory, with {second}"
        f" {seconds[second]:.2f} s and {peaks[second]:.0f} MiB"
    )
