"""What a client of the server asks for: OpenAI's requests, checked, as tokens and settings. Sources: OpenAI's API reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.constrain import ANY_OBJECT, check_schema
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

DEFAULT_TOKENS = 512
SYSTEM = ("system", "developer")
# what would change the answer and is not there: asked for with another value than these, it is refused
ABSENT: dict[str, tuple[Any, ...]] = {
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


@dataclass(frozen=True)
class Asked:
    """One request."""

    ids: list[int]  # the prompt
    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...]  # texts that end the answer, which are not part of it
    stream: bool
    include_usage: bool
    schema: dict[str, Any] | None  # of the JSON that the answer must be

    @classmethod
    def of(
        cls, body: Any, *, chat: bool, params: SamplingParams, tokenizer: Tokenizer, template: ChatTemplate
    ) -> Asked:
        """Read a request.

        Args:
            body: its JSON.
            chat: messages, not a prompt.
            params: for what it leaves open.
            tokenizer, template: the bundle's.

        Raises:
            InputError: something in it that is not as OpenAI's API says, or not there.
        """
        if not isinstance(body, dict):
            raise InputError("the request is no JSON object")
        for name, allowed in ABSENT.items():
            if body.get(name) is not None and body[name] not in allowed:
                raise InputError(f"{name} {body[name]!r} is not supported; leave it out")
        text = template.render(messages_of(body)) if chat else _get(body, "prompt", str, None)
        if not isinstance(text, str):
            raise InputError("prompt is missing; give one text")
        most = _get(body, "max_completion_tokens", int, _get(body, "max_tokens", int, DEFAULT_TOKENS))
        stop = body.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
            raise InputError("stop is neither a text nor a list of texts")
        options = _get(body, "stream_options", dict, {})
        if most < 1:
            raise InputError(f"max_tokens {most} is below 1")
        return cls(
            tokenizer.encode(text),
            _params(body, params),
            most,
            tuple(stop),
            _get(body, "stream", bool, False),
            bool(options.get("include_usage")),
            schema_of(body),
        )

    def sampler(self) -> Sampler:
        """A new one."""
        return Sampler(self.params)


def _get(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name} {str(value)[:40]!r} is no {kind.__name__}")
    return value


def _params(body: Mapping[str, Any], params: SamplingParams) -> SamplingParams:
    found: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "top_k", "seed"):  # some only of other servers
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if name in ("top_k", "seed") else (int, float)):
            raise InputError(f"{name} {str(value)[:40]!r} is no number that it can be")
        found[name] = value
    return replace(params, **found)


def schema_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `response_format` asks for: the JSON schema of the answer, or None for any text.

    Raises:
        InputError: something else, or a schema that cannot be followed.
    """
    asked = _get(body, "response_format", dict, {"type": "text"})
    kind, schema = asked.get("type"), ANY_OBJECT
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise InputError(f"response_format.type {kind!r} is none of text, json_object and json_schema")
    if kind == "json_schema":
        schema = _get(_get(asked, "json_schema", dict, {}), "schema", dict, None)
        if schema is None:
            raise InputError("response_format.json_schema.schema is missing")
    check_schema(schema)
    return schema


def messages_of(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """A conversation as Gemma's template takes it: what the system says stands in front of the user's first turn.

    Raises:
        InputError: no messages, or one without role and text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages are missing; give a list of at least one")
    system, found = [], list[dict[str, str]]()
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in (*SYSTEM, "user", "assistant"):
            raise InputError("a message's role is none of system, user and assistant")
        text = _text(message.get("content"))
        if message["role"] in SYSTEM and not found:
            system.append(text)
        elif system:
            found.append({"role": message["role"], "content": "\n\n".join([*system, text])})
            system = []
        else:
            found.append({"role": message["role"], "content": text})
    if not found:
        raise InputError("messages hold nothing that a user says")
    return found


def _text(content: Any) -> str:
    """A message's text: as it is, or in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise InputError("a message's content is neither text nor a list of text parts")


def until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Pass text on up to the first of the texts in `stop`; with each piece, whether that one was reached.

    What may be the beginning of one is held back until it is clear.
    """
    held = ""
    for piece in pieces:
        held += piece
        places = [held.find(each) for each in stop]
        if any(place >= 0 for place in places):
            yield held[: min(place for place in places if place >= 0)], True
            return
        keep = max((size for each in stop for size in range(1, len(each)) if held.endswith(each[:size])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep], False
            held = held[len(held) - keep :]
    if held:
        yield held, False
