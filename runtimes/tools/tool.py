"""Tools and calls as data. How Gemma reads and writes them is json_calls.py's and function_gemma.py's."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_edge.errors import InputError

# Values of `tool_choice` besides the name of a tool
AUTO, NONE, REQUIRED = CHOICES = ("auto", "none", "required")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""  # what it does and when to call it, for the model
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS)  # a JSON schema of its arguments

    def __post_init__(self) -> None:
        """Raises InputError for a name that cannot be written, or parameters that are not a schema of an object."""
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name) or self.name in CHOICES:
            raise InputError(
                f"a tool cannot be called {self.name!r}; a name has 1 to 64 letters, digits, _ and -, and is not"
                f" {', '.join(CHOICES)}",
                field="tools",
                value=self.name,
            )
        if not isinstance(self.parameters, Mapping) or self.parameters.get("type", "object") != "object":
            raise InputError(f"the parameters of tool {self.name} are not a JSON schema of type object", field="tools")

    def as_json(self) -> dict[str, Any]:
        """The function as OpenAI's API and Gemma's prompts describe it."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


@dataclass(frozen=True)
class Call:
    """A call that the model wrote."""

    name: str  # of the tool
    arguments: dict[str, Any]  # they fit the tool's schema
    id: str  # tells it from all other calls

    def as_json(self) -> dict[str, Any]:
        """The call as a message of a conversation holds it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    @classmethod
    def of_json(cls, call: Mapping[str, Any]) -> Call:
        """The call in a message of a conversation."""
        return cls(call["function"]["name"], call["function"]["arguments"], call["id"])


@dataclass(frozen=True)
class CallPart:
    """A part of a call while it is being written."""

    index: int  # of the call in the answer
    arguments: str = ""  # the next part of the arguments' JSON
    name: str = ""  # of the tool, in the first part only
    id: str = ""  # of the call, in the first part only


def new_id() -> str:
    """An id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def check_tools(tools: Sequence[Tool], choice: str) -> None:
    """Refuse tools of one name, and a choice that is not among them.

    Raises:
        InputError: with both names.
    """
    names = [tool.name for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two tools are called {twice[0]}; give each a name of its own", field="tools", value=twice[0])
    if not tools and choice not in (AUTO, NONE):
        raise InputError(f"`tool_choice` {choice} has no effect without `tools`", field="tool_choice", value=choice)
    if choice not in (*CHOICES, *names):
        raise InputError(field="tool_choice", value=choice, allowed=(*CHOICES, *names))


def compact(value: Any) -> str:
    """JSON without blanks between its parts, as answers are written."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
