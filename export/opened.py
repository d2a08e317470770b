"""A model that is ready to be exported: the result of `open_model`, which every later stage reads."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_edge.export.plan import Plan
from gemma_edge.export.targets import Target
from gemma_edge.model.checkpoint import Weights
from gemma_edge.quantize.calibration import layerwise
from gemma_edge.quantize.mixed.choose import Mixed
from gemma_edge.quantize.recipe import Recipe


@dataclass(frozen=True)
class Opened:
    """A model that is checked and planned; nothing is written yet."""

    name: str
    source: Weights
    recipe: Recipe
    target: Target
    plans: dict[str, Plan]  # by backend, all with one context
    calibration: layerwise.Calibration | None  # None: no weight's integers depend on text
    choice: Mixed | None  # options that were weighed under a budget
    pythons: dict[str, str]  # by backend, the Python that runs its gate; {} without a gate

    @property
    def context(self) -> int:
        """The context of every backend, in tokens."""
        return next(iter(self.plans.values())).context
