"""JSON by a schema: before a token is chosen, those that cannot go on to valid JSON are taken out. llguidance knows which.

What is here: llguidance over the bundle's tokenizer, and an end in time. While an answer grows, a way to end it (`_Closer`) is
kept at hand that fits into the tokens left; a token after which none is found is replaced by the next one of that way. So an
answer that runs to its end, or to its last token, is always valid; one that is cancelled is not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

ANY_OBJECT: dict[str, Any] = {"type": "object"}
# one blank, or a new line and its indent: endless blanks would be valid, and small models fall into them
OPTIONS: Any = {"whitespace_pattern": r"( |\n[ \t]{0,20})", "lenient": False, "coerce_one_of": False}
# outside strings, what leads to an end soonest: ends first, then short values, then what must be between
ENDS = b"}],"
STARTS = b'1023456789"ntf[{-.e:'
QUOTE, BACKSLASH = b'"\\'
TRIES = 8  # at random, where going straight to an end finds none
MOST_TO_END = 4096  # tokens of an end that is looked for


def _number(schema: dict[str, Any], key: str, default: float) -> float:
    value = schema.get(key)
    return float(value) if isinstance(value, (int, float)) else default


def _bound_lost(schema: dict[str, Any], own: str, *others: str) -> bool:
    return _number(schema, own, 1) == 0 and any(abs(_number(schema, other, 1)) < 1 for other in others)


# what llguidance 1.9 takes and does not hold to, as tests with the package jsonschema show
REFUSED: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = (
    (lambda each: _number(each, "minProperties", 0) > 1, "minProperties above 1, where keys may repeat; require some"),
    (lambda each: _number(each, "multipleOf", 1) % 1 != 0, "multipleOf a fraction; scale it to whole numbers"),
    (
        lambda each: (
            _bound_lost(each, "exclusiveMinimum", "maximum", "exclusiveMaximum")
            or _bound_lost(each, "exclusiveMaximum", "minimum", "exclusiveMinimum")
        ),
        "an exclusive bound of 0 with the other one nearer to it than 1; give a bound beside 0",
    ),
)


def read_schema(text: str) -> dict[str, Any]:
    """A JSON schema, written out or in a file.

    Args:
        text: what begins with a brace is the schema itself, else it is a path.

    Raises:
        InputError: no such file, no JSON object, or a schema that cannot be followed to the letter.
    """
    inline = text.lstrip().startswith("{")
    name = "the schema" if inline else text
    try:
        schema = json.loads(text if inline else Path(text).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the schema {text}: {error.strerror}; give a file, or the JSON itself") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no JSON: {error}") from None
    check_schema(schema)
    return dict(schema)


def check_schema(schema: Any) -> None:
    """Refuse what would not be followed to the letter.

    Raises:
        InputError: no object, keys that llguidance does not know how to follow, or llguidance is not installed.
    """
    if find_spec("llguidance") is None:
        raise InputError("answers by a JSON schema need llguidance: pip install 'gemma-edge[json]'")
    if not isinstance(schema, dict):
        raise InputError("the JSON schema is no JSON object")
    for each in _objects(schema):
        for found, why in REFUSED:
            if found(each):
                raise InputError(f"the JSON schema cannot be followed: {why}")
    from llguidance import LLMatcher

    failed, words = LLMatcher.validate_grammar_with_warnings(_grammar(schema))
    if failed:
        raise InputError(f"the JSON schema cannot be followed: {' '.join(words[0].split())}")


def _objects(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
    if isinstance(part, (dict, list)):
        for each in part.values() if isinstance(part, dict) else part:
            yield from _objects(each)


def _grammar(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=OPTIONS)


class Vocabulary:
    """The bundle's tokens, as llguidance sees them: made once, for any number of schemas. Takes a second for 256,000 tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Read the tokens.

        Args:
            tokenizer: the bundle's.
            vocab_size: logits at a position; those above the tokenizer's ids are never chosen.

        Raises:
            InputError: a tokenizer that llguidance cannot read.
        """
        from llguidance import LLTokenizer

        self.stop_ids = frozenset(tokenizer.stop_ids)
        try:
            self.library: LLTokenizer = LLTokenizer(
                tokenizer.to_json(), n_vocab=vocab_size, eos_token=sorted(self.stop_ids)
            )
        except ValueError as error:
            raise InputError(
                f"llguidance cannot read this bundle's tokenizer: {' '.join(str(error).split())}"
            ) from None
        self.vocab_size = vocab_size
        # printable ASCII without what escapes the next one, and bytes that end other characters
        singles = (byte for byte in (*range(0x20, 0x7F), *range(0x80, 0xC0)) if byte != BACKSLASH)
        self.singles = [self.ids(bytes([byte]))[0] for byte in singles]
        self.ends, self.starts = ([self.ids(bytes([byte]))[0] for byte in text] for text in (ENDS, STARTS))
        self.quote = self.ids(b'"')[0]

    def ids(self, text: bytes) -> list[int]:
        """Tokens of a text."""
        return self.library.tokenize_bytes(text)

    def text(self, ids: Sequence[int]) -> bytes:
        """Text of tokens, special ones left out."""
        return self.library.decode_bytes(list(ids))

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """(V,) bytes of each token; 0 where they are no plain text, to fill a string with."""
        texts = (self.text([token]) for token in range(self.vocab_size))
        return np.array([len(text) if BACKSLASH not in text else 0 for text in texts], np.int32)


class Grammar:
    """A schema over a vocabulary; `begin` an answer with it."""

    def __init__(self, vocabulary: Vocabulary, schema: dict[str, Any]) -> None:
        """Compile it.

        Raises:
            InputError: it cannot be followed.
        """
        check_schema(schema)
        from llguidance import LLMatcher

        self.vocabulary = vocabulary
        self._start = LLMatcher(vocabulary.library, _grammar(schema), log_level=0)
        if self._start.is_error():
            raise InputError(f"the JSON schema cannot be followed: {self._start.get_error().splitlines()[0]}")
        self._closer = _Closer(vocabulary, schema)

    def begin(self, max_tokens: int) -> Constraint:
        """For one answer of at most so many tokens.

        Raises:
            InputError: no answer as short as that was found.
        """
        plan = self._closer.find(self._start, _Quotes(), MOST_TO_END)
        if plan is None:
            raise InputError(f"no text of at most {MOST_TO_END} tokens was found that fits the JSON schema")
        if len(plan) > max_tokens:
            raise InputError(
                f"an answer of {max_tokens} tokens is too short for this JSON schema; allow at least {len(plan)}"
            )
        return Constraint(self.vocabulary, self._start.deep_copy(), self._closer, plan, max_tokens)


class Constraint:
    """One answer on its way."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: LLMatcher, closer: _Closer, plan: list[int], max_tokens: int
    ) -> None:
        self._vocabulary, self._matcher, self._closer = vocabulary, matcher, closer
        self._plan = plan  # tokens that end the text from here; never more than are left
        self._left = max_tokens
        self._quotes = _Quotes()
        self.shortened = False  # a token was replaced so that the text ends in time

    @property
    def complete(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, logits: Logits) -> Logits:
        """Logits (V,) with minus infinity for tokens that must not follow."""
        allowed = _unpacked(self._matcher.compute_bitmask(), len(logits))
        masked: Logits = np.where(allowed, logits, np.float32(-np.inf))
        if self._matcher.is_error():  # a limit of the library; the way out is known
            masked = np.full_like(logits, -np.inf)
            masked[self._way_out()] = 0
        return masked

    def take(self, token: int) -> int:
        """Append the token that was chosen, or the one that must be in its place so that the text ends in time; return it."""
        stops, left = self._vocabulary.stop_ids, self._left - 1
        if token in stops:
            return token
        plan = self._after(token, left)
        if plan is None:
            token, plan = self._way_out(), self._plan[1:]
            self.shortened = True
            if token in stops:
                return token
        self._matcher.consume_token(token)
        self._quotes.feed(self._vocabulary.text([token]))
        self._plan, self._left = plan, left
        return token

    def _way_out(self) -> int:
        return self._plan[0] if self._plan else min(self._vocabulary.stop_ids)

    def _after(self, token: int, left: int) -> list[int] | None:
        """Tokens that end the text behind `token`, at most `left`; None if none are found."""
        if self._matcher.is_error():
            return self._plan[1:] if [token] == self._plan[:1] else None
        matcher = self._matcher.deep_copy()
        if not matcher.consume_token(token):
            return None
        stop = min(self._vocabulary.stop_ids)
        for plan in (self._plan[1:], self._plan):  # most tokens go on with the plan, or change nothing about it
            if len(plan) <= left and matcher.validate_tokens([*plan, stop]) == len(plan) + 1:
                return plan
        quotes = replace(self._quotes)
        quotes.feed(self._vocabulary.text([token]))
        return self._closer.find(matcher, quotes, min(left, MOST_TO_END))


