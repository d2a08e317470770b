"""Successive halving: rounds with more tokens for fewer points, and the same choice for the same values."""

from __future__ import annotations

import pytest

pytest.importorskip("optuna", reason="optuna is not installed: pip install 'gemma-edge[sweep]'")

from gemma_edge.sweep.halving import FACTOR, MIN_TOKENS, Halving, rungs


@pytest.mark.parametrize(
    ("tokens", "points", "expected"),
    [(9000, 9, [1000, 3000, 9000]), (4096, 30, [455, 1365, 4096]), (300, 30, [300]), (4096, 1, [1365, 4096])],
)
def test_rounds_have_three_times_as_many_tokens_each(tokens: int, points: int, expected: list[int]) -> None:
    assert rungs(tokens, points) == expected
    assert all(step >= MIN_TOKENS for step in expected)


def test_about_a_third_goes_on_and_the_best_is_among_them() -> None:
    halving = Halving(count=40, budget=18, first=1000)
    assert len(set(halving.chosen)) == 18 and max(halving.chosen) < 40
    values = {point: abs(point - 20.5) for point in halving.chosen}
    on = halving.survivors(values, 1000)
    assert min(values, key=lambda point: values[point]) in on
    assert 18 // (2 * FACTOR) <= len(on) <= 18 // 2
    further = halving.survivors({point: values[point] for point in on}, 3000)
    assert min(values, key=lambda point: values[point]) in further and set(further) <= set(on)


def test_the_same_values_give_the_same_choice() -> None:
    one, other = (Halving(count=30, budget=9, first=500) for _ in range(2))
    assert one.chosen == other.chosen
    values = {point: float(point * 7 % 11) for point in one.chosen}
    assert one.survivors(values, 500) == other.survivors(values, 500)
