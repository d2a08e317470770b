"""How a JSON text that has begun can be ended soon: the tokens that constrain.py keeps at hand while an answer grows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gemma_edge.runtimes.generation.vocabulary import BACKSLASH, QUOTE, Vocabulary, allowed_tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CLOSING_TOKENS = 4096  # the longest ending that is searched for
RANDOM_TRIES = 8  # random searches after the direct one has failed
MAX_RANDOM_TOKENS = 256  # the longest ending of a random search


@dataclass
class Quotes:
    """Whether a JSON text is inside a string."""

    inside: bool = False
    escaped: bool = False
    tracked: bool = True  # False: the text is not JSON, and a quote in it means nothing

    def feed(self, text: bytes) -> None:
        """Append to the text."""
        for byte in text if self.tracked else b"":
            if self.escaped:
                self.escaped = False
            elif byte == BACKSLASH:
                self.escaped = self.inside
            elif byte == QUOTE:
                self.inside = not self.inside


class Closer:
    """Searches for a short ending.

    It takes tokens that are forced, else tokens that end a value, else tokens after which a value can be ended, else long tokens.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        patterns: Iterable[str],
        matcher_of: Callable[[str], LLMatcher],
        ends: Sequence[int] = (),
    ) -> None:
        """Find a text for each pattern of the schema's strings.

        Args:
            vocabulary: the bundle's.
            patterns: regular expressions.
            matcher_of: makes a matcher of the JSON strings that fit a pattern.
            ends: tokens that end a value, besides those of JSON; they are tried first.
        """
        self._vocabulary, self._ends = vocabulary, [*ends, *vocabulary.ends]
        # A pattern may match anywhere in a string, so tokens that match it are kept for insertion.
        self._samples: list[list[int]] = []
        self._samples = [sample for pattern in patterns if (sample := self._sample(matcher_of(pattern)))]

    def find(self, matcher: LLMatcher, quotes: Quotes, max_tokens: int) -> list[int] | None:
        """Tokens after which the text may end.

        Args:
            matcher, quotes: the text so far; both are left as they are.
            max_tokens: the longest ending.

        Returns:
            The tokens, or None if no ending was found.
        """
        ending = self._walk(matcher.deep_copy(), replace(quotes), max_tokens, None)
        for seed in range(RANDOM_TRIES):
            limit = min(max_tokens, MAX_RANDOM_TOKENS)
            ending = ending or self._walk(matcher.deep_copy(), replace(quotes), limit, random.Random(seed))
        return ending

    def _sample(self, matcher: LLMatcher) -> list[int] | None:
        ending = None if matcher.is_error() else self.find(matcher, Quotes(), MAX_CLOSING_TOKENS)
        return self._vocabulary.ids(self._vocabulary.text(ending)[1:-1]) if ending else None

    def _walk(self, matcher: LLMatcher, quotes: Quotes, max_tokens: int, rng: random.Random | None) -> list[int] | None:
        ending: list[int] = []
        while not matcher.is_accepting():
            tokens = matcher.compute_ff_tokens() or self._next(matcher, quotes, rng)
            ending += tokens
            if len(ending) > max_tokens or not matcher.consume_tokens(tokens):
                return None
            quotes.feed(self._vocabulary.text(tokens))
        return ending

    def _next(self, matcher: LLMatcher, quotes: Quotes, rng: random.Random | None) -> list[int]:
        words = self._vocabulary
        allowed = allowed_tokens(matcher.compute_bitmask(), words.vocab_size)  # (V,)
        ends = [words.quote] if quotes.inside else self._ends
        for token in () if quotes.escaped else ends:
            if allowed[token]:
                return [token]
        for sample in self._samples if quotes.inside else ():
            if matcher.validate_tokens([*sample, words.quote]) == len(sample) + 1:
                return sample
        near = [token for token in (words.singles if quotes.inside else words.starts) if allowed[token]]
        if rng:
            rng.shuffle(near)
        for token in near:
            if any(matcher.validate_tokens([token, end]) == 2 for end in ends):
                return [token]
        if near and (rng or not quotes.inside):
            return near[:1]
        return [int(np.where(allowed, words.lengths, -1).argmax())]
