"""The form of OpenAI's responses, whole and in pieces. Source: OpenAI's API reference."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_edge.runtimes.generation.generate import STOP, Usage
from gemma_edge.runtimes.serve.logprobs import ScoredToken
from gemma_edge.runtimes.tools.tool import CallPart

CONTENT_FILTER = "content_filter"  # why an answer ended that a guard refused


@dataclass(frozen=True)
class Piece:
    """A part of one choice."""

    choice: int  # the number of the answer
    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()  # those that came since the last piece, where log-probabilities are requested
    finish: str | None = None  # why the choice ended, with its last piece
    calls: tuple[CallPart, ...] = ()


@dataclass
class Total:
    """What a request cost: the sums over its prompts."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # the part of the prompts that the cache already held
    truncated_tokens: int = 0  # the part that the context did not hold any more when the answer began
    new_tokens: int = 0

    def add(self, usage: Usage, context: int, *, again: bool = False) -> None:
        """Add one answer; `again` says that its prompt has been counted already."""
        self.new_tokens += usage.new_tokens
        if not again:
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.cached_tokens
            self.truncated_tokens += max(0, usage.prompt_tokens - context)

    def as_json(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "truncated_tokens": self.truncated_tokens,
            },
        }


@dataclass(frozen=True)
class ResponseForm:
    """The form of the answer to one request."""

    model: str
    chat: bool
    logprobs: bool = False  # whether they were requested
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Piece], total: Total) -> dict[str, Any]:
        """The one object of an answer that is not streamed."""
        choices = []
        for index in range(1 + max(piece.choice for piece in pieces)):
            own = [piece for piece in pieces if piece.choice == index]
            text = "".join(piece.text for piece in own)
            content = {"message": _message(text, own)} if self.chat else {"text": text}
            tokens = [token for piece in own for token in piece.tokens]
            choices.append({"index": index, **content, **self._end(own[-1].finish, tokens)})
        return self._object("", choices, total.as_json())

    def role(self, choice: int) -> dict[str, Any]:
        """The first event of an answer in a chat that is streamed."""
        delta = {"role": "assistant", "content": ""}
        return self._object(".chunk", [{"index": choice, "delta": delta, **self._end(None, [])}], None)

    def piece(self, piece: Piece) -> dict[str, Any]:
        """One event of a stream."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text or not (piece.finish or piece.calls) else {}
        if piece.calls:
            delta["tool_calls"] = [_call_delta(part) for part in piece.calls]
        content = {"delta": delta} if self.chat else {"text": piece.text}
        choice = {"index": piece.choice, **content, **self._end(piece.finish, piece.tokens)}
        return self._object(".chunk", [choice], None)

    def usage(self, total: Total) -> dict[str, Any]:
        """The event that a client may request for the end of a stream."""
        return self._object(".chunk", [], total.as_json())

    def _end(self, finish: str | None, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        logprobs = None
        if self.logprobs and (tokens or finish):
            logprobs = _chat_logprobs(tokens) if self.chat else _text_logprobs(tokens)
        return {"finish_reason": finish, "logprobs": logprobs}

    def _object(self, suffix: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        head = {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created}
        return {**head, "model": self.model, "choices": choices, "usage": usage}


def finish_reason(usage: Usage, *, calls: bool = False) -> str:
    """Why an answer ended; the API has no word for an answer that ran out of time, so that is "length" too."""
    return ("tool_calls" if calls else "stop") if usage.finish == STOP else "length"


def _message(text: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The assistant's message."""
    calls: dict[int, dict[str, Any]] = {}
    for part in (part for piece in pieces for part in piece.calls):
        function = {"name": part.name, "arguments": ""}
        call = calls.setdefault(part.index, {"id": part.id, "type": "function", "function": function})
        call["function"]["arguments"] += part.arguments
    message: dict[str, Any] = {"role": "assistant", "content": text}
    return {**message, "content": text or None, "tool_calls": list(calls.values())} if calls else message


def _call_delta(part: CallPart) -> dict[str, Any]:
    """A part of a call in a stream; the first one names the tool."""
    if not part.name:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


def _shown(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _chat_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    def entry(text: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _shown(text), "logprob": logprob, "bytes": list(text)}

    content = [
        {**entry(token.text, token.logprob), "top_logprobs": [entry(*other) for other in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    return {
        "tokens": [_shown(token.text) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {_shown(text): logprob for text, logprob in token.top}
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }
