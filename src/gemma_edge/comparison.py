"""Compares the logits of two models over the same tokens: KL, same top token, perplexity. The gate and gemma-eval use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.logits import Logits

# ROWS: how many positions' distributions are in memory at once.
ROWS = 16


@dataclass
class Comparison:
    """Sums over the positions compared so far, and extremes."""

    tokens: int = 0  # positions
    kl: float = 0.0  # nats
    same_top1: int = 0  # positions where both find the same token the most likely
    nll: float = 0.0  # nats, of the candidate
    nll_reference: float = 0.0  # nats
    max_difference: float = 0.0  # of a logit
    low: float = float("inf")  # the reference's smallest logit
    high: float = float("-inf")  # the reference's largest logit

    def add(self, candidate: Logits, expected: Logits, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Compare a candidate's logits with the reference's.

        Args:
            candidate, expected: (T, V) logits of the candidate and of the reference.
            targets: (T,) the tokens that follow in the text.

        Returns:
            (T,) the KL divergence at each position, reference || candidate, in nats.
        """
        kl = np.empty(len(candidate))
        for start in range(0, len(candidate), ROWS):
            q, p = candidate[start : start + ROWS], expected[start : start + ROWS]
            # np.maximum, because max would lose a NaN
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
        """The means over all positions, and the extremes."""
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
    """The logarithm of the softmax over the last axis, in float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    out: Logits = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def negative_log_likelihood(logits: Logits, targets: NDArray[np.int64]) -> float:
    """The sum over positions of -log p(target), in nats.

    Args:
        logits: (T, V).
        targets: (T,) the tokens that follow in the text.
    """
    total = 0.0
    for start in range(0, len(logits), ROWS):
        log_p, target = log_softmax(logits[start : start + ROWS]), targets[start : start + ROWS]
        total -= float(log_p[np.arange(len(target)), target].sum())
    return total
