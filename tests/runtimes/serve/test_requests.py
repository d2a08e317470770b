"""What a request may hold: OpenAI's fields, those of other servers, and limits. Without HTTP: see test_server.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.checkpoints import DEMO
from support.toys import VOCAB, toy_manifest

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")

from gemma_edge.errors import InputError
from gemma_edge.reading import MAX_DEPTH
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.serve.body import parse_body
from gemma_edge.runtimes.serve.fields import OTHERS, UNSUPPORTED
from gemma_edge.runtimes.serve.messages import messages_of
from gemma_edge.runtimes.serve.openai import MAX_PROMPT_CHARS, Model, ParsedRequest
from gemma_edge.runtimes.serve.refused import Refused
from gemma_edge.runtimes.tools.json_calls import JsonCalls
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello."}]}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(Tokenizer(DEMO, toy_manifest()), ChatTemplate.from_bundle(DEMO), JsonCalls(), VOCAB, context=64)


def parse(model: Model, chat: bool = False, defaults: GenerationOptions | None = None, **body: Any) -> ParsedRequest:
    body = body if chat or "prompt" in body else {"prompt": "It was", **body}
    return ParsedRequest.parse(body, chat=chat, defaults=defaults or GenerationOptions(), model=model)


def test_a_prompt_comes_in_four_forms(model: Model) -> None:
    """Lists were refused as 'prompt is missing'."""
    first, second = (model.tokenizer.encode(text) for text in ("It was", "a"))
    assert parse(model, prompt="It was").prompts == (tuple(first),)
    assert parse(model, prompt=["It was", "a"]).prompts == (tuple(first), tuple(second))
    assert parse(model, prompt=first).prompts == (tuple(first),)
    assert parse(model, prompt=[first, second, [7]]).prompts == (tuple(first), tuple(second), (7,))
    assert parse(model, prompt=["It was", second], echo=True).echo == ("It was", "a")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": []}, "prompt is missing"),
        ({"prompt": [[]]}, "prompt is missing"),
        ({"prompt": [True]}, "prompt is missing"),
        ({"prompt": [[1], "a", 3]}, "prompt is missing"),
        ({"prompt": [2, VOCAB]}, f"token id {VOCAB} is not between 0 and {VOCAB - 1}"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [1 << 70]}, "token id 1180591620717411303424"),
        ({"prompt": ["a"] * 33}, "33 texts; give at most 32"),
        ({"prompt": "a" * (MAX_PROMPT_CHARS + 1)}, "262145 characters; give at most 262144"),
        ({"max_tokens": 10**18}, "max_tokens 1000000000000000000 is above 1048576"),
        ({"max_tokens": 10**400}, "max_tokens 1000000000000000000000000000000000000000... is above"),
        ({"stop": ["x"] * 100_000}, "at most 16 texts"),
        ({"stop": ["x" * 257]}, "at most 256 characters"),
        ({"temperature": 10**400}, "temperature 1000"),
        ({"logprobs": 21}, "logprobs 21 is not between 0 and 20"),
        ({"logprobs": True}, "logprobs True is not a whole number"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"stream": "yes"}, "stream 'yes' is not true or false"),
    ],
    ids=lambda part: part if isinstance(part, str) else list(part)[0],
)
def test_what_is_wrong_or_too_large_is_refused_by_name(body: dict[str, Any], message: str, model: Model) -> None:
    """100,000 stop texts took 28 s, and 10^18 tokens every other client's turn."""
    with pytest.raises(InputError, match=message):
        parse(model, **body)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_is_not_there_is_refused_unless_it_changes_nothing(name: str, model: Model) -> None:
    """The fields in OTHERS were ignored, although the docs promise that no field is."""
    for value in (None, *UNSUPPORTED[name]):
        body = {"prompt": "a", name: value}
        assert ParsedRequest.parse(body, chat=False, defaults=GenerationOptions(), model=model).prompts
    with pytest.raises(InputError, match=f"{name} .* is not supported; leave it out") as refused:
        ParsedRequest.parse({"prompt": "a", name: {"other": 1}}, chat=False, defaults=GenerationOptions(), model=model)
    assert refused.value.field == name


def test_the_spellings_of_other_servers_are_known() -> None:
    named = {"grammar", "guided_regex", "continue_final_message", "ignore_eos", "min_tokens", "chat_template_kwargs"}
    assert named <= set(OTHERS)


