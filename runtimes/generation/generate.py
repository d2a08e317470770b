"""Streaming generation over any runtime: prompt in, tokens out one by one. Text is tokenizer.py's, turns are session.py's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.constrain import Constraint, Grammar
from gemma_edge.runtimes.generation.sampling import Sampler
from gemma_edge.runtimes.generation.speculate import Speculation

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"
PIECE = 4  # chunks of a prompt between two looks at `cancelled`: a backend may take long texts better whole


@dataclass
class Usage:
    """What one answer took; complete when its last token has come."""

    prompt_tokens: int = 0  # of the whole prompt
    cached_tokens: int = 0  # of these, what the cache held already
    new_tokens: int = 0  # the stop token not counted
    finish: str = ""  # why it ended: STOP, LENGTH or CANCELLED; empty before


def never() -> bool:
    """No cancelling."""
    return False


def generate(
    runtime: Runtime,
    ids: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    stop_ids: Collection[int],
    strict: bool = False,
    usage: Usage | None = None,
    cancelled: Callable[[], bool] = never,
    speculation: Speculation | None = None,
    grammar: Grammar | None = None,
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
        usage: is filled in.
        cancelled: asked before each PIECE chunks of the prompt and each token; True ends the text there.
        speculation: of this runtime; feeds several tokens at a time where it can.
        grammar: of this bundle's vocabulary, with the same stop tokens; what is generated fits it, and ends with it.

    Raises:
        InputError: at once, before a token is fed: `max_tokens` below 1 or too few for `grammar`, no ids, or more than fits
            with `strict`.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens {max_tokens} is below 1")
    if not ids:
        raise InputError("no token to feed: give at least one token id")
    context = runtime.cache.context
    if strict and runtime.position + len(ids) + max_tokens > context:
        before = f"{runtime.position} tokens of conversation, " if runtime.position else ""
        raise InputError(
            f"{before}a prompt of {len(ids)} tokens and {max_tokens} new ones exceed the bundle's context of {context};"
            " shorten the prompt, lower --max-tokens, or drop --strict to let the oldest tokens fall out"
        )
    constraint = grammar.begin(max_tokens) if grammar else None
    asked = (max_tokens, frozenset(stop_ids), usage or Usage(), cancelled)
    return _tokens(runtime, ids, sampler, *asked, speculation, constraint)


def _tokens(
    runtime: Runtime,
    ids: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    stop_ids: frozenset[int],
    usage: Usage,
    cancelled: Callable[[], bool],
    speculation: Speculation | None,
    constraint: Constraint | None,
) -> Iterator[int]:
    usage.cached_tokens = runtime.position
    usage.prompt_tokens = runtime.position + len(ids)
    usage.finish = CANCELLED
    sampler.observe(ids)
    size = PIECE * runtime.cache.prefill_chunk
    for start in range(0, len(ids), size):
        if cancelled():
            return
        logits = runtime.prefill(ids[start : start + size])
    if speculation:
        speculation.begin(runtime.ids)
    decode = speculation.decode if speculation else runtime.decode
    try:
        while not cancelled():
            if constraint:
                token = constraint.take(sampler.sample(constraint.mask(logits)))
            else:
                token = sampler.sample(logits)
            ended = LENGTH if constraint and constraint.shortened else STOP
            if token in stop_ids:
                usage.finish = ended
                return
            sampler.observe([token])
            usage.new_tokens += 1
            # told before the token is: a consumer may stop there
            usage.finish = LENGTH if usage.new_tokens == max_tokens else CANCELLED
            if constraint and constraint.complete:
                usage.finish = ended
            yield token
            # what follows the last one would be computed for nothing
            if usage.finish != CANCELLED:
                return
            logits = decode(token)
    finally:
        if speculation:
            speculation.take_back()


def note_tokens(tokens: Iterator[int], ids: list[int]) -> Iterator[int]:
    """Pass tokens on and append each to `ids`, for a consumer that shows only text."""
    for token in tokens:
        ids.append(token)
        yield token
