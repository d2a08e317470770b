"""The conversation of a request, in the form that chat templates and tools take. Source: OpenAI's API reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.reading import parse_json
from gemma_edge.runtimes.serve.refused import shown
from gemma_edge.runtimes.tools.form import Message
from gemma_edge.runtimes.tools.tool import Tool, new_id

SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool")
MAX_MESSAGES = 2048


def messages_of(body: Mapping[str, Any], *, takes_system: bool = False, tools: Sequence[Tool] = ()) -> list[Message]:
    """A conversation for the chat template.

    Args:
        body: the request.
        takes_system: whether the template has a turn for the system; else its text is put in front of the user's first turn.
        tools: those of the request. If there are any, earlier calls and results must be theirs.

    Raises:
        InputError: there are no messages, or too many, or one has no role or text, or names a tool that is not there.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages are missing; give a list of at least one", field="messages", value=messages)
    if len(messages) > MAX_MESSAGES:
        raise InputError(f"{len(messages)} messages are too many; give at most {MAX_MESSAGES}", field="messages")
    spoken = [_message(message) for message in messages]
    _name_results(spoken, [tool.name for tool in tools])
    system = [message["content"] for message in takewhile(lambda each: each["role"] in SYSTEM, spoken)]
    spoken = spoken[len(system) :]
    if not spoken:
        raise InputError("messages contain no message of a user", field="messages", value=messages)
    if takes_system:
        return [*([{"role": "system", "content": "\n\n".join(system)}] if system else []), *spoken]
    return [{**spoken[0], "content": "\n\n".join([*system, spoken[0]["content"]])}, *spoken[1:]]


def _message(message: Any) -> Message:
    """A message with its text, which may come in parts, and its calls."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise InputError("a message's role is not one of system, user, assistant and tool", field="messages")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role == "assistant" and content is None:
        content = ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InputError("a message's content is neither text nor a list of text parts", field="messages")
    read: Message = {"role": role, "content": content}
    if role == "assistant" and isinstance(calls, list) and calls:
        read["tool_calls"] = [_call(call) for call in calls]
    if role == "tool":
        read["tool_call_id"] = message.get("tool_call_id")
    return read


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InputError("a tool call has no function", field="messages")
    name, arguments = function.get("name"), function.get("arguments") or "{}"
    if not isinstance(name, str):
        raise InputError("a tool call has no name of a function", field="messages", value=name)
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments.encode("utf-8", "replace"))
        except ValueError:  # an answer that was cut off; the model reads it as it stands
            pass
    return {"id": call.get("id") or new_id(), "type": "function", "function": {"name": name, "arguments": arguments}}


def _name_results(messages: Sequence[Message], tools: Sequence[str]) -> None:
    """Write into each result the name of the tool that it is of.

    Raises:
        InputError: there are tools, and a call or a result belongs to none of them.
    """
    called: dict[Any, str] = {}
    for at, call in _calls(messages):
        name = call["function"]["name"]
        if tools and name not in tools:
            raise InputError(
                f"messages[{at}] calls the tool {shown(name)}, which is not among the tools of the request",
                field="messages",
                value=name,
                allowed=tools,
            )
        called[str(call["id"])] = name
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            id = message.pop("tool_call_id")
            if tools and str(id) not in called:
                raise InputError(
                    f"messages[{at}] is the result of the call {shown(id)}, which no message of the assistant holds",
                    field="messages",
                    value=id,
                )
            message["name"] = called.get(str(id), "")


def _calls(messages: Sequence[Message]) -> Iterator[tuple[int, dict[str, Any]]]:
    for at, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            yield at, call
