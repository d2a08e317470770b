"""Answers by a grammar, such as JSON by a schema: tokens that cannot go on to a valid text are taken out. llguidance knows which.

This file adds an end in time. While an answer grows, it keeps an ending (closing.py) that fits into the tokens left. If no
ending exists after a chosen token, the next token of the kept ending replaces it. So an answer that runs to its end, or to its
last token, is always valid; an answer that is cancelled is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_edge.errors import InputError, one_line
from gemma_edge.logits import Logits
from gemma_edge.reading import MAX_JSON, parse_json, read_bytes
from gemma_edge.runtimes.generation.closing import MAX_CLOSING_TOKENS, Closer, Quotes
from gemma_edge.runtimes.generation.vocabulary import Vocabulary, allowed_tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher

ANY_OBJECT: dict[str, Any] = {"type": "object"}
# No blanks between parts: they would be valid, but small models spend half of their tokens on them.
OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}


def _number(schema: dict[str, Any], key: str, default: float) -> float:
    value = schema.get(key)
    try:
        return float(value) if isinstance(value, (int, float)) else default
    except OverflowError:
        return math.inf if schema[key] > 0 else -math.inf


def _loses_bound(schema: dict[str, Any], own: str, *others: str) -> bool:
    return _number(schema, own, 1) == 0 and any(abs(_number(schema, other, 1)) < 1 for other in others)


# Schemas that llguidance 1.9 accepts but does not follow, as tests with the package jsonschema show, and schemas that only very
# long texts fulfil.
UNSUPPORTED: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = (
    (
        lambda each: max(_number(each, "minLength", 0), _number(each, "minItems", 0)) > MAX_CLOSING_TOKENS,
        f"minLength or minItems above {MAX_CLOSING_TOKENS}; lower it",
    ),
    (lambda each: _number(each, "minProperties", 0) > 1, "minProperties above 1, where keys may repeat; require some"),
    (lambda each: _number(each, "multipleOf", 1) % 1 != 0, "multipleOf a fraction; scale it to whole numbers"),
    (
        lambda each: (
            _loses_bound(each, "exclusiveMinimum", "maximum", "exclusiveMaximum")
            or _loses_bound(each, "exclusiveMaximum", "minimum", "exclusiveMinimum")
        ),
        "an exclusive bound of 0 with the other one nearer to it than 1; give a bound beside 0",
    ),
)


def read_schema(text: str) -> dict[str, Any]:
    """A JSON schema from a file or from the text itself.

    Args:
        text: the schema itself if it begins with a brace, else a path.

    Raises:
        InputError: there is no such file, it does not hold a JSON object, or the schema cannot be followed to the letter.
    """
    inline = text.lstrip().startswith("{")
    name = "the schema" if inline else text
    hint = "give a file, or the JSON itself"
    try:
        schema = parse_json(
            text.encode() if inline else read_bytes(Path(text), hint, max_bytes=MAX_JSON, field="json_schema")
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}") from None
    check_schema(schema)
    return dict(schema)


def check_schema(schema: Any) -> None:
    """Refuse a schema that would not be followed to the letter.

    Raises:
        InputError: the schema is not an object or has keys that llguidance does not follow, or llguidance is not installed.
    """
    if find_spec("llguidance") is None:
        raise InputError("answers by a JSON schema need llguidance: pip install 'gemma-edge[json]'")
    if not isinstance(schema, dict):
        raise InputError("the JSON schema is not a JSON object")
    for each in _objects(schema):
        for applies, problem in UNSUPPORTED:
            if applies(each):
                raise InputError(f"the JSON schema cannot be followed: {problem}")
    from llguidance import LLMatcher

    try:
        failed, words = LLMatcher.validate_grammar_with_warnings(_grammar(schema))
    except ValueError as error:  # a text in it is not valid UTF-8
        raise InputError(f"the JSON schema cannot be followed: {one_line(error)}") from None
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


@dataclass(frozen=True)
class Rules:
    """A grammar in llguidance's own notation, which needs no vocabulary yet."""

    source: str
    schemas: tuple[dict[str, Any], ...]  # the JSON schemas in it
    what: str = "this JSON schema"  # names it in messages
    ends: tuple[str, ...] = ()  # tokens that end a value, besides those of JSON
    quoted: bool = True  # whether texts stand between quotes


def embedded(schema: dict[str, Any]) -> str:
    """A schema inside a grammar in Lark's notation."""
    return f"%json {json.dumps({**schema, 'x-guidance': OPTIONS})}"


