"""What a form of tool calling does, as a protocol, and the reading of an answer that both forms share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from gemma_edge.runtimes.generation.constrain import Rules, check_schema, embedded
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.tools.tool import NONE, Call, CallPart, Tool, new_id
from gemma_edge.text.chat import ChatTemplate

# A message has a role and a text as `content`. An assistant's may have `tool_calls`, as `Call.as_json` writes them.
# A message of the role `tool` holds a result, and the tool's `name`.
Message = dict[str, Any]
MAX_CALLS = 16  # in one answer


class ToolForm(Protocol):
    """How one kind of Gemma reads tools and results, and writes calls."""

    def render(self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """The conversation as text, up to the beginning of the model's turn.

        Raises:
            InputError: as `ChatTemplate.render`.
        """

    def rules(self, options: GenerationOptions) -> Rules:
        """The grammar of an answer with the tools of `options`.

        Raises:
            InputError: the schema of a tool cannot be followed.
        """

    def reader(self, options: GenerationOptions) -> AnswerReader:
        """Reads one answer."""


class AnswerReader:
    """Takes an answer apart into text and calls while it is being written. Without tools all of it is text."""

    openings: tuple[str, ...] = ()  # an answer that begins with one of these, after blanks, holds calls

    def __init__(self, options: GenerationOptions) -> None:
        """Begin an answer with these options."""
        self._tools = bool(options.tools) and options.tool_choice != NONE
        # JSON that is text and JSON that is a call begin alike, so the whole answer is needed to tell them apart
        self._held = self._tools and options.json_schema is not None
        self._in_calls: bool | None = None if self._tools else False  # None: not decided
        self._pending = ""
        self._written: list[tuple[str, str, list[str]]] = []  # id, name, and the arguments' JSON in parts

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls that are complete."""
        calls = []
        for id, name, parts in self._written:
            try:
                arguments = json.loads("".join(parts))
            except ValueError:  # the answer was cut off
                continue
            calls.append(Call(name, arguments, id))
        return tuple(calls)

    def feed(self, piece: str) -> list[str | CallPart]:
        """The text and the parts of calls that are certain after the next piece of the answer."""
        self._pending += piece
        if self._in_calls is None and not self._held:
            start = self._pending.lstrip()
            if start.startswith(self.openings):
                self._in_calls = True
            elif start and not any(opening.startswith(start) for opening in self.openings):
                self._in_calls = False
        if self._in_calls:
            return list(self.scan())
        return self._rest() if self._in_calls is False else []

    def end(self) -> list[str | CallPart]:
        """What is still to come when the answer is complete."""
        if self._in_calls:
            return []
        if self._held and self._pending.lstrip().startswith(self.openings):
            text, parts = self._pending, list(self.scan())
            if self._written:
                return list(parts)
            self._pending = text
        return self._rest()

    def scan(self) -> Sequence[CallPart]:
        """The parts of calls in `_pending`, which are taken out of it."""
        raise NotImplementedError

    def begin_call(self, name: str) -> CallPart:
        """Note that a call begins."""
        self._written.append((new_id(), name, []))
        return CallPart(len(self._written) - 1, "", name, self._written[-1][0])

    def go_on(self, arguments: str) -> CallPart:
        """Note the next part of the last call's arguments."""
        self._written[-1][2].append(arguments)
        return CallPart(len(self._written) - 1, arguments)

    def _rest(self) -> list[str | CallPart]:
        text, self._pending = self._pending, ""
        return [text] if text else []


def text_rule(options: GenerationOptions, free: str) -> tuple[str, str, tuple[dict[str, Any], ...]]:
    """The rule of an answer that is no call: its name, its line, and the schemas in it.

    Args:
        options: their JSON schema decides, if there is one.
        free: an expression of the texts that do not begin like a call.

    Raises:
        InputError: the schema cannot be followed.
    """
    if options.json_schema is None:
        return "TEXT", f"TEXT: {free}", ()
    check_schema(options.json_schema)
    schema = dict(options.json_schema)
    return "text", f"text: {embedded(schema)}", (schema,)
