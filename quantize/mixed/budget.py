"""Which integers every weight gets under a budget of bytes: a knapsack in which each weight takes exactly one of its options.

It is solved exactly, by dynamic programming over bytes. The caller says what an option costs, sensitivity.py what error it makes;
the errors of different weights add up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_edge.quantize.recipe import QuantConfig, QuantRule, Recipe

# MAX_STEPS: number of steps into which the budget is divided at most. The sizes of weights have a large common divisor, so few
# models need more steps. Where one does, its sizes are rounded up to larger steps: the budget is kept, and up to one step per
# weight stays unused.
MAX_STEPS = 1 << 18
LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Option:
    """One thing that a weight can become."""

    config: QuantConfig
    cost: int  # bytes
    error: float  # nats per token


def solve(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option for every weight, with the least total error of all that cost at most `budget` bytes together.

    Raises:
        ValueError: even the cheapest options cost more.
    """
    cheapest = {name: min(option.cost for option in some) for name, some in options.items()}
    extras = {name: [option.cost - cheapest[name] for option in some] for name, some in options.items()}
    largest = sum(map(max, extras.values()))  # bytes
    spare = min(budget - sum(cheapest.values()), largest)
    if spare < 0:
        raise ValueError(f"{budget} bytes are less than the cheapest options take: {sum(cheapest.values())}")
    step = max(math.gcd(*(extra for some in extras.values() for extra in some)), -(-largest // MAX_STEPS), 1)
    least = np.zeros(spare // step + 1)  # least error of the weights so far, by the steps that they may take
    taken: dict[str, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}
    for name, some in options.items():
        best, choice = np.full_like(least, np.inf), np.zeros(len(least), np.uint8)
        for i, (option, extra) in enumerate(zip(some, extras[name], strict=True)):
            steps = -(-extra // step)
            if steps >= len(least):
                continue
            error = least[: len(least) - steps] + option.error
            better = error < best[steps:]
            best[steps:][better], choice[steps:][better] = error[better], i
        least, taken[name] = best, choice
    left = len(least) - 1
    chosen: dict[str, Option] = {}
    for name in reversed(list(options)):
        i = int(taken[name][left])
        chosen[name] = options[name][i]
        left -= -(-extras[name][i] // step)
    return {name: chosen[name] for name in options}


def as_recipe(name: str, chosen: Mapping[str, tuple[QuantConfig, str]]) -> Recipe:
    """A recipe from the configuration and method of every weight. Weights that differ only in their layer share a rule."""
    layers: dict[tuple[str, QuantConfig, str], list[str]] = {}
    for weight, (config, method) in chosen.items():
        layer = LAYER.search(weight)
        kind = LAYER.sub(".layers.N.", weight)
        layers.setdefault((kind, config, method), []).append(layer[1] if layer else "")
    rules = [
        QuantRule(re.escape(kind).replace("N", f"({'|'.join(numbers)})"), config, method)
        for (kind, config, method), numbers in layers.items()
    ]
    return Recipe(name, tuple(rules))
