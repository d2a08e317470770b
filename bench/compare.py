"""What changed between two sets of results, beyond noise.

A metric has changed when its medians differ by more than MIN_CHANGE and a two-sided Mann-Whitney test gives p < ALPHA. The test
is exact, ties included, and assumes no distribution. Each process is one sample: the median of its repetitions. The repetitions
of a process are not independent, because they share its place in memory, its core, and what else ran at the time: taken as
samples, they made two runs of one bundle on a busy machine differ "significantly". p is not corrected for the number of
comparisons, but that number is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

import numpy as np

from gemma_edge.bench.result import Result
from gemma_edge.bench.stats import METRICS, Group, Key, Metric, key
from gemma_edge.errors import InputError

# MIN_CHANGE: the smallest change of a median that counts, however certain it is.
MIN_CHANGE = 0.03
# ALPHA: p must be below it. Five against five samples reach 0.008, when all of one side lie beyond all of the other.
ALPHA = 0.01
# MIN_SAMPLES: how many processes each side needs.
MIN_SAMPLES = 5
# DERIVED: metrics that are not compared, because they follow from the speed of decoding.
DERIVED = ("read_gb_per_s", "bandwidth_percent")


@dataclass(frozen=True)
class Change:
    """One metric of one group, before and after."""

    group: str  # the keys that tell it from the other groups
    metric: str  # a name in METRICS
    before: float  # median
    after: float  # median
    samples: tuple[int, int]  # processes before and after
    p: float | None  # None where there are too few samples
    verdict: str  # better, worse, same or unknown

    @property
    def change(self) -> float:
        """The relative change: 0.1 is a tenth more."""
        return self.after / self.before - 1 if self.before else 0.0


def compare(before: Sequence[Result], after: Sequence[Result]) -> list[Change]:
    """Compare every metric of every group that both sides have.

    A key that is the same for all results of a side does not tell groups apart. So the results of one model can be compared with
    those of another model, and one machine with another.

    Raises:
        InputError: the two sides have no group in common.
    """
    both = [[result for result in results if not result.failure] for results in (before, after)]
    differing = [
        field.name
        for field in fields(Key)
        if any(len({getattr(key(result), field.name) for result in results}) > 1 for results in both)
    ]
    old, new = (_named(results, differing) for results in both)
    shared = [name for name in old if name in new]
    if not shared:
        raise InputError(
            f"the two files have nothing in common: {_list(old)} there, {_list(new)} here",
            hint="measure the same `prefill`, `decode` and `threads`",
        )
    return [
        change
        for name in shared
        for metric in METRICS
        if metric not in DERIVED and (change := _compare(name, metric, old[name], new[name])) is not None
    ]


def _named(results: Sequence[Result], names: Sequence[str]) -> dict[str, list[Result]]:
    """Results by the values of the keys with these names."""
    named: dict[str, list[Result]] = {}
    for result in results:
        words = (f"{name} {getattr(key(result), name)}" for name in names)
        named.setdefault(", ".join(words) or "all", []).append(result)
    return named


def _list(groups: dict[str, list[Result]]) -> str:
    return "; ".join(groups) or "only failures"


def _compare(group: str, name: str, old: Group, new: Group) -> Change | None:
    metric = METRICS[name]
    before, after = _samples(metric, old), _samples(metric, new)
    if not before or not after:
        return None
    middles, counts = (median(before), median(after)), (len(before), len(after))
    if min(counts) < MIN_SAMPLES:
        return Change(group, name, *middles, counts, None, "unknown")
    p = mann_whitney(before, after)
    differs = abs(middles[1] / middles[0] - 1) > MIN_CHANGE if middles[0] else middles[1] != 0
    if p >= ALPHA or not differs:
        return Change(group, name, *middles, counts, p, "same")
    return Change(
        group, name, *middles, counts, p, "better" if (middles[1] > middles[0]) == metric.more_is_better else "worse"
    )


def _samples(metric: Metric, group: Group) -> list[float]:
    """The median of each process that has samples."""
    return [median(samples) for result in group if (samples := metric.samples([result]))]


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p-value of the exact Mann-Whitney test, by counting all ways to deal out the ranks.

    Args:
        a, b: at least one value each.

    Returns:
        how likely samples of one distribution are to differ as much as these do.
    """
    values, counts = np.unique([*a, *b], return_counts=True)
    ends = np.cumsum(counts)
    twice = 2 * ends - counts + 1  # twice the mean rank of each value: a whole number even for ties
    rank = dict(zip(values.tolist(), twice.tolist(), strict=True))
    ranks = [rank[value] for value in (*a, *b)]
    # ways[n, s]: in how many ways n of the ranks so far can be chosen so that they sum to s
    ways = np.zeros((len(a) + 1, sum(ranks) + 1))
    ways[0, 0] = 1
    for added in ranks:
        ways[1:, added:] += ways[:-1, : ways.shape[1] - added].copy()
    probability = ways[len(a)] / ways[len(a)].sum()  # of each sum of a's ranks
    expected = sum(ranks) * len(a) / len(ranks)
    distance = abs(sum(ranks[: len(a)]) - expected)
    as_far = np.abs(np.arange(probability.size) - expected) >= distance - 1e-9
    return float(min(1.0, probability[as_far].sum()))
