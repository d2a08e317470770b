"""FunctionGemma: it has tokens of its own for tools, and its chat template writes them.

Source: ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices. A call is
`<start_function_call>call:weather{city:<escape>Rome<escape>}<end_function_call>`; several follow one another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.reading import parse_json
from gemma_edge.runtimes.generation.constrain import Rules
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.tools.form import MAX_CALLS, AnswerReader, Message, text_rule
from gemma_edge.runtimes.tools.function_grammar import CALL, CALL_END, ESCAPE, arguments_rules
from gemma_edge.runtimes.tools.tool import AUTO, NONE, REQUIRED, CallPart, Tool, compact
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

TEXT = rf"/(.|\n)*/ & ~/[ \t\n]*{CALL}(.|\n)*/"
BARE = re.compile(r"[^,\]}]*")  # a number, true, false or null


class FunctionReader(AnswerReader):
    """Reads calls between their tokens."""

    openings = (CALL,)

    def scan(self) -> Sequence[CallPart]:
        """The parts of calls in `_pending`, which are taken out of it: a call comes as a whole."""
        parts = []
        while (end := self._pending.find(CALL_END)) >= 0:
            written = self._pending[:end].partition(CALL)[2]
            self._pending = self._pending[end + len(CALL_END) :]
            name, brace, rest = written.removeprefix("call:").partition("{")
            parts += [self.begin_call(name), self.go_on(compact(Values(brace + rest).read()))]
        return parts


class Values:
    """Reads what a call holds: JSON, but keys are bare and texts stand between two ESCAPE."""

    def __init__(self, text: str) -> None:
        """Begin at the beginning."""
        self._text, self._at = text, 0

    def read(self) -> Any:
        """The next value.

        Raises:
            ValueError: there is none.
        """
        if self._take(ESCAPE):
            end = self._text.index(ESCAPE, self._at)
            text, self._at = self._text[self._at : end], end + len(ESCAPE)
            return text
        if self._take("["):
            return self._items("]", self.read)
        if self._take("{"):
            return dict(self._items("}", self._member))
        bare = BARE.match(self._text, self._at)
        assert bare is not None
        self._at = bare.end()
        return json.loads(bare[0])

    def _member(self) -> tuple[str, Any]:
        end = self._text.index(":", self._at)
        key, self._at = self._text[self._at : end], end + 1
        return key, self.read()

    def _items(self, end: str, read: Any) -> list[Any]:
        items: list[Any] = []
        while not self._take(end):
            if items and not self._take(","):
                raise ValueError(f"no {end} in {self._text}")
            items.append(read())
        return items

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found


class FunctionGemma:
    """The form of a Gemma whose chat template brings tools."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer of the bundle."""
        self._tokenizer = tokenizer

    def render(self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """The conversation as text; the template is given calls, results and tools as they are."""
        offered = [{"type": "function", "function": tool.as_json()} for tool in tools]
        return template.render([_message(message) for message in messages], tools=offered or None)

    def rules(self, options: GenerationOptions) -> Rules:
        """The grammar: text, or calls one after the other."""
        for token in (CALL, CALL_END, ESCAPE):
            id = self._tokenizer.id_of(token)
            if id is None or self._tokenizer.decode([id]) != token:
                raise InputError(
                    f"the bundle's chat template writes {token}, which is no token of its tokenizer", field="tools"
                )
        choice = options.tool_choice
        name, line, schemas = text_rule(options, TEXT)
        starts, lines = [name] if choice in (AUTO, NONE) else [], [line]
        if choice != NONE:
            offered = [tool for tool in options.tools if choice in (AUTO, REQUIRED, tool.name)]
            several = options.parallel_calls and choice in (AUTO, REQUIRED)
            starts.append(f"call{{1,{MAX_CALLS}}}" if several else "call")
            names = " | ".join(f"tool_{at}" for at in range(len(offered)))
            lines.append(f"call: {CALL} ({names}) {CALL_END}")
            for at, tool in enumerate(offered):
                rule, more = arguments_rules(tool, f"t{at}")
                lines += [f"tool_{at}: {json.dumps(f'call:{tool.name}')} {rule}", *more]
        source = "\n".join([f"start: {' | '.join(starts)}", *lines])
        return Rules(source, schemas, "these tools", ends=(ESCAPE,), quoted=False)

    def reader(self, options: GenerationOptions) -> AnswerReader:
        """Reads one answer."""
        return FunctionReader(options)


def _message(message: Message) -> Message:
    """A message as the template takes it: a result is an object with the tool's name."""
    if message["role"] != "tool":
        return message
    try:
        result = parse_json(message["content"].encode("utf-8", "replace"))
    except ValueError:
        result = message["content"]
    response = result if isinstance(result, dict) else {"result": result}
    return {"role": "tool", "name": message["name"], "content": {"name": message["name"], "response": response}}
