"""The gate: a finished bundle, opened in its own runtime, against the original on held-out text and past the window's wrap.

Two comparisons. *Quality*: against the float checkpoint; what quantization costs. *Lowering*: against the very same integers,
dequantized in torch; what the exporter and the runtime add, which is the runtime's int8 activations and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gemma_edge
from gemma_edge.export import reference
from gemma_edge.export.bundle import Manifest
from gemma_edge.model.checkpoint import Weights
from gemma_edge.quantize.store import QuantizedCheckpoint
from gemma_edge.runtimes.base import Logits, Runtime

LEVELS = ("quick", "full", "none")
TEXTS = ("heldout_austen.txt", "heldout_kjv.txt")
QUICK_TOKENS = 2304  # longest sequence of the quick gate
QUICK_TEXT = 512  # positions compared from the start; then those past the wrap
PAST_WRAP = 64  # tokens fed beyond the point where the first key has left every window
ROWS = 32  # positions whose distributions are in memory at once


@dataclass(frozen=True)
class Limits:
    """What a bundle must reach to be published."""

    kl: float  # nats per token, original || bundle
    top1: float  # part of positions with the same most likely token
    ppl_change: float  # relative
    lowering: float  # max |logit difference| to the same integers, as part of the logits' range


# By the fewest bits of any weight. The 4-bit figures leave room for data-free rounding of small models; what calibrated bundles
# really reach is in docs/benchmarks.md.
LIMITS = {
    4: Limits(kl=0.5, top1=0.6, ppl_change=0.5, lowering=0.05),
    8: Limits(kl=0.03, top1=0.9, ppl_change=0.05, lowering=0.05),
    16: Limits(kl=1e-4, top1=0.99, ppl_change=0.005, lowering=1e-3),
    32: Limits(kl=1e-5, top1=0.995, ppl_change=0.001, lowering=1e-3),
}


@dataclass(frozen=True)
class Gate:
    """Which tokens are fed and which positions are compared."""

    level: str
    text: str
    ids: list[int]
    positions: list[int]


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

    def add(self, found: Tensor, expected: Tensor, targets: Tensor) -> None:
        """Compare logits (T, V) with a reference's; `targets` (T,) are the tokens that really followed."""
        for start in range(0, len(found), ROWS):
            q, p = found[start : start + ROWS], expected[start : start + ROWS]
            self.max_difference = max(self.max_difference, float((q - p).abs().max()))
            self.low, self.high = min(self.low, float(p.min())), max(self.high, float(p.max()))
            self.same_top1 += int((q.argmax(-1) == p.argmax(-1)).sum())
            log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
            self.kl += float((log_p.exp() * (log_p - log_q)).sum())
            target = targets[start : start + ROWS, None]
            self.nll -= float(log_q.gather(1, target).sum())
            self.nll_reference -= float(log_p.gather(1, target).sum())
            self.tokens += len(q)

    def to_json(self) -> dict[str, Any]:
        """Means over the positions."""
        ppl, ppl_reference = (float(np.exp(nll / self.tokens)) for nll in (self.nll, self.nll_reference))
        return {
            "tokens": self.tokens,
            "kl": max(self.kl / self.tokens, 0.0),
            "top1": self.same_top1 / self.tokens,
            "ppl": ppl,
            "ppl_reference": ppl_reference,
            "ppl_change": ppl / ppl_reference - 1.0,
            "max_abs_logit_difference": self.max_difference,
            "logit_range": self.high - self.low,
        }


def make_gate(tokenizer: Path | None, vocab_size: int, bos: int, context: int, level: str) -> Gate:
    """Choose the tokens. Quick: up to QUICK_TOKENS, the first QUICK_TEXT positions and those past the wrap compared."""
    wanted = context + PAST_WRAP
    length = min(wanted, QUICK_TOKENS) if level == "quick" else max(wanted, 2 * QUICK_TEXT)
    ids = [bos, *_tokens(tokenizer, vocab_size, length - 1)]
    positions = list(range(len(ids) - 1))
    if level == "quick":
        positions = [p for p in positions if p < QUICK_TEXT or p >= context]
    text = ", ".join(TEXTS) if tokenizer else "random tokens: the model has no tokenizer"
    return Gate(level, text, ids, positions)


def _tokens(tokenizer: Path | None, vocab_size: int, count: int) -> list[int]:
    if tokenizer is None:
        return [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, count)]
    from tokenizers import Tokenizer

    texts = [(resources.files("gemma_edge.export") / "data" / name).read_text(encoding="utf-8") for name in TEXTS]
    # half of each text, so that no book decides alone; encoded in pieces, only as much as is needed
    encoder = Tokenizer.from_file(str(tokenizer))
    halves = [encoder.encode(text[: 8 * count], add_special_tokens=False).ids for text in texts]
    half = count // 2
    return [*halves[0][:half], *halves[1][: count - half]]


def verify(
    bundle: Path,
    original: Weights,
    quantized: QuantizedCheckpoint,
    gate: Gate,
    *,
    backend: str,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Run the gate on a bundle.

    Args:
        bundle: the finished folder.
        original: the float checkpoint.
        quantized: the integers that were lowered.
        gate: from `make_gate`.
        backend: which backend of the bundle.
        progress: called with 1 per layer of the two references and per chunk of the bundle: see `steps`.

    Returns:
        the backend's entry under `verification` in the manifest; `passed` tells.
    """
    ids, cache = torch.tensor(gate.ids), Manifest.load(bundle).cache
    context, chunk = cache.context, cache.prefill_chunk
    hidden = reference.hidden_states(original, ids, context, progress)
    same_integers = reference.hidden_states(quantized, ids[:chunk], context, progress)
    runtime = gemma_edge.load(bundle, backend=backend)  # not earlier: the references and the bundle never share the memory
    generated = _generate(runtime, gate.ids[:chunk])
    quality, lowering, generation = Comparison(), Comparison(), 0.0
    wanted = set(gate.positions)
    for index, rows in enumerate(runtime.score_chunks(gate.ids)):
        start = index * chunk
        inside = [p for p in range(start, start + len(rows)) if p in wanted]
        if inside:
            found = torch.from_numpy(rows[[p - start for p in inside]])
            quality.add(found, reference.logits(original, hidden[inside]), ids[[p + 1 for p in inside]])
        if start == 0 and inside:
            lowering.add(found, reference.logits(quantized, same_integers[inside]), ids[[p + 1 for p in inside]])
            generation = max(float(np.abs(rows[p] - found_row).max()) for p, found_row in generated.items())
        progress(1)
    limits = LIMITS[fewest_bits(quantized)]
    result = {
        "level": gate.level,
        "text": gate.text,
        "fed_tokens": len(gate.ids),
        "past_wrap": len(gate.ids) > context,
        "quality": quality.to_json(),
        "lowering": lowering.to_json(),
        "generation_difference": generation,
        "limits": asdict(limits),
    }
    result["failures"] = failures(result, limits)
    result["passed"] = not result["failures"]
    return result


def steps(layers: int, tokens: int, chunk: int) -> int:
    """How often `verify` reports progress."""
    return 2 * layers + -(-tokens // chunk)


def fewest_bits(checkpoint: QuantizedCheckpoint) -> int:
    """Bits of the coarsest weight; float weights count by how they are stored."""
    return min(
        config.bits if config else 8 * checkpoint.dtype(name).itemsize for name, config in checkpoint.configs.items()
    )


def _generate(runtime: Runtime, ids: list[int]) -> dict[int, Logits]:
    """Logits of the generation graph by position: a prompt, then its last tokens one by one."""
    prompt = max(1, len(ids) - 4)
    found = {prompt - 1: runtime.prefill(ids[:prompt])}
    return found | {position: runtime.decode(ids[position]) for position in range(prompt, len(ids))}


def failures(result: dict[str, Any], limits: Limits) -> list[str]:
    """What is out of bounds, each as `figure: value > limit`."""
    quality, lowering = result["quality"], result["lowering"]
    span = lowering["logit_range"]
    checks = {
        "kl": (quality["kl"], limits.kl),
        "1 - top1": (1.0 - quality["top1"], 1.0 - limits.top1),
        "ppl_change": (quality["ppl_change"], limits.ppl_change),
        "lowering": (lowering["max_abs_logit_difference"] / span, limits.lowering),
        "generation_difference": (result["generation_difference"] / span, limits.lowering),
    }
    # written so that NaN fails
    return [f"{name}: {value:.4g} > {limit:.4g}" for name, (value, limit) in checks.items() if not value <= limit]
