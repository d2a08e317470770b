"""gemma-edge: export Gemma to phones, prove the result equal, and run it.

What stands in `__all__` is the public API; docs/python-api.md shows it. Everything is resolved when it is first used, so that
`import gemma_edge` loads neither PyTorch nor a runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gemma_edge.errors import InputError
from gemma_edge.public import evaluate, export, inspect, load, plan, quantize, sweep

if TYPE_CHECKING:
    from gemma_edge.evaluate.options import EvaluationOptions as EvaluationOptions
    from gemma_edge.export.options import ExportOptions as ExportOptions
    from gemma_edge.quantize.options import CalibrationText as CalibrationText
    from gemma_edge.quantize.options import QuantizeOptions as QuantizeOptions
    from gemma_edge.quantize.recipe import Recipe as Recipe
    from gemma_edge.runtimes.engines.adapter import Adapter as Adapter
    from gemma_edge.runtimes.generation.generate import GenerationOptions as GenerationOptions
    from gemma_edge.runtimes.generation.sampling import SamplingParams as SamplingParams
    from gemma_edge.runtimes.generation.session import Session as Session
    from gemma_edge.runtimes.guard import Guard as Guard
    from gemma_edge.runtimes.tools.tool import Call as Call
    from gemma_edge.runtimes.tools.tool import Tool as Tool
    from gemma_edge.sweep.options import SweepOptions as SweepOptions

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Call",
    "CalibrationText",
    "EvaluationOptions",
    "ExportOptions",
    "GenerationOptions",
    "Guard",
    "InputError",
    "QuantizeOptions",
    "Recipe",
    "SamplingParams",
    "Session",
    "Tool",
    "SweepOptions",
    "__version__",
    "evaluate",
    "export",
    "inspect",
    "load",
    "plan",
    "quantize",
    "sweep",
]

# class -> the module that defines it
_CLASSES = {
    "Adapter": "gemma_edge.runtimes.engines.adapter",
    "Call": "gemma_edge.runtimes.tools.tool",
    "CalibrationText": "gemma_edge.quantize.options",
    "EvaluationOptions": "gemma_edge.evaluate.options",
    "ExportOptions": "gemma_edge.export.options",
    "GenerationOptions": "gemma_edge.runtimes.generation.generate",
    "Guard": "gemma_edge.runtimes.guard",
    "QuantizeOptions": "gemma_edge.quantize.options",
    "Recipe": "gemma_edge.quantize.recipe",
    "SamplingParams": "gemma_edge.runtimes.generation.sampling",
    "Session": "gemma_edge.runtimes.generation.session",
    "Tool": "gemma_edge.runtimes.tools.tool",
    "SweepOptions": "gemma_edge.sweep.options",
}


def __getattr__(name: str) -> Any:
    """Import the class behind a public name when it is first used."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_CLASSES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
