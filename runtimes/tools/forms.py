"""Which form of tool calling a bundle takes: its chat template tells."""

from __future__ import annotations

from gemma_edge.runtimes.tools.form import ToolForm
from gemma_edge.runtimes.tools.function_gemma import FunctionGemma
from gemma_edge.runtimes.tools.function_grammar import CALL
from gemma_edge.runtimes.tools.json_calls import JsonCalls
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer


def form_of(template: ChatTemplate, tokenizer: Tokenizer) -> ToolForm:
    """The form of the bundle that has this chat template and this tokenizer."""
    return FunctionGemma(tokenizer) if CALL in template.source else JsonCalls()
