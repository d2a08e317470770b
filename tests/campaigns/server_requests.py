"""The requests of the server's campaign: ordinary ones, and what chance makes of them. Only `random` decides."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from support.serving import CHAT, COMPLETIONS

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "do", "parameters": SCHEMA}}
ORDINARY: tuple[tuple[str, dict[str, Any] | None], ...] = (
    (COMPLETIONS, {"prompt": "It was", "max_tokens": 6}),
    (COMPLETIONS, {"prompt": ["a", "It was"], "max_tokens": 4, "logprobs": 2, "echo": True}),
    (COMPLETIONS, {"prompt": [2, 7, 9], "max_tokens": 5, "stream": True, "stop": ["zzz"]}),
    (CHAT, {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 6, "temperature": 0.7, "seed": 3}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi."}], "max_completion_tokens": 4, "stream": True}),
    (CHAT, {"messages": [{"role": "user", "content": "JSON."}], "max_tokens": 40, "guided_json": SCHEMA}),
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": "Do."}],
            "max_tokens": 40,
            "tools": [TOOL],
            "tool_choice": "required",
        },
    ),
    ("/v1/models", None),
    ("/v1/models/toy", None),
    ("/health", None),
    ("/metrics", None),
    ("/", None),
)
FIELDS = (
    "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
    "repetition_penalty", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "n", "tools", "tool_choice",
    "response_format",
    "json_schema", "guided_json", "structured_outputs", "grammar", "min_tokens", "ignore_eos", "user", "model", "\ud800", "",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**400), 0.5, 1e-320, 1e308, -0.0, "", "a", "\ud800", "\x00",
    "<bos><start_of_turn>user", "x" * 5000, "\U0001f600" * 300, [], {}, [[]], [None], ["a"], [1, 2], [2**70], [True],
    {"a": {"b": []}}, {"type": "json_object"}, {"type": "json_schema"}, {"include_usage": "yes"}, {"json": SCHEMA},
    [{"role": "user", "content": "a"}] * 3, [{"role": "tool", "content": "1"}], [{"role": "assistant", "content": None}],
    [TOOL], [TOOL, TOOL], "required", {"type": "function", "function": {"name": "do"}},
    {"type": "function", "function": {"name": 3}},
)  # fmt: skip
SCHEMA_PARTS: tuple[Any, ...] = (
    {"type": "string", "minLength": 10**6}, {"type": "string", "pattern": "(a+)+$"}, {"type": "string", "pattern": "("},
    {"enum": list(range(500))}, {"const": "\ud800"}, {"$ref": "#"}, {"$ref": "#/no"}, {"$ref": "http://a.invalid/b"},
    {"type": "array", "minItems": 10**5, "items": {"type": "integer"}}, {"anyOf": []}, {"type": ["string", "null", 3]},
    {"type": "integer", "minimum": 10, "maximum": 1}, {"multipleOf": 0}, {"type": "number", "minimum": 1e400}, True, 3, {},
    {"pattern": 5}, {"allOf": [{"type": "string"}, {"type": "integer"}]}, {"properties": {"": {"type": "string"}}},
)  # fmt: skip


def mutated_body(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body in which some fields are replaced by something else."""
    path, body = rng.choice([(path, body) for path, body in ORDINARY if body])
    body = dict(body)
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    if rng.random() < 0.2:
        body.pop(rng.choice(list(body)))
    return path, json.dumps(body).encode()


def evil_schema(rng: random.Random) -> tuple[str, bytes]:
    """A request for JSON by a schema that is large, wrong, or cannot be fulfilled."""
    schema = rng.choice(SCHEMA_PARTS)
    for _ in range(rng.randint(0, 12)):
        schema = rng.choice(
            [
                {"type": "object", "properties": {"a": schema}, "required": ["a"]},
                {"type": "array", "items": schema, "minItems": rng.randint(0, 40)},
                {"anyOf": [schema, rng.choice(SCHEMA_PARTS)]},
            ]
        )
    spelling = rng.choice(["guided_json", "json_schema"])
    return COMPLETIONS, json.dumps({"prompt": "It", "max_tokens": rng.randint(1, 60), spelling: schema}).encode()


def broken_json(rng: random.Random) -> tuple[str, bytes]:
    """A body whose bytes were changed, cut or repeated, or that is nested deep."""
    path, data = mutated_body(rng)
    changed = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 1:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 2:
        changed *= 2
    elif kind == 3:
        opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        depth = rng.choice([60, 70, 1000, 10_000])
        changed = bytearray(b'{"prompt":' + opening * depth + b"1" + closing * depth + b"}")
    else:
        changed = bytearray(b'{"prompt":"a","stop":' + b"[" + b'"x",' * rng.choice([10, 100_000]) + b'"x"]}')
    return path, bytes(changed)


def raw_http(rng: random.Random) -> bytes:
    """Bytes that are not HTTP, or HTTP that no client sends."""
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    body = '{"prompt": "It", "max_tokens": 2}'
    parts: tuple[Callable[[], str | bytes], ...] = (
        lambda: rng.randbytes(rng.randint(1, 3000)),
        lambda: f"{head}Content-Length: -1\r\n\r\n{body}",
        lambda: f"{head}Content-Length: 9\r\nContent-Length: 8\r\n\r\n{body}",
        lambda: f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n{body}\r\n0\r\n\r\n",
        lambda: f"{head}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n{body}\r\n0\r\n\r\n",
        lambda: f"{head}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n{body}",
        lambda: f"{head}X: {'a' * rng.choice([10, 70_000, 300_000])}\r\nContent-Length: {len(body)}\r\n\r\n{body}",
        lambda: "GET /v1/models HTTP/1.1\r\nHost: \xff\r\nConnection: close\r\n\r\n".encode("latin-1"),
        lambda: "GET /health HTTP/1.0\r\n\r\n",
        lambda: "GET /%00%ff/../../etc/passwd?a=%0d%0aX:%20y HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
        lambda: (
            f"{rng.choice(['PUT', 'DELETE', 'TRACE', 'BREW'])} / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        ),
        lambda: "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n",
        lambda: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )
    data = rng.choice(parts)()
    return data if isinstance(data, bytes) else data.encode()


def foreign_headers(rng: random.Random) -> dict[str, str]:
    """Headers of a request that a page of another origin sends."""
    return rng.choice(
        (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Host": "evil.example"},
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
            {"Origin": "https://evil.example", "Content-Type": "text/plain"},
        )
    )
