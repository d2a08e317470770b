"""The decoder in plain ONNX operators with static shapes, for NPUs: a graph of one token, and two of a chunk.

What depends on positions is computed on the CPU by a graph of its own, `feeds`, and goes into the others as inputs: the rows of
the table, the angles of the rotary embeddings (in 16 bits they would be the more wrong the longer the text is), the slots that
are written, and the masks. A chunk that is shorter than the graph is filled up with its last token, at its own position: the same
rows are written to the same slot again, and the last row is the last token's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.hollow import hollow
from gemma_edge.export.onnx.graph import MODULE, TRACED, cache_names, onnx_program
from gemma_edge.export.onnx.weights import Blob
from gemma_edge.logits import scored_at_once
from gemma_edge.model.checkpoint import TABLE
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import Gemma, Layers, angles_at, inverse_frequencies, rotary_buffers
from gemma_edge.model.kv_cache import Rope, rotate, slots_of, visible
from gemma_edge.model.soft_cap import soft_cap

FEEDS: Final = "feeds"
ROLES: Final = (FEEDS, "generate", "prefill", "score")
HIDDEN: Final = -65504.0  # added to the scores of slots that a query must not see: the lowest number of 16 bits


def fed_names(config: GemmaConfig, geometry: CacheGeometry) -> list[str]:
    """Names of what `feeds` makes, in order: rows of the table, then cos and sin of each rotary, slots and mask of each kind."""
    rotaries, kinds = range(len(rotary_buffers(config))), range(len(geometry.kinds))
    pairs = [(f"cos_{i}", f"sin_{i}") for i in rotaries] + [(f"slots_{i}", f"mask_{i}") for i in kinds]
    return ["inputs_embeds", *(name for pair in pairs for name in pair)]


class Feeds(nn.Module):
    """From tokens and positions to what the static graphs are fed."""

    def __init__(self, config: GemmaConfig, geometry: CacheGeometry, layers: Layers) -> None:
        super().__init__()
        self.config, self.geometry = config, geometry
        table = cast(nn.Module, layers.embedding(TABLE, config.vocab_size, config.hidden_size))
        for name in reversed(TABLE.split(".")):  # under the name that it has in the decoder
            outer = nn.Module()
            outer.add_module(name, table)
            table = outer
        self.add_module(MODULE, table)

    def forward(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Tokens (1, T) at positions (T,), of which the last may be repeated: what `fed_names` names."""
        table = self.get_submodule(f"{MODULE}.{TABLE}")
        x = table(input_ids) * self.config.hidden_size**0.5  # (1, T, hidden)
        ropes = [angles_at(inv_freq, positions) for inv_freq in inverse_frequencies(self.config).values()]
        fed = [x, *(part for rope in ropes for part in (rope.cos, rope.sin))]  # (T, D/2) each
        for kind in self.geometry.kinds:
            seen = visible(positions, kind.slots, kind.window)  # (T, slots)
            fed += [slots_of(positions, kind.slots, 0).to(torch.int32), torch.where(seen, 0.0, HIDDEN)]
        return tuple(fed)


@dataclass
class PlainRing:
    """`KVCache` as graph inputs and outputs, with the arithmetic written out."""

    config: GemmaConfig
    past: list[Tensor]  # 2 * layers x (1, K, slots, D): key 0, value 0, key 1, ...
    slots: list[Tensor]  # by layer, (T,) int32
    masks: list[Tensor]  # by layer, (T, slots), added to the scores
    present: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope, input_pos: Tensor) -> Tensor:
        """See `gemma_edge.model.kv_cache.KVCache.attend`."""
        c, tokens = self.config, q.shape[1]
        heads, kv_heads, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q = rotate(q.view(1, tokens, heads, width).transpose(1, 2), rope)  # (1, H, T, D)
        k = rotate(k.view(1, tokens, kv_heads, width).transpose(1, 2), rope)  # (1, K, T, D)
        v = v.view(1, tokens, kv_heads, width).transpose(1, 2)
        index = self.slots[layer].view(1, 1, tokens, 1).expand(1, kv_heads, tokens, width)
        keys, values = (
            scatter(past, index, new) for past, new in zip(self.past[2 * layer : 2 * layer + 2], (k, v), strict=True)
        )  # (1, K, R, D) each
        self.present += [keys, values]
        grouped = q.reshape(1, kv_heads, -1, width)  # (1, K, G*T, D)
        # the small side is transposed, not the cache
        scores = (keys @ grouped.transpose(2, 3)).transpose(2, 3) * c.query_pre_attn_scalar**-0.5  # (1, K, G*T, R)
        scores = soft_cap(scores, c.attn_logit_softcapping).reshape(1, heads, tokens, -1) + self.masks[layer]
        seen = scores.softmax(dim=-1).reshape(1, kv_heads, -1, keys.shape[2])  # (1, K, G*T, R)
        return (seen @ values).reshape(1, heads, tokens, width).transpose(1, 2).flatten(2)  # (1, T, H*D)


