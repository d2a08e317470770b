"""From logits to one token: repetition penalty, temperature, top-k, top-p and min-p, in that order, as transformers does.

Made for a vocabulary of 256,000: only the tokens that stay are sorted, never all of them. Source of the semantics:
transformers/generation/logits_process.py; tests/runtimes/generation/test_sampling.py compares with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_edge.errors import InputError
from gemma_edge.logits import Logits

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-6, 1e6  # logits / temperature must stay finite in float32
_MIN_PENALTY, _MAX_PENALTY = 1e-6, 1e6  # logits / penalty and logits * penalty, too


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the default takes the most likely one."""

    temperature: float = 0.0  # 0: greedy; top_k, top_p and min_p then have no effect
    top_k: int = 0  # the number of most likely tokens that are kept; 0: off
    top_p: float = 1.0  # the fewest most likely tokens whose probabilities sum to this are kept; 1: off
    min_p: float = 0.0  # tokens at least this many times as likely as the most likely one are kept; 0: off
    repetition_penalty: float = 1.0  # above 1 makes tokens of the context less likely, greedy or not; 1: off
    seed: int | None = None  # the seed of the random numbers; None: different every time

    def __post_init__(self) -> None:
        """Raises InputError for a number that no filter can take."""
        # Each condition says what is allowed, so NaN is refused too.
        conditions = (
            (
                "temperature",
                self.temperature == 0 or _MIN_TEMPERATURE <= self.temperature <= _MAX_TEMPERATURE,
                f"is neither 0, which is greedy, nor between {_MIN_TEMPERATURE} and {_MAX_TEMPERATURE:.0f}",
            ),
            ("top_k", self.top_k >= 0, "is below 0; 0 keeps every token"),
            ("top_p", 0 < self.top_p <= 1, "is not above 0 and at most 1; 1 keeps every token"),
            ("min_p", 0 <= self.min_p <= 1, "is not between 0 and 1; 0 keeps every token"),
            (
                "repetition_penalty",
                _MIN_PENALTY <= self.repetition_penalty <= _MAX_PENALTY,
                f"is not between {_MIN_PENALTY} and {_MAX_PENALTY:.0f}; 1 is off",
            ),
            ("seed", self.seed is None or self.seed >= 0, "is below 0"),
        )
        for name, allowed, problem in conditions:
            if not allowed:
                value = getattr(self, name)
                raise InputError(f"`{name}` {value} {problem}", field=name, value=value)


class Sampler:
    """Chooses tokens; remembers which ones the context holds, for the repetition penalty."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._rng = np.random.default_rng(params.seed)
        self._seen: set[int] = set()

    def observe(self, ids: Iterable[int]) -> None:
        """Note the tokens that were added to the context."""
        if self.params.repetition_penalty != 1:
            self._seen.update(ids)

    def forget(self) -> None:
        """Note that the context is empty again; the random numbers go on."""
        self._seen.clear()

    def sample(self, logits: Logits) -> int:
        """Choose the next token.

        Args:
            logits: (V,), left as they are.

        Raises:
            InputError: the logits hold NaN or infinity, so the bundle is damaged.
        """
        scores = self._penalized(logits)
        best = int(scores.argmax())
        # argmax and max return the first NaN if there is one
        if not math.isfinite(scores[best]):
            raise InputError("the bundle computes logits that are not finite numbers; its weights are damaged")
        if self.params.temperature == 0:
            return best
        ids, probabilities = self._kept(scores)
        edges = probabilities.cumsum()
        return int(ids[min(np.searchsorted(edges, self._rng.random() * edges[-1], side="right"), len(ids) - 1)])

    def distribution(self, logits: Logits) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """What `sample` draws from at a temperature above 0.

        Args:
            logits: (V,).

        Returns:
            ids: (N,), the tokens that pass every filter.
            probabilities: (N,), of these tokens, summing to 1.
        """
        return self._kept(self._penalized(logits))

    def _penalized(self, logits: Logits) -> Logits:
        if not self._seen:
            return logits
        seen = np.fromiter(self._seen, np.intp, len(self._seen))
        scores = logits.copy()
        old = scores[seen]
        penalty = np.float32(self.params.repetition_penalty)
        scores[seen] = np.where(old < 0, old * penalty, old / penalty)
        return scores

    def _kept(self, scores: Logits) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        params = self.params
        scores = scores / np.float32(params.temperature)
        ids = _top_k(scores, params.top_k) if 0 < params.top_k < len(scores) else np.arange(len(scores))
        if len(ids) < len(scores):
            scores = scores[ids]
        weights = np.exp(scores - scores.max())  # float32, as transformers; sums are float64
        if params.top_p < 1:
            kept = _top_p(weights, params.top_p)
            ids, weights = ids[kept], weights[kept]
        if params.min_p > 0:
            kept = np.flatnonzero(weights >= params.min_p * weights.max())
            ids, weights = ids[kept], weights[kept]
        return ids, weights / weights.sum(dtype=np.float64)


def _top_k(scores: Logits, top_k: int) -> NDArray[np.intp]:
    """Indices of the `top_k` largest scores and of scores equal to the smallest of them, as transformers does."""
    size = len(scores) // (4 * top_k)
    if size > 1:
        # The k-th largest score >= the k-th largest of the blocks' maxima, for those are k scores that reach it.
        maxima = scores[: 4 * top_k * size].reshape(-1, size).max(axis=1)  # (4 top_k,)
        near = np.flatnonzero(scores >= np.partition(maxima, -top_k)[-top_k])
    else:
        near = np.arange(len(scores))
    candidates = scores[near]
    return near[np.flatnonzero(candidates >= np.partition(candidates, -top_k)[-top_k])]


def _top_p(weights: Logits, top_p: float) -> NDArray[np.intp]:
    """Indices of the fewest largest weights whose sum reaches `top_p` of the whole, the largest first."""
    total = weights.sum(dtype=np.float64)
    # Less than V x this, so less than (1 - top_p) of the whole, is left out here: only what is near gets sorted.
    near = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    near = near[np.argsort(-weights[near], kind="stable")]
    reached = weights[near].cumsum(dtype=np.float64)
    return near[: np.searchsorted(reached, top_p * total) + 1]
