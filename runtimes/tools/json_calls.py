"""Tools for Gemma 1, 2 and 3, which have no tokens for them: the prompt asks for JSON.

Source: ai.google.dev/gemma/docs/capabilities/function-calling. Its list of calls and its JSON of a call are put together here, so
that an answer can hold several calls. A grammar holds the model to that form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.constrain import Rules, check_schema, embedded
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.tools.form import MAX_CALLS, AnswerReader, Message, text_rule
from gemma_edge.runtimes.tools.tool import AUTO, NONE, REQUIRED, CallPart, Tool, compact
from gemma_edge.text.chat import ChatTemplate

OFFER = """\
You have access to functions. If you decide to invoke any of the function(s), you MUST put it in the format of
[{"name": function name, "parameters": dictionary of argument name and its value}]

You SHOULD NOT include any other text in the response if you call a function
"""
RESULT = "```tool_output\n{}\n```"
FENCES = ("```json", "```tool_code")  # what models like to put around JSON
# Whatever begins like a call must be one, so text may not begin so.
TEXT = rf"/(.|\n)*/ & ~/[ \t\n]*(\[|\{{|{'|'.join(FENCES)})(.|\n)*/"
HEAD = re.compile(r'\{"name":"([^"]*)","parameters":')


class JsonReader(AnswerReader):
    """Reads `[{"name":"weather","parameters":{"city":"Rome"}}]`, with or without a fence around it."""

    openings = ("[", *FENCES)

    def __init__(self, options: GenerationOptions) -> None:
        """Begin an answer with these options."""
        super().__init__(options)
        self._in_arguments = False
        self._depth, self._quoted, self._escaped = 0, False, False

    def scan(self) -> Sequence[CallPart]:
        """The parts of calls in `_pending`, which are taken out of it."""
        return list(self._parts())

    def _parts(self) -> Iterator[CallPart]:
        while True:
            if not self._in_arguments:
                head = HEAD.search(self._pending)
                if head is None:
                    return
                self._pending, self._in_arguments = self._pending[head.end() :], True
                yield self.begin_call(head[1])
            end = next((at for at, character in enumerate(self._pending) if self._ends(character)), None)
            part = self._pending[:end]
            if part:
                yield self.go_on(part)
            self._pending = "" if end is None else self._pending[end + 1 :]
            if end is None:
                return
            self._in_arguments = False

    def _ends(self, character: str) -> bool:
        """Whether the arguments end before this character, the brace that ends the call."""
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if self._depth < 0:
            self._depth = 0
            return True
        return False


class JsonCalls:
    """The form of a Gemma whose chat template knows nothing of tools."""

    def render(self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """The conversation as text; the tools come first in the user's first turn, and results are turns of the user."""
        turns: list[dict[str, str]] = []
        before = ""
        for message in messages:
            role, text = message["role"], written(message)
            if before == "tool" and role in ("tool", "user"):
                turns[-1]["content"] += f"\n{text}"
            else:
                turns.append({"role": "user" if role == "tool" else role, "content": text})
            before = role
        if tools:
            offer = f"{OFFER}{compact([tool.as_json() for tool in tools])}\n\n"
            first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
            first["content"] = offer + first["content"]
        return template.render(turns)

    def rules(self, options: GenerationOptions) -> Rules:
        """The grammar: text, or a list of calls."""
        choice, tools = options.tool_choice, options.tools
        schemas = [arguments_schema(tool) for tool in tools]
        name, line, others = text_rule(options, TEXT)
        starts, lines = [name] if choice in (AUTO, NONE) else [], [line]
        if choice != NONE:
            starts += ["calls", *(f'"{fence}\\n" calls "\\n```"' for fence in FENCES)]
            offered = [at for at, tool in enumerate(tools) if choice in (AUTO, REQUIRED, tool.name)]
            more = f'("," call){{0,{MAX_CALLS - 1}}}' if options.parallel_calls and choice in (AUTO, REQUIRED) else ""
            lines += [f'calls: "[" call {more} "]"', f"call: {' | '.join(f'tool_{at}' for at in offered)}"]
            for at in offered:
                lines.append(f'tool_{at}: "{{\\"name\\":\\"{tools[at].name}\\",\\"parameters\\":" arguments_{at} "}}"')
                lines.append(f"arguments_{at}: {embedded(schemas[at])}")
        return Rules("\n".join([f"start: {' | '.join(starts)}", *lines]), (*schemas, *others), "these tools")

    def reader(self, options: GenerationOptions) -> AnswerReader:
        """Reads one answer."""
        return JsonReader(options)


def written(message: Message) -> str:
    """A message as text: calls as the model writes them, a result in a fence."""
    if message["role"] == "tool":
        return RESULT.format(message["content"])
    calls = [each["function"] for each in message.get("tool_calls", ())]
    if not calls:
        return str(message["content"])
    text = compact([{"name": call["name"], "parameters": call["arguments"]} for call in calls])
    return f"{message['content']}\n{text}" if message["content"] else text


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments. Arguments that it does not name are taken only where it says so.

    Raises:
        InputError: it cannot be followed.
    """
    schema = {"type": "object", **tool.parameters}
    try:
        check_schema(schema)
    except InputError as error:
        raise InputError(f"tool {tool.name}: {error}", field="tools", value=tool.name) from None
    open_ones = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}
    return schema if open_ones & set(schema) else {**schema, "additionalProperties": False}