def test_a_field_that_changes_nothing_is_ignored(model: Model) -> None:
    assert parse(model, user="me", metadata={"a": "b"}, store=True, some_new_field=[1]).prompts


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA}, "response_format": {"type": "text"}},
    ],
    ids=str,
)
def test_a_schema_comes_in_every_servers_spelling(body: dict[str, Any], model: Model) -> None:
    """All spellings but the first were ignored with status 200."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
    assert parse(model, **body).options.json_schema == SCHEMA


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"json_schema": SCHEMA, "guided_json": SCHEMA}, "json_schema and guided_json both hold a schema"),
        ({"structured_outputs": {"regex": "a+"}}, "regex 'a\\+' is not supported"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice .* is not supported"),
        ({"guided_json": "{"}, "guided_json is not JSON"),
        ({"guided_json": "[" * 100_000}, "guided_json is not JSON: it is nested more than 100 deep"),
        ({"guided_json": "\ud800"}, "guided_json is not JSON"),
        ({"json_schema": [1]}, "the JSON schema is"),
        ({"json_schema": {"const": "\ud800"}}, "the JSON schema cannot be followed"),
        ({"json_schema": {"type": "string", "minLength": 10**6}}, "minLength or minItems above 4096"),
        ({"json_schema": {"type": "array", "minItems": 10**400}}, "minLength or minItems above 4096"),
        ({"json_schema": {"enum": ["x" * 70_000]}}, "longer than 65536 characters"),
        ({"response_format": "json"}, "response_format 'json' is not an object"),
    ],
    ids=lambda part: part if isinstance(part, str) else list(part)[0],
)
def test_a_schema_that_cannot_be_followed_is_refused(body: dict[str, Any], message: str, model: Model) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
    with pytest.raises(InputError, match=message):
        parse(model, **body)


def test_log_probabilities_are_requested_in_two_ways(model: Model) -> None:
    assert parse(model).logprobs is None and parse(model, chat=True, **HELLO).logprobs is None
    assert parse(model, logprobs=0).logprobs == 0 and parse(model, logprobs=False).logprobs is None
    assert parse(model, chat=True, logprobs=True, **HELLO).logprobs == 0
    assert parse(model, chat=True, logprobs=True, top_logprobs=5, **HELLO).logprobs == 5


def test_a_text_that_is_too_long_is_refused_where_nothing_may_be_forgotten(model: Model) -> None:
    """`--serve --strict` was refused, so a prompt of 2012 tokens was silently cut to a context of 256."""
    strict, ids = GenerationOptions(strict=True), [7] * 60
    with pytest.raises(InputError, match="a prompt of 60 tokens and 5 new ones exceed the bundle's context of 64"):
        parse(model, defaults=strict, prompt=ids, max_tokens=5)
    assert parse(model, defaults=strict, prompt=ids).options.max_tokens == 4, "what is left"
    assert parse(model, defaults=GenerationOptions(max_tokens=7), prompt=ids).options.max_tokens == 7
    with pytest.raises(InputError, match="exceed the bundle's context"):
        parse(model, defaults=strict, prompt=[7] * 64)


def test_a_conversation_with_tools_is_read_as_text() -> None:
    """An assistant's `content: null` and the role `tool` were refused."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = messages_of(
        {
            "messages": [
                {"role": "user", "content": "Is it warm?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "31"},
                {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "dry"}]},
                {"role": "assistant", "content": None},
            ]
        }
    )
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert JsonCalls().render(ChatTemplate(source, {}), turns, ()) == (
        '[user]Is it warm?[assistant][{"name":"weather","parameters":{"city":"Rome"}}]'
        "[user]```tool_output\n31\n```\n```tool_output\ndry\n```[assistant]"
    )


def test_a_template_with_a_turn_for_the_system_gets_one(model: Model) -> None:
    """The system message went into the user's turn all the same: 43 tokens, where transformers has 49."""
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    own = Model(model.tokenizer, ChatTemplate(source, {}), JsonCalls(), VOCAB, context=64)
    (ids,) = parse(own, chat=True, messages=[{"role": "system", "content": "Be brief."}, *HELLO["messages"]]).prompts
    assert model.tokenizer.decode(ids) == "[system] Be brief. [user] Hello. "


def test_what_the_system_says_has_its_turn_where_the_template_has_one() -> None:
    turns = [{"role": role, "content": role} for role in ("system", "developer", "user")]
    own = [{"role": "system", "content": "system\n\ndeveloper"}, {"role": "user", "content": "user"}]
    assert messages_of({"messages": turns}, takes_system=True) == own
    assert messages_of({"messages": turns}) == [{"role": "user", "content": "system\n\ndeveloper\n\nuser"}]
    assert messages_of({"messages": turns[2:]}, takes_system=True) == own[1:]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}] * 2049, "2049 messages are too many"),
        ([{"role": "user", "content": None}], "neither text nor a list"),
        ([{"role": ["user"], "content": "a"}], "role is not one of"),
        ([{"role": "assistant", "content": None, "tool_calls": [3]}], "a tool call has no function"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_messages_that_are_wrong_are_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        messages_of({"messages": messages})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a":' * (MAX_DEPTH + 2) + b"1" + b"}" * (MAX_DEPTH + 2), "nested more than 100 deep"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"", "not JSON"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_a_body_that_is_not_json_is_refused(body: bytes, message: str) -> None:
    """Deep nesting ended in status 500 and a traceback."""
    with pytest.raises(Refused, match=message) as refused:
        parse_body(body)
    assert refused.value.status == 400


def test_a_body_that_is_just_deep_enough_is_read() -> None:
    assert parse_body(b'{"a":' * (MAX_DEPTH - 1) + b"1" + b"}" * (MAX_DEPTH - 1))


def test_token_bytes_join_to_the_text(model: Model) -> None:
    text = "It was a caf\u00e9 \u4e2d\U0001f600."
    ids = model.tokenizer.encode(text, bos=False)
    assert b"".join(map(model.tokenizer.token_bytes, ids)).decode() == text