def scatter(past: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """`new` (1, K, T, D) in the slots `index`, which is int32: torch's own scatter takes 64 bits, HTP does not."""
    out: Tensor = torch.onnx.ops.symbolic(
        "ScatterElements", (past, index, new), attrs={"axis": 2}, dtype=past.dtype, shape=past.shape, version=18
    )
    return out


class PlainStep(nn.Module):
    """A fixed number of tokens through the decoder."""

    def __init__(self, config: GemmaConfig, geometry: CacheGeometry, layers: Layers, *, every_position: bool) -> None:
        super().__init__()
        self.config, self.geometry, self.every_position = config, geometry, every_position
        self.add_module(MODULE, Gemma(config, layers))

    def forward(self, fed: list[Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits (1, T, V) or, of the last token, (1, 1, V); then the caches. `fed` is what `fed_names` names."""
        decoder, c = cast(Gemma, self.get_submodule(MODULE)), self.config
        x, *rest = fed
        pairs = list(zip(rest[::2], rest[1::2], strict=True))
        rotaries = list(rotary_buffers(c))
        ropes = [Rope(*pairs[rotaries.index(c.rotary(layer))]) for layer in range(c.num_hidden_layers)]
        kinds = self.geometry.kinds
        slots, masks = zip(*(pairs[len(rotaries) + kinds.index(each)] for each in self.geometry.layers), strict=True)
        cache = PlainRing(c, past, list(slots), list(masks))
        for layer, rope in zip(decoder.model.layers, ropes, strict=True):
            x = layer(x, cache, rope, x)  # positions are in what is fed
        x = decoder.model.norm(x)
        return decoder.head(x if self.every_position else x[:, -1:]), *cache.present


def tokens_of(role: str, config: GemmaConfig, geometry: CacheGeometry) -> int:
    """Tokens of a static graph."""
    chunk = geometry.prefill_chunk
    return {"generate": 1, "prefill": chunk, "score": scored_at_once(chunk, config.vocab_size)}[role]


def trace_role(role: str, config: GemmaConfig, geometry: CacheGeometry, layers: Layers) -> ir.Model:
    """The graph of a role, its weights nameless holes."""
    if role == FEEDS:
        return trace_feeds(config, geometry, layers)
    tokens = tokens_of(role, config, geometry)
    return trace_plain(config, geometry, layers, tokens, every_position=role == "score")


def weights_of(config: GemmaConfig, blobs: list[Blob]) -> dict[str, list[Blob]]:
    """By role, what the graph holds of the weights file: the table is multiplied by only where it is the head, too."""
    table = [blob for blob in blobs if blob.name.startswith(f"{TABLE}.")]
    multiplied = blobs if config.tie_word_embeddings else [blob for blob in blobs if blob not in table]
    return {role: table if role == FEEDS else multiplied for role in ROLES}


def trace_feeds(config: GemmaConfig, geometry: CacheGeometry, layers: Layers) -> ir.Model:
    """The graph `feeds`, for any number of tokens."""
    step = _hollow(Feeds, config, geometry, layers)
    tokens = torch.export.Dim("tokens", min=1, max=1 << 20)
    model = onnx_program(
        step,
        (torch.zeros(1, TRACED, dtype=torch.int64), torch.zeros(TRACED, dtype=torch.int64)),
        input_names=["input_ids", "positions"],
        output_names=fed_names(config, geometry),
        dynamic_shapes=({1: tokens}, {0: tokens}),
    )
    return model


def trace_plain(
    config: GemmaConfig, geometry: CacheGeometry, layers: Layers, tokens: int, *, every_position: bool
) -> ir.Model:
    """A graph for exactly so many tokens."""
    step = _hollow(PlainStep, config, geometry, layers, every_position=every_position)
    half = config.head_dim // 2
    fed = [torch.zeros(1, tokens, config.hidden_size)]
    fed += [torch.zeros(tokens, half) for _ in rotary_buffers(config) for _ in range(2)]
    for kind in geometry.kinds:
        fed += [torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, kind.slots)]
    kv = [(1, geometry.kv_heads, layer.slots, geometry.head_dim) for layer in geometry.layers for _ in ("key", "value")]
    past = [hollow(torch.empty(shape, device="meta")) for shape in kv]
    count = config.num_hidden_layers
    return onnx_program(
        step,
        (fed, past),
        input_names=[*fed_names(config, geometry), *cache_names(count, "past_key_values")],
        output_names=["logits", *cache_names(count, "present")],
    )


def _hollow(kind: type[nn.Module], *arguments: object, **options: object) -> nn.Module:
    with torch.device("meta"):
        step = kind(*arguments, **options).eval()
    step.load_state_dict({name: hollow(value) for name, value in step.state_dict().items()}, assign=True)
    return step
