"""Answers on the terminal: text as it comes, or one JSON object, and their numbers. Only answers go to stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass

import click

from gemma_edge.command import note
from gemma_edge.errors import without_controls
from gemma_edge.memory import peak_rss_mib
from gemma_edge.runtimes.engines.base import Runtime, Stats
from gemma_edge.runtimes.generation.generate import GenerationOptions, GenerationState
from gemma_edge.runtimes.generation.sampling import Sampler
from gemma_edge.runtimes.generation.text_generator import TextGenerator
from gemma_edge.runtimes.guard import Guard, guarded


@dataclass(frozen=True)
class Output:
    """What is printed beside the answer."""

    stats: bool = False  # its numbers, on stderr
    as_json: bool = False  # text, ids and numbers as one JSON object in place of the text


@dataclass(frozen=True)
class AnswerStats:
    """One answer in numbers."""

    load_s: float
    prompt_tokens: int
    prefill_tokens_per_s: float
    ttft_ms: float  # from the request to the first piece of text
    new_tokens: int
    decode_tokens_per_s: float  # 0 when at most one token was generated
    peak_rss_mib: float
    drafted_tokens: int  # guesses of --speculate
    accepted_tokens: int  # guesses that were right
    guessing_off: bool  # --speculate was given, but it would change last bits here

    def __str__(self) -> str:
        parts = [
            f"load {self.load_s:.2f} s",
            f"prompt {self.prompt_tokens} tokens at {self.prefill_tokens_per_s:.1f} tokens/s",
            f"first token after {self.ttft_ms:.0f} ms",
            f"{self.new_tokens} new tokens at {self.decode_tokens_per_s:.1f} tokens/s",
            f"peak RSS {self.peak_rss_mib:.0f} MiB",
        ]
        if self.drafted_tokens:
            parts.append(f"{self.accepted_tokens} of {self.drafted_tokens} guesses right")
        if self.guessing_off:
            parts.append("no guesses: they would change last bits here, --speculate=close makes them")
        return "; ".join(parts)


def note_overflow(context: int) -> None:
    """Print that a text is longer than the context."""
    note(f"longer than the context of {context} tokens: the oldest have fallen out")


def complete(
    runtime: Runtime, prompt: str, options: GenerationOptions, output: Output, guard: Guard | None = None
) -> None:
    """Continue a text and print the answer.

    Args:
        runtime: where to continue; the part of the prompt that its cache holds is not fed again.
        prompt: the whole text, or token ids for a token-level bundle.
        options: how to generate.
        output: what to print beside the answer.
        guard: judges prompt and answer; the answer is then printed when it is complete.

    Raises:
        InputError: a prompt or an option that cannot be used, or a text that the guard refuses.
    """
    generator = TextGenerator.open(runtime, note)
    if generator.tokenizer is None:
        note("this bundle has no tokenizer: prompt and answer are token ids")
    ids = generator.encode(prompt)
    state = GenerationState(Sampler(options.sampling))
    pieces = generator.answer(ids, options, state)
    if len(ids) > runtime.cache.context:
        note_overflow(runtime.cache.context)
    show(runtime, guarded(guard, prompt, pieces), lambda: state.ids, lambda: generator.guesses_refused(options), output)


def show(
    runtime: Runtime,
    pieces: Iterator[str],
    ids: Callable[[], Sequence[int]],
    guesses_refused: Callable[[], bool],
    output: Output,
) -> None:
    """Print an answer as it comes, or as JSON; then its numbers.

    Args:
        runtime: what computes the answer.
        pieces: the answer's text.
        ids: called after the last piece for the answer's tokens.
        guesses_refused: called after the last piece; whether prompt lookup was given up.
        output: what to print beside the answer.
    """
    before, start, ttft_s, text = copy(runtime.stats), time.perf_counter(), 0.0, ""
    on_terminal = sys.stdout.isatty()  # which an answer must not control
    for piece in pieces:
        ttft_s = ttft_s or time.perf_counter() - start
        text += piece
        if not output.as_json:
            # color: else click would take escapes out of what goes to a file
            click.echo(without_controls(piece) if on_terminal else piece, nl=False, color=True)
    ttft_s = ttft_s or time.perf_counter() - start
    stats = _answer_stats(before, runtime.stats, ttft_s, len(ids()), guesses_refused())
    if output.as_json:
        click.echo(json.dumps({"text": text, "ids": list(ids()), "stats": asdict(stats)}, ensure_ascii=False))
    elif not text.endswith("\n"):
        click.echo()
    if output.stats:
        click.echo(str(stats), err=True)


def _answer_stats(before: Stats, after: Stats, ttft_s: float, new_tokens: int, guessing_off: bool) -> AnswerStats:
    spent = Stats(**{name: value - getattr(before, name) for name, value in asdict(after).items()})
    return AnswerStats(
        load_s=after.load_s,
        prompt_tokens=spent.prefill_tokens,
        prefill_tokens_per_s=spent.prefill_tokens_per_s,
        ttft_ms=1000 * ttft_s,
        new_tokens=new_tokens,
        decode_tokens_per_s=spent.decode_tokens_per_s,
        peak_rss_mib=peak_rss_mib(),
        drafted_tokens=spent.drafted_tokens,
        accepted_tokens=spent.accepted_tokens,
        guessing_off=guessing_off,
    )
