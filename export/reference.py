"""The original model as judge, layer by layer: one block of float32 weights in memory at a time, whatever the model's size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.model.checkpoint import FINAL_NORM, TABLE, Weights
from gemma_edge.model.gemma2 import inverse_frequencies, rotary_angles, soft_cap
from gemma_edge.model.kv_cache import RingCache

CHUNK = 512  # tokens a block is applied to at once
HEAD_ROWS = 1024  # rows of the table that are multiplied at once: 9 MB of the 2B model
HEAD_POSITIONS = 192  # positions whose logits are in memory at once: 200 MB with 256,000 tokens


@torch.no_grad()
def hidden_states(
    weights: Weights, ids: Tensor, context: int, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """The normed output of the last block for a sequence.

    Args:
        weights: the model, or its dequantized integers.
        ids: (T,) int64.
        context: window of the global layers, as in the bundle.
        progress: called with 1 after each layer.

    Returns:
        (T, hidden) float32; `logits` turns rows of it into logits.
    """
    config = weights.config
    x = torch.cat([weights.rows(TABLE, int(token), int(token) + 1) for token in ids])  # (T, hidden)
    x = x[None] * config.hidden_size**0.5  # (1, T, hidden)
    inv_freq = inverse_frequencies(config)
    for layer in range(config.num_hidden_layers):
        block = weights.load_layer(layer)
        cache = RingCache(config, context=context, chunk=min(CHUNK, len(ids)), layers=[layer])
        for start in range(0, len(ids), CHUNK):
            chunk = x[:, start : start + CHUNK]  # (1, <= CHUNK, hidden)
            input_pos = torch.tensor([start])
            rope = rotary_angles(inv_freq, input_pos, chunk.shape[1])
            x[:, start : start + CHUNK] = block(chunk, cache, rope, input_pos)
        progress(1)
    scale = 1.0 + weights.vector(FINAL_NORM)
    return torch.nn.functional.rms_norm(x[0], (config.hidden_size,), scale, config.rms_norm_eps)


@torch.no_grad()
def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """(T, hidden) -> soft-capped logits (T, V) float32; the table is read in slices."""
    config = weights.config
    out = torch.empty(len(hidden), config.vocab_size)
    for start in range(0, config.vocab_size, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, config.vocab_size)
        part = hidden @ weights.rows(TABLE, start, stop).T  # (T, <= HEAD_ROWS)
        out[:, start:stop] = soft_cap(
            part, config.final_logit_softcapping
        )  # here: of `out` it would take two more such
    return out


def write_logits(weights: Weights, hidden: Tensor, path: Path) -> None:
    """Logits of (T, hidden) into a file, (T, V) float32, a few positions in memory at a time."""
    with path.open("wb") as file:
        for start in range(0, len(hidden), HEAD_POSITIONS):
            file.write(logits(weights, hidden[start : start + HEAD_POSITIONS]).numpy().data)
