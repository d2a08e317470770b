"""Which points of a large space are tried, and which of them are measured on more tokens: Optuna's successive halving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import optuna

FACTOR = 3  # a third goes on, with three times as many tokens
MIN_TOKENS = 256  # fewer say too little of a point


def rungs(tokens: int, points: int) -> list[int]:
    """How many tokens points are measured on, round after round; the last round has all of them."""
    rounds = max(1, round(math.log(max(1, points), FACTOR)))
    steps = [tokens // FACTOR**step for step in range(rounds, 0, -1)]
    return [step for step in steps if step >= MIN_TOKENS] + [tokens]


class Halving:
    """Chooses points, and after each round those that go on. The same values give the same choice."""

    def __init__(self, count: int, budget: int, first: int) -> None:
        """Choose `budget` of `count` points; the first round measures them on `first` tokens."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        grid = {"point": list(range(count))}
        sampler = optuna.samplers.GridSampler(grid, seed=0)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=FACTOR)
        study = optuna.create_study(direction="minimize", sampler=sampler, pruner=pruner)
        self._trials: dict[int, optuna.Trial] = {}
        for _ in range(min(budget, count)):
            trial = study.ask()
            self._trials[trial.suggest_int("point", 0, count - 1)] = trial

    @property
    def chosen(self) -> Sequence[int]:
        """The points that are tried."""
        return list(self._trials)

    def survivors(self, values: Mapping[int, float], tokens: int) -> list[int]:
        """The points that are measured on more tokens.

        Args:
            values: what is minimized, of every point of this round.
            tokens: how many tokens they were measured on.
        """
        going_on = []
        for point, trial in self._trials.items():
            if point in values:
                trial.report(values[point], tokens)
                if not trial.should_prune():
                    going_on.append(point)
        return going_on
