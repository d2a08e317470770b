"""Two models' logits over the same tokens: KL, same top token, perplexity. The gate and gemma-eval both count with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.logits import Logits

ROWS = 16  # positions whose distributions are in memory at once


@dataclass
class Comparison:
    """Sums over positions."""

    tokens: int = 0
    kl: float = 0.0
    same_top1: int = 0
    nll: float = 0.0
    nll_reference: float = 0.0
    max_difference: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, found: Logits, expected: Logits, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Compare logits (T, V) with a reference's.

        Args:
            found, expected: (T, V) of the candidate and of the reference.
            targets: (T,) the tokens that really followed.

        Returns:
            (T,) the KL divergence at each position, reference || candidate, in nats.
        """
        kl = np.empty(len(found))
        for start in range(0, len(found), ROWS):
            q, p = found[start : start + ROWS], expected[start : start + ROWS]
            # np.maximum and not max: a NaN must stay
            self.max_difference = float(np.maximum(self.max_difference, np.abs(q - p).max()))
            self.low, self.high = min(self.low, float(p.min())), max(self.high, float(p.max()))
            self.same_top1 += int((q.argmax(-1) == p.argmax(-1)).sum())
            log_q, log_p = log_softmax(q), log_softmax(p)
            kl[start : start + ROWS] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
            rows, target = np.arange(len(q)), targets[start : start + ROWS]
            self.nll -= float(log_q[rows, target].sum())
            self.nll_reference -= float(log_p[rows, target].sum())
            self.tokens += len(q)
        self.kl += float(kl.sum())
        return kl

    def to_json(self) -> dict[str, Any]:
        """Means over the positions."""
        ppl, ppl_reference = (float(np.exp(nll / self.tokens)) for nll in (self.nll, self.nll_reference))
        return {
            "tokens": self.tokens,
            "kl": float(np.maximum(self.kl / self.tokens, 0.0)),
            "top1": self.same_top1 / self.tokens,
            "ppl": ppl,
            "ppl_reference": ppl_reference,
            "ppl_change": ppl / ppl_reference - 1.0,
            "max_abs_logit_difference": self.max_difference,
            "logit_range": self.high - self.low,
        }


def log_softmax(logits: Logits) -> Logits:
    """Over the last axis, in float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    out: Logits = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def negative_log_likelihood(logits: Logits, targets: NDArray[np.int64]) -> float:
    """Sum over positions of -log p(target), for logits (T, V) and targets (T,)."""
    total = 0.0
    for start in range(0, len(logits), ROWS):
        log_p, target = log_softmax(logits[start : start + ROWS]), targets[start : start + ROWS]
        total -= float(log_p[np.arange(len(target)), target].sum())
    return total
