"""How long a calibration takes, from the operations that it needs and the speed of a matrix product timed now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch

from gemma_edge.model.checkpoint import linear_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.calibration.awq import EXPONENTS, SAMPLED_ROWS
from gemma_edge.quantize.calibration.block import gemma_topology
from gemma_edge.quantize.calibration.layerwise import Calibration
from gemma_edge.quantize.calibration.windows import shards
from gemma_edge.quantize.recipe import Recipe

PASSES, REFIT_PASSES = 3, 3  # forward passes of a layer, and those that a refit adds
SEARCH = 5000.0  # floating-point operations of a matrix product that takes as long as the scale search of one weight
OVERHEAD = 1.3  # measured factor for everything else


def estimate_s(config: GemmaConfig, recipe: Recipe, calibration: Calibration, nodes: int = 1) -> float:
    """Roughly how many seconds a whole pass takes on so many machines like this one.

    What is sent between them is not counted.
    """
    flops = sum(_makespan(jobs, nodes) for jobs in _stages(config, recipe, calibration))
    return OVERHEAD * config.num_hidden_layers * flops * _seconds_per_flop()


def _stages(config: GemmaConfig, recipe: Recipe, calibration: Calibration) -> list[list[float]]:
    """The work of one layer: stages that wait for each other, and the operations of each job in them, as layerwise.py cuts it."""
    shapes = {name.split(".", 3)[3]: shape for name, shape in linear_shapes(config, 0).items()}
    weights = sum(rows * columns for rows, columns in shapes.values())
    tokens = [part.numel() for part in shards(calibration.windows)]
    inputs = [shapes[site[0]][1] for site in gemma_topology(config).sites]
    squares = sum(n * n for n in inputs)
    passed = [[2.0 * each * weights for each in tokens] for _ in range(PASSES - 1)]
    observed = [2.0 * each * (weights + squares) for each in tokens]
    folded = [[n**3 / 3 + 4.0 * SAMPLED_ROWS * n**2] * len(EXPONENTS) for n in inputs if recipe.folds]
    factored = [n**3 / 3 for n in inputs]
    product = 2.0 * (1 + 4 * calibration.rounds)
    rounded = [product * rows * columns**2 + SEARCH * rows * columns for rows, columns in shapes.values()]
    refitted = 2.0 * REFIT_PASSES * calibration.refit * sum(tokens) * weights
    return [*passed, observed, *folded, factored, rounded, [refitted]]


def _makespan(jobs: Sequence[float], nodes: int) -> float:
    """When the last job ends if each node that is free takes the largest one left."""
    busy = [0.0] * nodes
    for job in sorted(jobs, reverse=True):
        busy[busy.index(min(busy))] += job
    return max(busy)


@cache
def _seconds_per_flop() -> float:
    x = torch.ones(1024, 2048)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        x @ x.T
        fastest = min(fastest, time.perf_counter() - start)
    return fastest / (2.0 * 1024 * 1024 * 2048)
