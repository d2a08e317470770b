"""A model run layer by layer: one block of float32 weights is in memory at a time, whatever the model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.files import replacing
from gemma_edge.model.checkpoint import FINAL_NORM, TABLE, Weights
from gemma_edge.model.gemma import layer_rope
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.model.soft_cap import soft_cap

CHUNK = 512  # tokens to which a block is applied at once
HEAD_ROWS = 1024  # rows of the head that are multiplied at once: 9 MB of the 2B model
HEAD_POSITIONS = 192  # positions whose logits are in memory at once: 200 MB with a vocabulary of 256,000


@torch.no_grad()
def blocks(weights: Weights, sequences: Sequence[Tensor], context: int) -> Iterator[list[Tensor]]:
    """Run sequences through the model, and yield the output of each block.

    Args:
        weights: the model's weights; integers are dequantized.
        sequences: (T,) int64 each; all of them pass a block while its weights are in memory.
        context: window of the global layers, as in the bundle.

    Yields:
        (T, hidden) float32 per sequence; the next block overwrites them.
    """
    config = weights.config
    states = [_embed(weights, ids) for ids in sequences]
    for layer in range(config.num_hidden_layers):
        block = weights.load_layer(layer)
        for x in states:
            cache = RingCache(config, context=context, chunk=min(CHUNK, len(x)), layers=[layer])
            for start in range(0, len(x), CHUNK):
                chunk = x[None, start : start + CHUNK]  # (1, <= CHUNK, hidden)
                input_pos = torch.tensor([start])
                rope = layer_rope(config, layer, input_pos, chunk.shape[1])
                x[start : start + CHUNK] = block(chunk, cache, rope, input_pos)[0]
        yield states


def _embed(weights: Weights, ids: Tensor) -> Tensor:
    rows = torch.cat([weights.rows(TABLE, int(token), int(token) + 1) for token in ids])  # (T, hidden)
    scale: float = weights.config.hidden_size**0.5
    return rows * scale


@torch.no_grad()
def final_states(
    weights: Weights, sequences: Sequence[Tensor], context: int, progress: Callable[[int], None] = lambda done: None
) -> list[Tensor]:
    """The normed output of the last block for each sequence.

    Args:
        weights, sequences, context: as in `blocks`.
        progress: called with 1 after each layer.

    Returns:
        (T, hidden) float32 each; `logits` turns rows of it into logits.
    """
    last: list[Tensor] = []
    for states in blocks(weights, sequences, context):
        last = states
        progress(1)
    config, scale = weights.config, 1.0 + weights.vector(FINAL_NORM)
    return [torch.nn.functional.rms_norm(x, (config.hidden_size,), scale, config.rms_norm_eps) for x in last]


def hidden_states(
    weights: Weights, ids: Tensor, context: int, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """`final_states` of one sequence: (T,) int64 -> (T, hidden) float32."""
    return final_states(weights, [ids], context, progress)[0]


@torch.no_grad()
def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """Soft-capped logits (T, V) float32 of (T, hidden); the head is read in slices."""
    config = weights.config
    out = torch.empty(len(hidden), config.vocab_size)
    for start in range(0, config.vocab_size, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, config.vocab_size)
        part = hidden @ weights.rows(config.head, start, stop).T  # (T, <= HEAD_ROWS)
        # the softcap is applied to each part: on the whole of `out` it would need two more tensors of its size
        out[:, start:stop] = soft_cap(part, config.final_logit_softcapping)
    return out


def write_logits(weights: Weights, hidden: Tensor, path: Path) -> None:
    """Write the logits of (T, hidden) to a file, (T, V) float32, with few positions in memory at a time."""
    with replacing(path) as partial, partial.open("wb") as file:
        for start in range(0, len(hidden), HEAD_POSITIONS):
            file.write(logits(weights, hidden[start : start + HEAD_POSITIONS]).numpy().data)
