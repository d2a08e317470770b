"""OpenAI's requests, as tokens and options, and the form of the responses. Source: OpenAI's API reference."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.constrain import ANY_OBJECT, check_schema
from gemma_edge.runtimes.generation.generate import STOP, GenerationOptions, Usage
from gemma_edge.runtimes.generation.sampling import SamplingParams
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

SYSTEM = ("system", "developer")
# Fields that would change the answer and are not implemented -> their values that change nothing. Others are refused.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
}
MAX_TOKENS = ("max_completion_tokens", "max_tokens")  # the first of these fields that is there counts
INTEGERS = ("top_k", "seed")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")  # some of them only other servers have
SHOWN = 40  # characters of a wrong value in a message


@dataclass(frozen=True)
class ParsedRequest:
    """One request."""

    ids: list[int]  # the prompt
    options: GenerationOptions
    stream: bool  # whether the answer is sent in pieces
    include_usage: bool  # whether a stream ends with the usage

    @classmethod
    def parse(
        cls, body: Any, *, chat: bool, defaults: GenerationOptions, tokenizer: Tokenizer, template: ChatTemplate
    ) -> ParsedRequest:
        """Read a request.

        Args:
            body: its JSON.
            chat: whether it brings messages; else it brings a prompt.
            defaults: for what it leaves open.
            tokenizer, template: those of the bundle.

        Raises:
            InputError: a field is missing, is not as OpenAI's API says, or is not supported.
        """
        if not isinstance(body, dict):
            raise InputError("the request is no JSON object")
        for name, allowed in UNSUPPORTED.items():
            if body.get(name) is not None and body[name] not in allowed:
                raise InputError(f"{name} {body[name]!r} is not supported; leave it out", field=name, value=body[name])
        text = template.render(messages_of(body)) if chat else _get(body, "prompt", str, None)
        if not isinstance(text, str):
            raise InputError("prompt is missing; give one text", field="prompt")
        options = replace(
            defaults,
            max_tokens=_max_tokens(body, defaults.max_tokens),
            sampling=_sampling(body, defaults.sampling),
            stop=_stop(body),
            json_schema=schema_of(body),
        )
        include_usage = bool(_get(body, "stream_options", dict, {}).get("include_usage"))
        return cls(tokenizer.encode(text), options, _get(body, "stream", bool, False), include_usage)


def _get(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name} {str(value)[:SHOWN]!r} is no {kind.__name__}", field=name, value=value)
    return value


def _max_tokens(body: Mapping[str, Any], default: int) -> int:
    for name in MAX_TOKENS:
        value = _get(body, name, int, None)
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is below 1", field=name, value=value)
        if value is not None:
            return int(value)
    return default


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise InputError("stop is neither a text nor a list of texts", field="stop", value=stop)
    return tuple(stop)


def _sampling(body: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {}
    for name in (*NUMBERS, *INTEGERS):
        value = body.get(name)
        if value is None:
            continue
        kind, article = (int, "whole number") if name in INTEGERS else ((int, float), "number")
        if isinstance(value, bool) or not isinstance(value, kind):
            raise InputError(f"{name} {str(value)[:SHOWN]!r} is no {article}", field=name, value=value)
        given[name] = value
    return replace(defaults, **given)


def schema_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that `response_format` names, or None if any text will do.

    Raises:
        InputError: `response_format` is of another type, or its schema cannot be followed.
    """
    form = _get(body, "response_format", dict, {"type": "text"})
    kind, schema = form.get("type"), ANY_OBJECT
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise InputError(f"response_format.type {kind!r} is none of text, json_object and json_schema")
    if kind == "json_schema":
        schema = _get(_get(form, "json_schema", dict, {}), "schema", dict, None)
        if schema is None:
            raise InputError("response_format.json_schema.schema is missing")
    check_schema(schema)
    return schema


def messages_of(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """A conversation for Gemma's template: what the system says stands in front of the user's first turn.

    Raises:
        InputError: there are no messages, or one has no role or text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages are missing; give a list of at least one", field="messages", value=messages)
    system, turns = [], list[dict[str, str]]()
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in (*SYSTEM, "user", "assistant"):
            raise InputError("a message's role is none of system, user and assistant", field="messages")
        text = _text(message.get("content"))
        if message["role"] in SYSTEM and not turns:
            system.append(text)
        elif system:
            turns.append({"role": message["role"], "content": "\n\n".join([*system, text])})
            system = []
        else:
            turns.append({"role": message["role"], "content": text})
    if not turns:
        raise InputError("messages contain no message of a user", field="messages", value=messages)
    return turns


def _text(content: Any) -> str:
    """A message's text, which may come in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise InputError("a message's content is neither text nor a list of text parts", field="messages")


@dataclass(frozen=True)
class ResponseForm:
    """The form of one answer, whole and in pieces."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, usage: Usage) -> dict[str, Any]:
        """The one object of an answer that is not streamed."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": finish_reason(usage), "logprobs": None}
        return self._object("", [choice], _usage(usage))

    def piece(self, text: str | None, finish: str | None) -> dict[str, Any]:
        """One event of a stream."""
        content: dict[str, Any] = {"text": text or ""}
        if self.chat:
            content = {"delta": {"role": "assistant", "content": text} if text is not None else {}}
        return self._object(".chunk", [{"index": 0, **content, "finish_reason": finish, "logprobs": None}], None)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The event that a client may request for the end of a stream."""
        return self._object(".chunk", [], _usage(usage))

    def _object(self, suffix: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        head = {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created}
        return {**head, "model": self.model, "choices": choices, "usage": usage}


def finish_reason(usage: Usage) -> str:
    """Why an answer ended; the API has no word for an answer that ran out of time, so that is "length" too."""
    return "stop" if usage.finish == STOP else "length"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.new_tokens,
        "total_tokens": usage.prompt_tokens + usage.new_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def error_body(message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None}
