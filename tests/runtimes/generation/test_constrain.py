"""JSON by a schema, checked by the package jsonschema: models that babble, in every backend, with hardly any tokens left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import DEMO
from support.toys import TOY_CONFIG, RepeatingRuntime, ToyRuntime

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")

import jsonschema

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.constrain import ANY_OBJECT, Grammar, check_schema, read_schema, schema_rules
from gemma_edge.runtimes.generation.generate import (
    LENGTH,
    STOP,
    GenerationOptions,
    GenerationState,
    Usage,
    generate,
)
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.runtimes.generation.speculate import CLOSE, EXACT, Speculation
from gemma_edge.runtimes.generation.vocabulary import Vocabulary
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,8}$"}, "minItems": 2, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "street": {"type": "string"}},
            "required": ["zip"],
        },
        "kind": {"enum": ["person", "company", None]},
    },
    "required": ["name", "age", "tags", "address", "kind"],
    "additionalProperties": False,
}
LIST: dict[str, Any] = {
    "$defs": {
        "node": {
            "anyOf": [
                {"type": "null"},
                {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]},
            ]
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": ANY_OBJECT,
    "anything": {},
    "person": PERSON,
    "recursive": LIST,
    "long strings": {"type": "array", "items": {"type": "string", "minLength": 30}, "minItems": 2},
    "format": {"type": "string", "format": "ipv4"},
    "pattern with loops": {"type": "string", "pattern": "^(ab)*c+d$"},
    "pattern anywhere": {"type": "string", "pattern": "\\d{3}-\\d{4}"},
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -0.5, "exclusiveMaximum": 12}, "minItems": 3},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 50},
    "letters of others": {"enum": ["é漢字", "🜁", "\\\"\n"]},
    "map": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "boolean"}}, "minProperties": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of_folder(DEMO, TOY_CONFIG)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, 4096)


def answer(
    runtime: Runtime, grammar: Grammar, tokens: int, params: SamplingParams, way: Speculation | None = None
) -> tuple[list[int], Usage]:
    """Tokens after a short prompt."""
    runtime.reset()
    state = GenerationState(Sampler(params), grammar=grammar, speculation=way)
    options = GenerationOptions(max_tokens=tokens)
    found = generate(runtime, [2, 50, 60], options, stop_ids=grammar.vocabulary.stop_ids, state=state)
    return list(found), state.usage


def shortest(grammar: Grammar) -> int:
    """Tokens of the shortest answer that it knows of."""
    with pytest.raises(InputError, match=r"too short for this JSON schema; allow at least \d+") as refused:
        grammar.begin(0)
    return int(str(refused.value).split()[-1])


def test_every_token_has_the_bytes_that_the_tokenizer_writes(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """By the tokenizer's own file: byte tokens, blanks, and none of those with a meaning of their own."""
    file = json.loads((DEMO / "tokenizer.json").read_text("utf-8"))
    special = {token["id"] for token in file["added_tokens"] if token["content"].startswith("<")}
    assert special == {0, 1, 2, 3, 4, 5} and {1, 5} == set(vocabulary.stop_ids)
    for piece, token in file["model"]["vocab"].items():
        byte = piece.startswith("<0x") and len(piece) == 6
        expected = bytes.fromhex(piece[3:5]) if byte else piece.replace("▁", " ").encode()
        if token in special or expected == b"\xff":  # the byte that is in no UTF-8 text marks special tokens
            assert vocabulary.library.is_special_token(token)
        else:
            assert vocabulary.text([token]) == expected, piece
    for text in ('{"name": "Élizabeth 漢字 🜁",\n\t"x": [1.5e-3, null]}', "  a   b\n\n"):
        assert vocabulary.ids(text.encode()) == tokenizer.encode(text, bos=False)


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_fits_its_schema_however_few_tokens_there_are(
    name: str, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    schema, runtime = SCHEMAS[name], ToyRuntime()
    grammar = Grammar(vocabulary, schema_rules(schema))
    least, ends, texts = shortest(grammar), set(), set()
    for spare in (0, 1, 2, 5, 11, 40):
        for seed in range(3):
            params = SamplingParams(temperature=[0, 1, 3][seed], top_k=[0, 0, 40][seed], seed=seed)
            ids, usage = answer(runtime, grammar, least + spare, params)
            text = "".join(tokenizer.stream(ids))
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
            assert text == tokenizer.decode(ids) and len(ids) == usage.new_tokens <= least + spare
            ends.add(usage.finish)
            texts.add(text)
    assert ends <= {STOP, LENGTH} and len(texts) > 1


@pytest.mark.parametrize("name", ["any object", "person", "pattern anywhere"])
def test_in_every_backend_plain_or_guessing(name: str, talker: Runtime) -> None:
    tokenizer = Tokenizer(talker.bundle, talker.manifest)
    grammar = Grammar(Vocabulary(tokenizer, talker.manifest.config.vocab_size), schema_rules(SCHEMAS[name]))
    speculation = Speculation(talker, EXACT)
    for seed in range(3):
        params = SamplingParams(temperature=seed / 2, seed=seed)
        ids, usage = answer(talker, grammar, 90, params)
        jsonschema.validate(json.loads(tokenizer.decode(ids)), SCHEMAS[name])
        again, used = answer(talker, grammar, 90, params, speculation)
        assert (again, used) == (ids, usage)


def test_guesses_are_checked_against_the_schema(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """What a cycle of tokens brings back is guessed, and never taken where it does not fit."""
    schema = {"type": "array", "items": {"enum": ["said", "unto"]}, "minItems": 30}
    grammar = Grammar(vocabulary, schema_rules(schema))
    plain, guessed = RepeatingRuntime(), RepeatingRuntime()
    for seed in range(3):
        params = SamplingParams(temperature=1, seed=seed)
        ids, _ = answer(plain, grammar, 200, params)
        assert answer(guessed, grammar, 200, params, Speculation(guessed, CLOSE))[0] == ids
        jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)
    assert 0 < guessed.stats.accepted_tokens < guessed.stats.drafted_tokens


def test_what_is_complete_ends_without_another_token(vocabulary: Vocabulary) -> None:
    grammar, runtime = Grammar(vocabulary, schema_rules({"const": "Moses"})), ToyRuntime()
    ids, usage = answer(runtime, grammar, 50, SamplingParams())
    assert usage.finish == STOP and vocabulary.text(ids) == b'"Moses"'
    assert runtime.position == 3 + len(ids) - 1


def test_one_who_would_end_too_early_goes_on(vocabulary: Vocabulary) -> None:
    """END_OF_TURN is by far the most likely token at every tenth position."""
    schema = {"type": "array", "items": {"type": "integer", "minimum": 1000}, "minItems": 9}
    ids, usage = answer(ToyRuntime(stop_after=10), Grammar(vocabulary, schema_rules(schema)), 200, SamplingParams())
    assert len(json.loads(vocabulary.text(ids))) >= 9 and usage.finish == STOP
    ids, usage = answer(
        ToyRuntime(stop_after=10), Grammar(vocabulary, schema_rules({"type": "integer"})), 200, SamplingParams()
    )
    assert len(ids) == 7 and usage.finish == STOP, "a number that may end does, where the model says so"


def test_every_answer_of_a_chat_fits(tokenizer: Tokenizer) -> None:
    runtime = ToyRuntime()
    template = ChatTemplate.from_bundle(DEMO)
    session = Session(runtime, tokenizer, template, GenerationOptions(max_tokens=150, json_schema=PERSON))
    for each in (session, session, session.fork()):
        text = "".join(each.send("Who?"))
        jsonschema.validate(json.loads(text), PERSON)
    assert len(session.messages) == 4
    with pytest.raises(InputError, match="an answer of 3 tokens is too short"):
        session.send("Who?", replace(session.options, max_tokens=3))
    assert len(session.messages) == 4


def test_damaged_logits_are_still_noticed(vocabulary: Vocabulary) -> None:
    constraint = Grammar(vocabulary, schema_rules(ANY_OBJECT)).begin(9)
    with pytest.raises(InputError, match="not finite numbers"):
        Sampler(SamplingParams()).sample(constraint.mask(np.full(4096, np.nan, np.float32)))


REFUSED = {
    "no JSON": ("{", "the schema is not JSON"),
    "no file": ("schema.json", "json_schema schema.json does not exist"),
    "type": ('{"type": "strin"}', "cannot be followed: Invalid type: strin"),
    "keyword": ('{"not": {}}', 'cannot be followed: Unimplemented keys: ["not"]'),
    "keyword let pass by the schema": ('{"not": {}, "x-guidance": {"lenient": true}}', 'Unimplemented keys: ["not"]'),
    "reference": ('{"$ref": "#/$defs/a"}', "Pointer '/$defs/a' does not exist"),
    "elsewhere": ('{"$ref": "http://a/b"}', "does not fetch"),
    "nothing fits": ('{"type": "number", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
    "pattern": ('{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
    "keys may repeat": ('{"type": "object", "minProperties": 2}', "minProperties above 1"),
    "fractions": ('{"type": "number", "multipleOf": 0.1}', "multipleOf a fraction"),
    "bound": ('{"items": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}}', "an exclusive bound of 0"),
}


@pytest.mark.parametrize(("schema", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_schema_that_would_not_be_followed_is_refused(schema: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        read_schema(schema)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        read_schema(str(path))
    path.write_text(json.dumps(PERSON))
    assert read_schema(str(path)) == PERSON == read_schema(" " + json.dumps(PERSON))


def test_a_schema_without_an_end_is_refused(vocabulary: Vocabulary) -> None:
    endless = {"$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"], "type": "object"}}}
    schema = {**endless, "$ref": "#/$defs/a"}
    check_schema(schema)
    with pytest.raises(InputError, match="no text of at most 4096 tokens was found"):
        Grammar(vocabulary, schema_rules(schema)).begin(10_000)
