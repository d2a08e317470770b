"""`gemma-bench --compare`: what changed between two files of results, beyond noise.

A metric has changed when its medians differ by more than FLOOR and a two-sided Mann-Whitney test gives p < ALPHA: exact, ties
included, no distribution assumed. A sample is a process: its median. Repetitions in one process share its luck (where memory lay,
which core it got, what else ran then) and are not independent: two runs of the same bundle on a busy machine differed
"significantly" by them. Nothing is corrected for the number of comparisons; it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

import numpy as np

from gemma_edge.bench.result import Result
from gemma_edge.bench.stats import METRICS, Group, Key, Metric, key
from gemma_edge.errors import InputError

FLOOR = 0.03  # less than this is not worth a word, however certain
ALPHA = 0.01  # five against five samples reach it when all of one side lie beyond all of the other: p = 0.008
FEWEST = 5  # processes
DERIVED = ("read_gb_per_s", "bandwidth_percent")  # say the same as decode
STATISTICS = (
    f"Changed: medians differ by more than {FLOOR:.0%} and p < {ALPHA} in a two-sided exact Mann-Whitney test, each process one"
    f" sample; {FEWEST} are the fewest: --rounds {FEWEST}."
)


@dataclass(frozen=True)
class Change:
    """One metric of one group in both files."""

    group: str  # what tells the group from the others
    metric: str
    before: float  # medians
    after: float
    samples: tuple[int, int]
    p: float | None  # None: too few samples to tell
    verdict: str  # better, worse, same, unknown

    @property
    def change(self) -> float:
        """0.1 is a tenth more."""
        return self.after / self.before - 1 if self.before else 0.0


def compare(before: Sequence[Result], after: Sequence[Result]) -> list[Change]:
    """Every metric of every group that both have.

    What is the same within each file tells no groups apart: so a file of one model can be compared with one of another model,
    and one machine with another.

    Raises:
        InputError: they have no group in common.
    """
    both = [[result for result in results if not result.failure] for results in (before, after)]
    told = [
        field.name
        for field in fields(Key)
        if any(len({getattr(key(result), field.name) for result in results}) > 1 for results in both)
    ]
    old, new = (_named(results, told) for results in both)
    shared = [name for name in old if name in new]
    if not shared:
        raise InputError(
            f"the two files have nothing in common: {_list(old)} there, {_list(new)} here; measure the same -p, -n and -t"
        )
    return [
        change
        for name in shared
        for metric in METRICS
        if metric not in DERIVED and (change := _compare(name, metric, old[name], new[name])) is not None
    ]


def _named(results: Sequence[Result], told: Sequence[str]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        words = (f"{name} {getattr(key(result), name)}" for name in told)
        found.setdefault(", ".join(words) or "all", []).append(result)
    return found


def _list(groups: dict[str, list[Result]]) -> str:
    return "; ".join(groups) or "only failures"


def _compare(group: str, name: str, old: Group, new: Group) -> Change | None:
    metric = METRICS[name]
    before, after = _samples(metric, old), _samples(metric, new)
    if not before or not after:
        return None
    middles, counts = (median(before), median(after)), (len(before), len(after))
    if min(counts) < FEWEST:
        return Change(group, name, *middles, counts, None, "unknown")
    p = mann_whitney(before, after)
    differs = abs(middles[1] / middles[0] - 1) > FLOOR if middles[0] else middles[1] != 0
    if p >= ALPHA or not differs:
        return Change(group, name, *middles, counts, p, "same")
    return Change(
        group, name, *middles, counts, p, "better" if (middles[1] > middles[0]) == metric.more_is_better else "worse"
    )


def _samples(metric: Metric, group: Group) -> list[float]:
    """The processes' medians."""
    return [median(samples) for result in group if (samples := metric.samples([result]))]


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p that samples as far apart as these come from one distribution: by counting all ways to deal out the ranks.

    Args:
        a, b: at least one value each.
    """
    values, counts = np.unique([*a, *b], return_counts=True)
    ends = np.cumsum(counts)
    twice = 2 * ends - counts + 1  # twice the mean rank of each value: whole numbers, ties or not
    rank = dict(zip(values.tolist(), twice.tolist(), strict=True))
    ranks = [rank[value] for value in (*a, *b)]
    # chance[n, s]: that n ranks chosen so far sum to s
    chance = np.zeros((len(a) + 1, sum(ranks) + 1))
    chance[0, 0] = 1
    for one in ranks:
        chance[1:, one:] += chance[:-1, : chance.shape[1] - one].copy()
    dealt = chance[len(a)] / chance[len(a)].sum()
    expected = sum(ranks) * len(a) / len(ranks)
    distance = abs(sum(ranks[: len(a)]) - expected)
    far = np.abs(np.arange(dealt.size) - expected) >= distance - 1e-9
    return float(min(1.0, dealt[far].sum()))
