"""The KV cache: a ring buffer per layer, so that memory never grows. Rotation, writing and masking are here.

Source: HF modeling_gemma2.py (`eager_attention_forward`, `apply_rotary_pos_emb`); the ring's bound is derived below.

A layer with window W that is written in chunks of at most T tokens holds R slots. Position p lives in slot p mod R. The chunk
at positions a .. a+T-1 overwrites the slots of positions a+T-1-R and older, and its first query (at a) needs keys back to
a-W+1. So nothing needed is lost iff a+T-1-R < a-W+1, that is

    R >= W + T - 1.

A global layer can keep the beginning of a text for good, as "attention sinks" do (Xiao et al. 2023, arXiv 2309.17453), with each
token at its own position: P more slots before the ring belong to the first P tokens, which nothing overwrites. Position p then
lives in slot p if p < P, else in slot P + (p - P) mod R. Of the first P tokens a query sees those that are pinned, however old.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gemma_edge.bundle.geometry import slots_needed
from gemma_edge.errors import InputError
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.soft_cap import soft_capped_attention


@dataclass(frozen=True)
class Rope:
    """Cosine and sine of a chunk's rotary angles, each (T, D/2)."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of (B, heads, T, D): the halves of the last axis are the two coordinates of each plane."""
    a, b = x.chunk(2, dim=-1)
    return rotate_halves(a, b, rope)


def rotate_halves(a: Tensor, b: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of the two halves, each (B, heads, T, D/2): (B, heads, T, D)."""
    return torch.cat([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], dim=-1)


def windows(config: GemmaConfig, context: int) -> list[int]:
    """Keys that a query of each layer sees: the context in a global layer, at most the sliding window in a local one."""
    local = min(config.sliding_window, context)
    return [local if config.is_local(layer) else context for layer in range(config.num_hidden_layers)]


class KVCache(Protocol):
    """The seam that a backend replaces: rotate the chunk, write its keys and values, attend to what is visible."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope, input_pos: Tensor) -> Tensor:
        """Attention of one layer over the cache and the chunk itself.

        Args:
            layer: index of the layer.
            q: (B, T, H*D), not rotated.
            k, v: (B, T, K*D), k not rotated.
            rope: the chunk's angles.
            input_pos: (1,) int64, absolute position of the chunk's first token.

        Returns:
            (B, T, H*D).
        """
        ...


class RingCache(nn.Module):
    """The reference cache in plain torch: one ring per layer, keys stored rotated, so nothing is rotated twice."""

    def __init__(
        self,
        config: GemmaConfig,
        *,
        context: int,
        chunk: int,
        layers: Sequence[int] | None = None,
        pinned: int = 0,
    ) -> None:
        """Allocate the rings.

        Args:
            config: the model's configuration.
            context: window of the global layers, in tokens; local layers take the smaller of it and their own.
            chunk: largest number of tokens in one call of `attend`.
            layers: the layers that get a ring, None for all: a model run layer by layer needs one ring at a time.
            pinned: tokens at the beginning of a text that every later one sees in the global layers.
        """
        super().__init__()
        if context < 1 or chunk < 1:
            raise InputError(f"context {context} and chunk {chunk} must be at least 1 token")
        self.config, self.chunk = config, chunk
        self.windows = windows(config, context)
        self.pinned = [0 if config.is_local(layer) else pinned for layer in range(config.num_hidden_layers)]
        for i in range(config.num_hidden_layers) if layers is None else layers:
            slots = slots_needed(self.windows[i], chunk, self.pinned[i])
            shape = (1, config.num_key_value_heads, slots, config.head_dim)
            self.register_buffer(f"k_{i}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"v_{i}", torch.zeros(shape), persistent=False)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope, input_pos: Tensor) -> Tensor:
        """See `KVCache.attend`. B must be 1, and T at most the chunk that the ring was made for."""
        c, tokens = self.config, q.shape[1]
        keys, values = self.get_buffer(f"k_{layer}"), self.get_buffer(f"v_{layer}")  # (1, K, R, D)
        slots, pinned = keys.shape[2], self.pinned[layer]
        # R >= W + T - 1, else the chunk overwrites keys that its first query needs
        needed = slots_needed(self.windows[layer], tokens, pinned)
        assert slots >= needed, f"chunk of {tokens} tokens exceeds {self.chunk}"
        q = rotate(q.view(1, tokens, c.num_attention_heads, c.head_dim).transpose(1, 2), rope)  # (1, H, T, D)
        k = rotate(k.view(1, tokens, c.num_key_value_heads, c.head_dim).transpose(1, 2), rope)  # (1, K, T, D)
        v = v.view(1, tokens, c.num_key_value_heads, c.head_dim).transpose(1, 2)  # (1, K, T, D)
        positions = input_pos + torch.arange(tokens)  # (T,)
        places = slots_of(positions, slots, pinned)
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        used = min(
            slots, int(positions[-1]) + 1
        )  # U: the slots in use; until the ring is full, the slots behind them are empty
        mask = visible(positions, slots, self.windows[layer], pinned, pinned)[:, :used]  # (T, U)
        out = soft_capped_attention(q, keys[:, :, :used], values[:, :, :used], mask, c)  # (1, H, T, D)
        return out.transpose(1, 2).flatten(2)  # (1, T, H*D)


def slots_of(positions: Tensor, slots: int, kept: int) -> Tensor:
    """Where positions (T,) live in a layer of so many slots, of which the first `kept` are never overwritten: (T,)."""
    if not kept:
        return torch.remainder(positions, slots)
    return torch.where(positions < kept, positions, kept + torch.remainder(positions - kept, slots - kept))


def visible(positions: Tensor, slots: int, window: int, kept: int = 0, pinned: Tensor | int = 0) -> Tensor:
    """Which slots each query may see, after the chunk was written.

    Args:
        positions: (T,) int64, absolute and consecutive.
        slots, kept: of the layer; see `slots_of`.
        window: keys that a query sees, its own included, and beside them the first `pinned` tokens.
        pinned: at most `kept`.

    Returns:
        (T, slots) bool.
    """
    last = positions[-1]
    slot = torch.arange(slots)
    newest = last - (last - slot) % (slots - kept)  # (slots,) the newest position p <= last that lives in the slot
    if not kept:
        age = positions[:, None] - newest[None, :]  # (T, slots)
        return (newest >= 0) & (age >= 0) & (age < window)
    own = slot < kept
    newest = torch.where(own, slot, newest)
    age = positions[:, None] - newest[None, :]
    written = own | (newest >= kept)  # an older position than `kept` lives elsewhere
    return written & (age >= 0) & ((age < window) | (slot < pinned))
