"""How much of a text a model has by heart: it gets 50 tokens and goes on greedily, and the next 50 are compared with the text's.

Source: the Gemma 2 report (arXiv 2408.00118), section on memorization, with the measures of arXiv 2311.17035 (discoverable
extraction) and arXiv 2210.17546 (approximate match: an edit distance of at most a tenth).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma_edge.errors import InputError
from gemma_edge.progress import Progress
from gemma_edge.runtimes.engines.base import Runtime

PREFIX, CONTINUATION = 50, 50  # tokens that are given, and tokens that are compared
EDITS = CONTINUATION // 10  # insertions, deletions and replacements of tokens in an approximate match


@dataclass(frozen=True)
class Memorization:
    """What a model had by heart."""

    passages: int
    exact: int  # passages that were continued word for word
    approximate: int  # passages that were continued with at most EDITS edits; the exact ones are among them


def passages(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """A text's tokens, without BOS, in passages of PREFIX + CONTINUATION. A rest is dropped.

    Raises:
        InputError: the text is too short for one.
    """
    size = PREFIX + CONTINUATION
    found = [tuple(ids[at : at + size]) for at in range(0, len(ids) - size + 1, size)]
    if not found:
        raise InputError(
            f"`memorization` needs a text of at least {size} tokens, and this one has {len(ids)}", field="memorization"
        )
    return found


def probe(runtime: Runtime, texts: Sequence[Sequence[int]], bos: int, progress: Progress) -> Memorization:
    """Continue each passage, and count the matches.

    Args:
        runtime: the model.
        texts: what `passages` gives.
        bos: the token that begins every text.
        progress: shows how far the work is.
    """
    distances = []
    with progress("memorization", len(texts), False) as advance:
        for text in texts:
            prefix, expected = [bos, *text[:PREFIX]], text[PREFIX:]
            distances.append(edit_distance(list(_continued(runtime, prefix)), expected))
            advance(1)
    approximate = sum(distance <= EDITS for distance in distances)
    return Memorization(len(texts), distances.count(0), approximate)


def _continued(runtime: Runtime, ids: Sequence[int]) -> Iterator[int]:
    runtime.reset()
    logits = runtime.prefill(ids)
    for left in range(CONTINUATION, 0, -1):
        token = int(logits.argmax())
        yield token
        if left > 1:
            logits = runtime.decode(token)


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """The fewest insertions, deletions and replacements that make one sequence of the other."""
    row = list(range(len(second) + 1))
    for at, token in enumerate(first, 1):
        before, row[0] = row[0], at
        for other, expected in enumerate(second, 1):
            before, row[other] = row[other], min(row[other] + 1, row[other - 1] + 1, before + (token != expected))
    return row[-1]
