"""Generation over any runtime: token ids in, token ids out one by one. Text is text_generator.py's, turns are session.py's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.constrain import Constraint, Grammar
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.speculate import MODES, Speculation
from gemma_edge.runtimes.tools.tool import AUTO, Tool, check_tools

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"
CHUNKS_BETWEEN_CHECKS = (
    4  # prompt chunks fed between two calls of `cancelled`: a backend may be faster with long inputs
)


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated. Plain data: it belongs to no bundle and can be used any number of times."""

    max_tokens: int = 512  # the longest answer
    sampling: SamplingParams = SamplingParams()  # how a token is chosen; the default takes the most likely one
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    strict: bool = False  # True refuses a text longer than the context; False forgets its oldest tokens
    json_schema: Mapping[str, Any] | None = None  # a JSON schema that the answer fits
    speculate: str | None = None  # prompt lookup: "exact" or "close", see `Speculation`; None decodes token by token
    tools: tuple[Tool, ...] = ()  # functions that the model may call
    tool_choice: str = AUTO  # "auto", "none", "required", or the name of the tool that must be called
    parallel_calls: bool = True  # whether an answer may hold several calls

    def __post_init__(self) -> None:
        """Raises InputError for a value that cannot be used."""
        if self.max_tokens < 1:
            raise InputError(f"`max_tokens` {self.max_tokens} is below 1", field="max_tokens", value=self.max_tokens)
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(
                f"`stop` {self.stop!r} is not a tuple of texts that each have a character",
                field="stop",
                value=self.stop,
            )
        if self.speculate is not None and self.speculate not in MODES:
            raise InputError(field="speculate", value=self.speculate, allowed=MODES)
        check_tools(self.tools, self.tool_choice)


DEFAULT_OPTIONS = GenerationOptions()


@dataclass
class Usage:
    """The cost of one answer; complete when its last token has come."""

    prompt_tokens: int = 0  # the whole prompt
    cached_tokens: int = 0  # the part of the prompt that the cache already held
    new_tokens: int = 0  # the answer, without the stop token
    finish: str = ""  # why the answer ended: STOP, LENGTH or CANCELLED; empty before


def never() -> bool:
    """An answer that nobody cancels."""
    return False


@dataclass(frozen=True)
class GenerationState:
    """The objects of one answer that change while it is generated."""

    sampler: Sampler
    usage: Usage = field(default_factory=Usage)  # filled in
    cancelled: Callable[[], bool] = never  # called before every few prompt chunks and each token; True ends the answer
    grammar: Grammar | None = None  # a grammar over this bundle's vocabulary, with the same stop tokens
    speculation: Speculation | None = None  # the prompt lookup of this runtime
    watch: Callable[[int, Logits], None] | None = None  # called with each token and the model's logits (V,) for it
    ids: list[int] = field(default_factory=list)  # the answer's tokens so far, without the stop token


def generate(
    runtime: Runtime,
    ids: Sequence[int],
    options: GenerationOptions = DEFAULT_OPTIONS,
    *,
    stop_ids: Collection[int] = (),
    state: GenerationState | None = None,
) -> Iterator[int]:
    """Append `ids` to what the runtime has seen and yield the tokens that follow.

    The last token yielded was sampled but not fed, and so was the stop token, which is not yielded: `runtime.position`
    counts the tokens that were fed. Past the bundle's context the oldest tokens fall out of the cache; nothing else changes.

    Args:
        runtime: where to continue; call `reset()` first for a new text.
        ids: at least one token.
        options: `stop`, `json_schema` and `speculate` need a tokenizer or an object per runtime, so `TextGenerator` and
            `Session` handle them and this function refuses them.
        stop_ids: tokens that end the answer.
        state: the answer's own sampler, which replaces one made from `options.sampling`, and its grammar, prompt lookup,
            usage and cancelling.

    Raises:
        InputError: at once, before a token is fed: no ids, more tokens than fit with `options.strict`, too few for the
            grammar, or an option that this function does not handle.
    """
    for name in ("stop", "json_schema", "speculate", "tools"):
        if getattr(options, name) != getattr(DEFAULT_OPTIONS, name):
            raise InputError(f"generate does not handle `{name}`; use Session or TextGenerator", field=name)
    if not ids:
        raise InputError("no token to feed: give at least one token id", field="ids")
    if options.strict:
        check_fits(runtime.cache.context, len(ids), options.max_tokens, fed=runtime.position)
    state = state or GenerationState(Sampler(options.sampling))
    constraint = state.grammar.begin(options.max_tokens) if state.grammar else None
    return _tokens(runtime, ids, options.max_tokens, frozenset(stop_ids), state, constraint)


def check_fits(context: int, prompt_tokens: int, max_tokens: int, *, fed: int = 0) -> None:
    """Raise InputError if an answer of `max_tokens` would push tokens out of the context; `fed` tokens are in it already."""
    if fed + prompt_tokens + max_tokens <= context:
        return
    before = f"{fed} tokens of conversation, " if fed else ""
    raise InputError(
        f"{before}a prompt of {prompt_tokens} tokens and {max_tokens} new ones exceed the bundle's context of {context}",
        field="strict",
        value=True,
        hint="shorten the prompt, lower `max_tokens`, or drop `strict` to let the oldest tokens fall out",
    )


def _tokens(
    runtime: Runtime,
    ids: Sequence[int],
    max_tokens: int,
    stop_ids: frozenset[int],
    state: GenerationState,
    constraint: Constraint | None,
) -> Iterator[int]:
    usage, sampler, speculation = state.usage, state.sampler, state.speculation
    usage.cached_tokens = runtime.position
    usage.prompt_tokens = runtime.position + len(ids)
    usage.finish = CANCELLED
    sampler.observe(ids)
    size = CHUNKS_BETWEEN_CHECKS * runtime.cache.prefill_chunk
    for start in range(0, len(ids), size):
        if state.cancelled():
            return
        logits = runtime.prefill(ids[start : start + size])
    if speculation:
        speculation.begin(runtime.ids)
    decode = speculation.decode if speculation else runtime.decode
    try:
        while not state.cancelled():
            if constraint:
                token = constraint.take(sampler.sample(constraint.mask(logits)))
            else:
                token = sampler.sample(logits)
            finish = LENGTH if constraint and constraint.shortened else STOP
            if token in stop_ids:
                usage.finish = finish
                return
            sampler.observe([token])
            state.ids.append(token)
            if state.watch:
                state.watch(token, logits)
            usage.new_tokens += 1
            # `finish` is set before the token is yielded, because the consumer may stop at this token
            usage.finish = LENGTH if usage.new_tokens == max_tokens else CANCELLED
            if constraint and constraint.complete:
                usage.finish = finish
            yield token
            # the logits after the last token are not needed
            if usage.finish != CANCELLED:
                return
            logits = decode(token)
    finally:
        if speculation:
            speculation.take_back()
