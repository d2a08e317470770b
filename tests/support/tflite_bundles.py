"""Bundles of the two TFLite backends without the pipeline around them, texts to feed them, and what they should say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gemma_edge.export.backend import exporter
from gemma_edge.export.tflite.check import TFLite
from gemma_edge.model.checkpoint import weight_shapes
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.recipe import Recipe
from support.lowered import lower_bundle

CHUNK = 16  # prefill signatures of 16 and 2 tokens; a ring of 8 + 15 slots in local layers
UNEVEN = [7, 3, 1, 7, 2, *[1] * 12, 5, 6, 30, 9]  # 82 tokens, the 30 in several calls; chunks begin at any slot


def make_bundle(
    folder: Path, out: Path, recipe: Recipe, context: int, chunk: int = CHUNK, *, name: str = "tflite", pinned: int = 0
) -> tuple[QuantizedCheckpoint, Path]:
    """Quantize and lower a checkpoint; the bundle lies in `out`."""
    return lower_bundle(exporter(name), folder, out, recipe, context, chunk, pinned=pinned)


def reference(quantized: QuantizedCheckpoint, ids: list[int], context: int) -> torch.Tensor:
    """Logits (T, V) of the same integers in torch, with float activations."""
    model, cache = quantized.load(), RingCache(quantized.config, context=context, chunk=CHUNK)
    with torch.no_grad():
        rows = [
            model(torch.tensor([ids[start : start + CHUNK]]), torch.tensor([start]), cache)[0]
            for start in range(0, len(ids), CHUNK)
        ]
    return torch.cat(rows)


def assert_holds_integers(path: Path, quantized: QuantizedCheckpoint, float_scales: bool) -> list[tuple[str, str]]:
    """Every weight that `decode` reads is the checkpoint's, codes and scales, bit for bit; (operator, weight) of each.

    Args:
        float_scales: scales that do not lie in the weight's own tensor are float32, else float16.
    """
    found, seen = TFLite(path), []
    for use in found.uses(found.subgraph("decode")):
        name = use.weight.name.decode()
        stored = quantized.quantized(name, 0, weight_shapes(quantized.config)[name][0])
        raw = np.frombuffer(found.content(use.weight), np.int8)
        if stored.config.bits == 4:  # two's complement, the even column in the low nibble
            raw = np.stack([raw << 4 >> 4, raw >> 4], axis=1)
        assert np.array_equal(raw.reshape(stored.codes.shape), stored.codes.numpy()), name
        if use.scales is None:
            scale = use.weight.quantization.scale
        else:
            scale = np.frombuffer(found.content(use.scales), np.float32 if float_scales else np.float16)
        assert np.array_equal(scale.reshape(stored.scale.shape), stored.scale.float().numpy()), name
        seen.append((use.operator, name))
    return seen