@dataclass
class _Quotes:
    """Whether a JSON text is inside a string."""

    inside: bool = False
    escaped: bool = False

    def feed(self, text: bytes) -> None:
        for byte in text:
            if self.escaped:
                self.escaped = False
            elif byte == BACKSLASH:
                self.escaped = self.inside
            elif byte == QUOTE:
                self.inside = not self.inside


class _Closer:
    """Looks for a short end: what is forced, then what ends something, then what lets it be ended next, then long tokens."""

    def __init__(self, vocabulary: Vocabulary, schema: dict[str, Any]) -> None:
        self._vocabulary = vocabulary
        # a pattern may stand anywhere in a string: what matches it, to be put there
        self._samples: list[list[int]] = []
        self._samples = [found for each in _objects(schema) if (found := self._sample(each.get("pattern")))]

    def find(self, matcher: LLMatcher, quotes: _Quotes, most: int) -> list[int] | None:
        """Tokens, at most `most`, after which the text may end; None if none were found. Both arguments stay as they are."""
        found = self._walk(matcher.deep_copy(), replace(quotes), most, None)
        for seed in range(TRIES):
            found = found or self._walk(matcher.deep_copy(), replace(quotes), min(most, 256), random.Random(seed))
        return found

    def _sample(self, pattern: Any) -> list[int] | None:
        from llguidance import LLMatcher

        if not isinstance(pattern, str):
            return None
        whole = {"type": "string", "pattern": f"^(?:{pattern.removeprefix('^').removesuffix('$')})$"}
        matcher = LLMatcher(self._vocabulary.library, _grammar(whole), log_level=0)
        plan = None if matcher.is_error() else self.find(matcher, _Quotes(), MOST_TO_END)
        return self._vocabulary.ids(self._vocabulary.text(plan)[1:-1]) if plan else None

    def _walk(self, matcher: LLMatcher, quotes: _Quotes, most: int, rng: random.Random | None) -> list[int] | None:
        plan: list[int] = []
        while not matcher.is_accepting():
            tokens = matcher.compute_ff_tokens() or self._next(matcher, quotes, rng)
            plan += tokens
            if len(plan) > most or not matcher.consume_tokens(tokens):
                return None
            quotes.feed(self._vocabulary.text(tokens))
        return plan

    def _next(self, matcher: LLMatcher, quotes: _Quotes, rng: random.Random | None) -> list[int]:
        words, mask = self._vocabulary, matcher.compute_bitmask()

        def allowed(token: int) -> bool:
            return bool(mask[token >> 3] >> (token & 7) & 1)

        ends = [words.quote] if quotes.inside else words.ends
        for token in () if quotes.escaped else ends:
            if allowed(token):
                return [token]
        for sample in self._samples if quotes.inside else ():
            if matcher.validate_tokens([*sample, words.quote]) == len(sample) + 1:
                return sample
        near = [token for token in (words.singles if quotes.inside else words.starts) if allowed(token)]
        if rng:
            rng.shuffle(near)
        for token in near:
            if any(matcher.validate_tokens([token, end]) == 2 for end in ends):
                return [token]
        if near and (rng or not quotes.inside):
            return near[:1]
        return [int(np.where(_unpacked(mask, words.vocab_size), words.lengths, -1).argmax())]


def _unpacked(mask: bytes, vocab_size: int) -> NDArray[np.bool_]:
    """(V,): the tokens that may follow."""
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
