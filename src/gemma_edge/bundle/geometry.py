"""The geometry of a bundle's KV cache: fixed when the bundle is made, whatever is generated later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerCache:
    """Geometry of one layer's KV cache, in tokens."""

    window: int  # keys a query may see, itself included
    slots: int  # rows allocated; >= window + prefill_chunk - 1


@dataclass(frozen=True)
class CacheGeometry:
    """The KV cache of the whole model: fixed when the bundle is made, whatever is generated."""

    context: int  # tokens the model can look back on; beyond it the oldest fall out
    prefill_chunk: int  # most tokens in one forward call
    kv_heads: int
    head_dim: int
    dtype: str  # numpy name
    layers: tuple[LayerCache, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all K and V buffers."""
        item = {"float32": 4, "float16": 2, "int8": 1}[self.dtype]
        return sum(2 * self.kv_heads * layer.slots * self.head_dim * item for layer in self.layers)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CacheGeometry:
        """Inverse of `asdict`."""
        return cls(**{**data, "layers": tuple(LayerCache(**layer) for layer in data["layers"])})
