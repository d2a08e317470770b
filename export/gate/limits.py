"""How far the gate looks, and what a bundle must reach to be published. Imports no torch, so that a quick --help can list it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gemma_edge.bundle.backends import bits_of


@dataclass(frozen=True)
class Limits:
    """What a bundle must reach to be published."""

    kl: float  # nats per token, original || bundle
    top1: float  # fraction of positions with the same most likely token
    ppl_change: float  # relative change of the perplexity
    lowering: float  # max |logit difference| to the same integers, as a fraction of the logits' range
    lowering_kl: float  # nats per token, the same integers || bundle


# By the fewest bits of any weight, or of the KV cache. The 4-bit figures leave room for data-free rounding of small models;
# docs/measure/benchmarks.md has what calibrated bundles really reach. `lowering` and `lowering_kl` leave room for int8
# activations: with Gemma 3 270M, whose activations have outliers, 0.059 and 0.017; the demo's are 0.007 and 0.0002.
LIMITS = {
    4: Limits(kl=0.5, top1=0.6, ppl_change=0.5, lowering=0.1, lowering_kl=0.05),
    8: Limits(kl=0.03, top1=0.9, ppl_change=0.05, lowering=0.1, lowering_kl=0.03),
    16: Limits(kl=1e-4, top1=0.99, ppl_change=0.005, lowering=1e-3, lowering_kl=1e-4),
    32: Limits(kl=1e-5, top1=0.995, ppl_change=0.001, lowering=1e-3, lowering_kl=1e-5),
}


def limits_for(bits: Iterable[int], kv_dtype: str) -> Limits:
    """What a bundle must reach, from the bits of its weights and the element type of its KV cache."""
    return LIMITS[min(*bits, bits_of(kv_dtype))]


def failures(result: dict[str, Any], limits: Limits) -> list[str]:
    """What is out of bounds, each as `figure: value > limit`."""
    lowering = result["lowering"]
    span = lowering["logit_range"] or 1e-9
    checks: dict[str, tuple[float, float]] = {}
    # past the context on its own, so that a window that wraps wrongly cannot hide among the positions before it
    for part in ("quality", "quality_past_context"):
        quality = result[part]
        if quality is not None:
            checks |= {
                f"{part} kl": (quality["kl"], limits.kl),
                f"{part} 1 - top1": (1.0 - quality["top1"], 1.0 - limits.top1),
                f"{part} ppl_change": (quality["ppl_change"], limits.ppl_change),
            }
    checks |= {
        "lowering": (lowering["max_abs_logit_difference"] / span, limits.lowering),
        "lowering kl": (lowering["kl"], limits.lowering_kl),
        "generation_difference": (result["generation_difference"] / span, limits.lowering),
    }
    # written so that NaN fails
    return [f"{name}: {value:.4g} > {limit:.4g}" for name, (value, limit) in checks.items() if not value <= limit]


PAST_WRAP = 64  # tokens fed beyond the point where the first key has left every window
LOWERING_TEXT = 128  # positions compared with the same integers
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Level:
    """How far the gate looks."""

    min_tokens: int  # fed even if the context is shorter
    max_tokens: int  # fed even if the context is longer
    text: int  # positions compared from the start; all those past the end of the context are compared, too

    def tokens(self, context: int) -> int:
        """How many tokens are fed."""
        return min(max(context + PAST_WRAP, self.min_tokens), self.max_tokens)

    def positions(self, context: int) -> list[int]:
        """Positions that are compared with the original. The last one is not: it has no next token to judge by."""
        return [p for p in range(self.tokens(context) - 1) if p < self.text or p >= context]

    def saved_logits(self, context: int) -> int:
        """How many positions' logits are on disk meanwhile: of the original, and of the same integers in torch."""
        positions = self.positions(context)
        return len(positions) + sum(p < LOWERING_TEXT for p in positions)


LEVELS: dict[str, Level | None] = {
    "quick": Level(min_tokens=0, max_tokens=2304, text=512),
    "full": Level(min_tokens=1024, max_tokens=NO_LIMIT, text=NO_LIMIT),
    "none": None,
}
