"""The knapsack against trying everything, and the recipe that comes of it."""

from __future__ import annotations

import itertools
import random

import pytest

from gemma_edge.quantize.mixed import budget
from gemma_edge.quantize.mixed.budget import Option, as_recipe, solve
from gemma_edge.quantize.recipe import INT8_ROW, QuantConfig

CONFIGS = [QuantConfig(4, 0), QuantConfig(4, 128), QuantConfig(4, 32), INT8_ROW]


def random_options(seed: int, *, step: int = 1) -> dict[str, list[Option]]:
    """Six weights; errors fall with the cost by and large, not always."""
    draw = random.Random(seed)
    return {
        f"w{i}": [
            Option(config, step * draw.randint(10 * k + 1, 10 * k + 15), draw.random() * 4.0**-k)
            for k, config in enumerate(CONFIGS)
        ]
        for i in range(6)
    }


def totals(chosen: dict[str, Option]) -> tuple[int, float]:
    return sum(option.cost for option in chosen.values()), sum(option.error for option in chosen.values())


def bounds(options: dict[str, list[Option]]) -> tuple[int, int]:
    costs = [[option.cost for option in some] for some in options.values()]
    return sum(map(min, costs)), sum(map(max, costs))


def best_of_all(options: dict[str, list[Option]], limit: int) -> float:
    return min(
        sum(option.error for option in found)
        for found in itertools.product(*options.values())
        if sum(option.cost for option in found) <= limit
    )


@pytest.mark.parametrize("step", [1, 4096])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_better_within_the_budget(seed: int, step: int) -> None:
    options = random_options(seed, step=step)
    low, high = bounds(options)
    for limit in {low, low + 1, (2 * low + high) // 3, (low + high) // 2, high - 1, high, 2 * high}:
        cost, error = totals(solve(options, limit))
        assert cost <= limit
        assert error == pytest.approx(best_of_all(options, limit), rel=1e-12)


def test_a_larger_budget_is_never_worse() -> None:
    options = random_options(7)
    low, high = bounds(options)
    errors = [totals(solve(options, limit))[1] for limit in range(low, high + 1)]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]


def test_coarse_steps_keep_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes without a common divisor are rounded up, so that a large model costs no more time than another."""
    monkeypatch.setattr(budget, "MAX_STEPS", 40)
    options = random_options(3, step=1009)
    low, high = bounds(options)
    for limit in range(low, high, (high - low) // 7):
        cost, error = totals(solve(options, limit))
        assert cost <= limit
        # each weight rounds up by less than a step: the exact solution of a budget that much smaller is still within reach
        slack = len(options) * -(-(high - low) // 40)
        assert error <= best_of_all(options, max(low, limit - slack)) + 1e-12


def test_less_than_the_cheapest_options_is_refused() -> None:
    options = random_options(0)
    with pytest.raises(ValueError, match="less than the cheapest"):
        solve(options, bounds(options)[0] - 1)


def test_every_weight_gets_its_own_integers_by_few_rules() -> None:
    chosen = {"model.embed_tokens": (INT8_ROW, "rtn")}
    for layer in range(12):
        chosen[f"model.layers.{layer}.mlp.down_proj"] = (CONFIGS[layer % 3], "gptq")
        chosen[f"model.layers.{layer}.self_attn.q_proj"] = (INT8_ROW, "rtn") if layer == 1 else (CONFIGS[1], "gptq")
    recipe = as_recipe("mixed", chosen)
    for weight, (config, method) in chosen.items():
        assert recipe.rule_for(weight).config == config and recipe.rule_for(weight).method == method
    assert len(recipe.rules) == 1 + 3 + 2
