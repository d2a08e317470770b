"""Streaming generation over any runtime: prompt in, tokens out one by one. Text is tokenizer.py's, turns are session.py's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from gemma_edge.errors import InputError
from gemma_edge.runtimes.base import Runtime
from gemma_edge.runtimes.sampling import Sampler


def generate(
    runtime: Runtime,
    ids: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    stop_ids: Collection[int],
    strict: bool = False,
) -> Iterator[int]:
    """Append `ids` to what the runtime has seen and yield the tokens that follow.

    The last token yielded, and the stop token, which is not yielded, were sampled but are not fed: `runtime.position`
    tells what was. Past the bundle's context the oldest tokens fall out of the cache; nothing else changes.

    Args:
        runtime: where to continue from; call `reset()` first for a new text.
        ids: at least one token.
        sampler: chooses; it is told every token fed.
        max_tokens: most tokens to yield.
        stop_ids: tokens that end the text.
        strict: refuse what would not fit in the context, instead of forgetting the oldest tokens.

    Raises:
        InputError: at once, before a token is fed: `max_tokens` below 1, no ids, or more than fits with `strict`.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens {max_tokens} is below 1")
    if not ids:
        raise InputError("no token to feed: give at least one token id")
    context = runtime.manifest.cache.context
    if strict and runtime.position + len(ids) + max_tokens > context:
        before = f"{runtime.position} tokens of conversation, " if runtime.position else ""
        raise InputError(
            f"{before}a prompt of {len(ids)} tokens and {max_tokens} new ones exceed the bundle's context of {context};"
            " shorten the prompt, lower --max-tokens, or drop --strict to let the oldest tokens fall out"
        )
    return _tokens(runtime, ids, sampler, max_tokens, frozenset(stop_ids))


def _tokens(
    runtime: Runtime, ids: Sequence[int], sampler: Sampler, max_tokens: int, stop_ids: frozenset[int]
) -> Iterator[int]:
    sampler.observe(ids)
    logits = runtime.prefill(ids)
    for left in range(max_tokens, 0, -1):
        token = sampler.sample(logits)
        if token in stop_ids:
            return
        sampler.observe([token])
        yield token
        # the last one would be computed for nothing
        if left > 1:
            logits = runtime.decode(token)


def note_tokens(tokens: Iterator[int], ids: list[int]) -> Iterator[int]:
    """Pass tokens on and append each to `ids`, for a consumer that shows only text."""
    for token in tokens:
        ids.append(token)
        yield token
