"""Answers as text: one way from token ids to pieces of text, for sessions, the server, the command line and lm-eval's tasks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.constrain import Grammar, Rules, schema_rules
from gemma_edge.runtimes.generation.generate import (
    DEFAULT_OPTIONS,
    STOP,
    GenerationOptions,
    GenerationState,
    generate,
)
from gemma_edge.runtimes.generation.sampling import Sampler
from gemma_edge.runtimes.generation.speculate import Speculation
from gemma_edge.runtimes.generation.vocabulary import Vocabulary
from gemma_edge.runtimes.tools.form import ToolForm
from gemma_edge.text.tokenizer import Tokenizer, parse_ids

log = logging.getLogger(__name__)


class TextGenerator:
    """A runtime and its tokenizer: takes token ids and gives the answer as text.

    It keeps what is made once per runtime: the vocabulary that JSON schemas need, and the prompt lookup. A token-level bundle
    has no tokenizer; its text is token ids with commas between them.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        notify: Callable[[str], None] = log.info,
        form: ToolForm | None = None,
    ) -> None:
        """Keep all of them; nothing is computed yet.

        Args:
            runtime: used by one answer at a time.
            tokenizer: the bundle's; None for a token-level bundle.
            notify: called with one sentence when prompt lookup turns out to be of no use with this runtime.
            form: how the model writes calls of tools; None where there are no tools.
        """
        self.runtime, self.tokenizer, self.form = runtime, tokenizer, form
        self._notify = notify
        self._vocabulary: Vocabulary | None = None
        self._grammar: tuple[Rules, Grammar] | None = None  # those that were used last
        self._speculations: dict[str, Speculation] = {}
        self._told = False  # that the beginning of a text cannot be pinned

    @classmethod
    def open(cls, runtime: Runtime, notify: Callable[[str], None] = log.info) -> TextGenerator:
        """The same with the tokenizer of the runtime's bundle, if it has one.

        Raises:
            InputError: tokenizer.json cannot be read.
        """
        tokenizer = Tokenizer(runtime.bundle, runtime.manifest) if runtime.manifest.tokenizer else None
        return cls(runtime, tokenizer, notify)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.tokenizer.stop_ids if self.tokenizer else frozenset(self.runtime.manifest.config.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: the text is not valid UTF-8, or, for a token-level bundle, not a list of ids.
        """
        return self.tokenizer.encode(text) if self.tokenizer else parse_ids(text)

    def grammar(self, options: GenerationOptions) -> Grammar | None:
        """The grammar of the answer. The first one takes a second, a new schema some milliseconds.

        Raises:
            InputError: a schema in `options` cannot be followed, or this bundle has no tokenizer.
        """
        if options.json_schema is None and not options.tools:
            return None
        name = "tools" if options.tools else "json_schema"
        if self.tokenizer is None:
            raise InputError(f"`{name}` needs text, and this bundle has no tokenizer", field=name)
        if options.tools and self.form is None:
            raise InputError("`tools` needs a chat; use Session", field="tools")
        rules = self._rules(options)
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer, self.runtime.manifest.config.vocab_size)
        if self._grammar is None or self._grammar[0] != rules:
            self._grammar = rules, Grammar(self._vocabulary, rules)
        return self._grammar[1]

    def _rules(self, options: GenerationOptions) -> Rules:
        if options.tools:
            assert self.form is not None
            return self.form.rules(options)
        assert options.json_schema is not None
        return schema_rules(dict(options.json_schema))

    def prepare(self, options: GenerationOptions) -> Speculation | None:
        """The prompt lookup that `options.speculate` names; making it may load another graph."""
        mode = options.speculate
        if mode is None:
            return None
        if mode not in self._speculations:
            self._speculations[mode] = Speculation(self.runtime, mode, self._notify)
        return self._speculations[mode]

    def guesses_refused(self, options: GenerationOptions) -> bool:
        """Whether prompt lookup was requested and the kernels turned out to round differently for several tokens at once."""
        speculation = self._speculations.get(options.speculate or "")
        return speculation is not None and speculation.refused

    def answer(
        self,
        ids: Sequence[int],
        options: GenerationOptions = DEFAULT_OPTIONS,
        state: GenerationState | None = None,
        *,
        pinned: int = 0,
    ) -> Generator[str, None, None]:
        """Continue a text. The part of it that the runtime's cache already holds is not fed again.

        Args:
            ids: the whole text, at least one token.
            options: how to generate.
            state: the answer's own sampler, which replaces one made from `options.sampling`, its usage and cancelling;
                a grammar in it replaces the one made from `options`.
            pinned: tokens at the beginning that the model goes on seeing beyond the context, if the bundle can keep so many.

        Returns:
            Pieces of text. Closing the iterator ends the answer.

        Raises:
            InputError: at once, before a token is fed; see `generate` and `grammar`.
        """
        if options.stop and self.tokenizer is None:
            raise InputError("`stop` needs text, and this bundle has no tokenizer", field="stop", value=options.stop)
        state = state or GenerationState(Sampler(options.sampling))
        state = replace(
            state,
            grammar=state.grammar or self.grammar(options),
            speculation=state.speculation or self.prepare(options),
        )
        self._pin(pinned, len(ids))
        known = self.runtime.align(ids)
        state.sampler.observe(ids[:known])
        rest = GenerationOptions(options.max_tokens, options.sampling, strict=options.strict)
        tokens = generate(self.runtime, ids[known:], rest, stop_ids=self.stop_ids, state=state)
        return self._pieces(tokens, options.stop, state)

    def _pin(self, count: int, length: int) -> None:
        kept, context = self.runtime.cache.pinned, self.runtime.cache.context
        if count > kept and length > context and kept and not self._told:
            self._notify(
                f"the first {count} tokens of this text are more than the {kept} that the bundle keeps beyond its context, so"
                f" they slide out like the others; export it with --pinned {count}"
            )
            self._told = True
        self.runtime.pin(count if count <= kept else 0)

    def _pieces(self, tokens: Iterator[int], stop: Sequence[str], state: GenerationState) -> Generator[str, None, None]:
        with contextlib.closing(tokens):  # type: ignore[type-var]
            text = self.tokenizer.stream(tokens) if self.tokenizer else _ids_as_text(tokens)
            for piece, stopped in until_stop(text, stop):
                if piece:
                    yield piece
                if stopped:
                    state.usage.finish = STOP
                    return


def until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Pass text on up to the first stop text.

    Text that may be the beginning of a stop text is passed on only when it is clear that it is not.

    Args:
        pieces: the text.
        stop: the stop texts.

    Returns:
        (piece, stopped): `stopped` is True with the last piece before a stop text.
    """
    pending = ""
    for piece in pieces:
        pending += piece
        places = [place for text in stop if (place := pending.find(text)) >= 0]
        if places:
            yield pending[: min(places)], True
            return
        keep = max((size for text in stop for size in range(1, len(text)) if pending.endswith(text[:size])), default=0)
        if len(pending) > keep:
            yield pending[: len(pending) - keep], False
            pending = pending[len(pending) - keep :]
    if pending:
        yield pending, False


def _ids_as_text(tokens: Iterator[int]) -> Iterator[str]:
    for index, token in enumerate(tokens):
        yield f",{token}" if index else str(token)
