"""Rewinds of every length around every boundary of a cache, for any backend: what follows must be as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime

AFTER = 6  # tokens compared after a rewind: two chunks


def uninterrupted(runtime: Runtime, ids: list[int]) -> Logits:
    """(T, V): logits after every token, one by one from a reset state."""
    runtime.reset()
    return np.stack([runtime.prefill([token]) for token in ids])


def worst_error(runtime: Runtime, ids: list[int], ends: Iterable[int], counts: Iterable[int]) -> tuple[float, int, int]:
    """At each position, feed other tokens, take them back, and go on.

    Args:
        runtime: any.
        ids: the text.
        ends: positions to be at; all below len(ids) - AFTER.
        counts: how many tokens are fed and taken back there, and as many of the text before them too.

    Returns:
        The largest difference of a logit from the uninterrupted text's; how many rewinds were free, and how many fed again.
    """
    expected, worst, free, again = uninterrupted(runtime, ids), 0.0, 0, 0
    for end in ends:
        runtime.reset()
        if end:
            runtime.prefill(ids[:end])
        state = runtime.snapshot()
        for count in counts:
            runtime.restore(state)
            before = runtime.stats.refed_tokens
            runtime.prefill([ids[-1 - at % 7] for at in range(count)])  # others than the text's
            back = min(end, count // 2)
            runtime.rewind(count + back)
            at = end - back
            first = runtime.prefill(ids[at : at + AFTER - 1])
            second = runtime.decode(ids[at + AFTER - 1])
            fed = runtime.stats.refed_tokens > before
            free, again = free + (not fed), again + fed
            found = np.stack([first, second])
            worst = max(worst, float(np.abs(found - expected[at + AFTER - 2 : at + AFTER]).max()))
    return worst, free, again
