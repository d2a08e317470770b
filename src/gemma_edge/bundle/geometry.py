"""The geometry of a bundle's KV cache: fixed when the bundle is made, however much is generated later."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_edge.bundle.ranges import Chunk, Dtype, HeadDim, Heads, Pinned, Tokens

PINNED_UNIT = (
    1 << 32
)  # what a position holds for each pinned token, where an engine has no other input for their number
ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}  # numpy's name of an element type -> its size


def slots_needed(window: int, chunk: int, pinned: int = 0) -> int:
    """Slots that a layer needs for a window written in chunks of at most `chunk` tokens; model/kv_cache.py derives it."""
    return pinned + window + chunk - 1


@dataclass(frozen=True)
class LayerCache:
    """The KV cache of one layer, in tokens."""

    window: Tokens  # keys that a query may see, its own included
    slots: Tokens  # rows allocated; at least pinned + window + prefill_chunk - 1
    pinned: Pinned = 0  # rows at the beginning that the first tokens keep; the others are used again and again


@dataclass(frozen=True)
class CacheGeometry:
    """The KV cache of the whole model."""

    context: Tokens  # tokens that the model can look back on; beyond them it forgets the oldest
    prefill_chunk: Chunk  # largest number of tokens in one forward call
    kv_heads: Heads
    head_dim: HeadDim
    dtype: Dtype  # numpy's name
    layers: tuple[LayerCache, ...]

    @property
    def pinned(self) -> int:
        """The largest number of tokens at the beginning of a text that the model can go on seeing beyond the context."""
        return max((layer.pinned for layer in self.layers), default=0)

    @property
    def kinds(self) -> list[LayerCache]:
        """The different layers, in order of their first: those of a kind share slots and masks."""
        return list(dict.fromkeys(self.layers))

    @property
    def bytes(self) -> int:
        """Bytes of all K and V buffers."""
        slots = sum(layer.slots for layer in self.layers)
        return 2 * self.kv_heads * slots * self.head_dim * ITEM_BYTES[self.dtype]