def schema_rules(schema: dict[str, Any]) -> Rules:
    """The grammar of JSON that fits a schema.

    Raises:
        InputError: it cannot be followed.
    """
    check_schema(schema)
    return Rules(_grammar(schema), (schema,))


class Grammar:
    """Rules over a vocabulary; `begin` an answer with them."""

    def __init__(self, vocabulary: Vocabulary, rules: Rules) -> None:
        """Compile the rules.

        Raises:
            InputError: they cannot be followed.
        """
        self.vocabulary, self.what = vocabulary, rules.what
        self._start = self._matcher(rules.source)
        if self._start.is_error():
            raise InputError(f"{rules.what} cannot be followed: {self._start.get_error().splitlines()[0]}")
        found = _objects(list(rules.schemas))
        patterns = [each["pattern"] for each in found if isinstance(each.get("pattern"), str)]
        ends = [token for text in rules.ends for token in vocabulary.ids(text.encode())]
        self._closer = Closer(vocabulary, patterns, self._matcher_of_pattern, ends)
        self._quotes = Quotes(tracked=rules.quoted)

    def begin(self, max_tokens: int) -> Constraint:
        """Begin one answer of at most `max_tokens` tokens.

        Raises:
            InputError: no answer that short was found.
        """
        ending = self._closer.find(self._start, self._quotes, MAX_CLOSING_TOKENS)
        if ending is None:
            raise InputError(f"no text of at most {MAX_CLOSING_TOKENS} tokens was found that fits {self.what}")
        if len(ending) > max_tokens:
            raise InputError(
                f"an answer of {max_tokens} tokens is too short for {self.what}; allow at least {len(ending)}",
                field="max_tokens",
                value=max_tokens,
            )
        constraint = Constraint(self.vocabulary, self._start.deep_copy(), self._closer, ending, max_tokens)
        constraint.quotes = replace(self._quotes)
        return constraint

    def _matcher(self, source: str) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self.vocabulary.library, source, log_level=0)

    def _matcher_of_pattern(self, pattern: str) -> LLMatcher:
        whole = f"^(?:{pattern.removeprefix('^').removesuffix('$')})$"
        return self._matcher(_grammar({"type": "string", "pattern": whole}))


class Constraint:
    """One answer while it is generated."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: LLMatcher, closer: Closer, ending: list[int], max_tokens: int
    ) -> None:
        self._vocabulary, self._matcher, self._closer = vocabulary, matcher, closer
        self._ending = ending  # tokens that end the text from here; never more than are left
        self._left = max_tokens
        self.quotes = Quotes()
        self.shortened = False  # whether a token was replaced so that the text ends in time

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, logits: Logits) -> Logits:
        """Logits (V,) with minus infinity for tokens that must not follow."""
        allowed = allowed_tokens(self._matcher.compute_bitmask(), len(logits))
        masked: Logits = np.where(allowed, logits, np.float32(-np.inf))
        if self._matcher.is_error():  # a limit of the library was reached; the kept ending is still valid
            masked = np.full_like(logits, -np.inf)
            masked[self._closing_token()] = 0
        return masked

    def take(self, token: int) -> int:
        """Append a token to the text.

        Args:
            token: the token that was chosen.

        Returns:
            The token that was appended: the chosen one, or the one that replaces it so that the text ends in time.
        """
        stop_ids, left = self._vocabulary.stop_ids, self._left - 1
        if token in stop_ids:
            return token
        ending = self._ending_after(token, left)
        if ending is None:
            token, ending = self._closing_token(), self._ending[1:]
            self.shortened = True
            if token in stop_ids:
                return token
        self._matcher.consume_token(token)
        self.quotes.feed(self._vocabulary.text([token]))
        self._ending, self._left = ending, left
        return token

    def _closing_token(self) -> int:
        return self._ending[0] if self._ending else min(self._vocabulary.stop_ids)

    def _ending_after(self, token: int, left: int) -> list[int] | None:
        """Tokens that end the text behind `token`, at most `left`; None if no ending was found."""
        if self._matcher.is_error():
            return self._ending[1:] if [token] == self._ending[:1] else None
        matcher = self._matcher.deep_copy()
        if not matcher.consume_token(token):
            return None
        stop = min(self._vocabulary.stop_ids)
        for ending in (self._ending[1:], self._ending):  # most tokens go on with the ending, or leave it valid
            if len(ending) <= left and matcher.validate_tokens([*ending, stop]) == len(ending) + 1:
                return ending
        quotes = replace(self.quotes)
        quotes.feed(self._vocabulary.text([token]))
        return self._closer.find(matcher, quotes, min(left, MAX_CLOSING_TOKENS))
