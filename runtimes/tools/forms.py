"""Which form of tool calling a bundle takes: its chat template tells."""

from __future__ import annotations

from gemma_edge.runtimes.tools.form import ToolForm
from gemma_edge.runtimes.tools.json_calls import JsonCalls
from gemma_edge.text.chat import ChatTemplate


def form_of(template: ChatTemplate) -> ToolForm:
    """The form of the bundle that has this chat template."""
    return JsonCalls()
