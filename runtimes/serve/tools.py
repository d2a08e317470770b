"""The tools that a request offers to the model. Source: OpenAI's API reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.runtimes.serve.fields import get
from gemma_edge.runtimes.serve.refused import shown
from gemma_edge.runtimes.tools.tool import AUTO, CHOICES, NO_PARAMETERS, Tool

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 1 << 17  # of the JSON of all of them


def tools_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `GenerationOptions` that are about tools.

    Raises:
        InputError: a tool or the choice is not as OpenAI's API says, or there are too many tools.
    """
    given = get(body, "tools", list, [])
    if len(given) > MAX_TOOLS or len(json.dumps(given)) > MAX_TOOLS_CHARS:
        limit = f"at most {MAX_TOOLS} tools with {MAX_TOOLS_CHARS} characters of JSON"
        raise InputError(f"tools are too many or too long; give {limit}", field="tools")
    tools = tuple(map(_tool, given))
    choice = _choice(body.get("tool_choice"), bool(tools))
    return {"tools": tools, "tool_choice": choice, "parallel_calls": get(body, "parallel_tool_calls", bool, True)}


def _tool(given: Any) -> Tool:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or given.get("type") != "function":
        raise InputError(
            f"the tool {shown(given)} is not of type function with an object in its field function",
            field="tools",
            value=given,
        )
    name, description = get(function, "name", str, ""), get(function, "description", str, "")
    return Tool(name, description, get(function, "parameters", dict, NO_PARAMETERS))


def _choice(given: Any, tools: bool) -> str:
    if given is None or (given in (AUTO, "none") and not tools):
        return AUTO
    if isinstance(given, dict) and given.get("type") == "function" and isinstance(given.get("function"), dict):
        return str(given["function"].get("name"))
    if given not in CHOICES:
        raise InputError(
            f"tool_choice {shown(given)} is neither {', '.join(CHOICES)} nor a function's name",
            field="tool_choice",
            value=given,
        )
    return str(given)
