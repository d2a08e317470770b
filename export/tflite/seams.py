"""The decoder's cache for TFLite: buffers of fixed size whose slots know which position they hold.

A chunk is written by one DYNAMIC_UPDATE_SLICE, which cannot wrap. So a ring of R slots has N - 1 more behind its end: a chunk of
at most N tokens from position a on goes to the slots a mod R ..., in one piece. Where a position lies depends on the chunk that
it came with; so each slot's position is written beside it, plus one, 0 meaning nothing, and masks are computed from these. The
first token's position decides which slots are valid: everything stored at that position or later is ignored.

A chunk may be padded: tokens whose `input_pos` does not follow the first one's are written, and marked as nothing. They overwrite
slots as far as a whole chunk does, so that R >= W + N - 1 (model/kv_cache.py) is enough: S = R + N - 1 slots in all.

While a text is short, most slots hold nothing of it, and reading them takes as long as reading the others. So there are
signatures that look at the first L slots only. They are right for texts of at most L tokens: position p of a chunk from a on
lies in the slot a mod R + p - a, which is at most p, so all that counts lies in front of L.

In a layer that keeps the first P tokens, P slots lie before the ring: position p < P lives in slot p, and a chunk from a >= P on
goes to the slots P + (a - P) mod R .... An engine pins a token by turning the number in its slot's position negative: every query
sees such a slot, and no chunk touches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gemma_edge.bundle.geometry import CacheGeometry, LayerCache
from gemma_edge.bundle.signature import Signature
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import Gemma
from gemma_edge.model.kv_cache import Rope, rotate
from gemma_edge.model.soft_cap import soft_cap

HIDDEN = -1e9  # score of a slot that must not count; it is finite, so that a row that sees nothing stays a number
SCORE, PREFILL, DECODE = "score", "prefill", "decode"  # what a signature is for
SCORED = 32  # positions whose logits come from one call; 32 MB for 256,000 tokens
SHORT = 4  # a text is short if the context holds four of it
KEY, VALUE, HELD = "kv_cache_k_", "kv_cache_v_", "kv_cache_held_"  # inputs and outputs, by layer; HELD by kind


@torch.library.custom_op("gemma_edge_tflite::update_slice", mutates_args=())
def update_slice(operand: Tensor, update: Tensor, start: Tensor) -> Tensor:
    """TFLite's DYNAMIC_UPDATE_SLICE: the operand with `update` from `start` (rank,) int32 on; that it fits is the caller's."""
    out = operand.clone()
    place = tuple(slice(int(at), int(at) + size) for at, size in zip(start, update.shape, strict=True))
    out[place] = update
    return out


@update_slice.register_fake
def _(operand: Tensor, update: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(operand)


UPDATE_SLICE = torch.ops.gemma_edge_tflite.update_slice.default  # as it stands in a traced graph


def ring_of(layer: LayerCache, chunk: int) -> int:
    """R of a layer's S slots: how many of them a chunk of at most `chunk` tokens may begin in, beside those it keeps."""
    return layer.slots - layer.pinned - chunk + 1


def looked_at(layer: LayerCache, longest: int | None) -> int:
    """How many of a layer's slots, from the first on, hold a text of at most `longest` tokens."""
    return layer.slots if longest is None else min(longest, layer.slots)


@dataclass(frozen=True)
class View:
    """A chunk's place in the caches of one kind of layer."""

    start: Tensor  # (1,) int32, its first slot
    slots: int  # L of its S slots, the first ones, are looked at
    mask: Tensor  # (1, 1, T, L), added to the scores


def view(
    slot_positions: Tensor, input_pos: Tensor, layer: LayerCache, ring: int, *, longest: int | None
) -> tuple[View, Tensor]:
    """Where a chunk goes and what it sees.

    Args:
        slot_positions: (1, 1, 1, S) int32, the position in each slot plus one; 0: nothing; below 0: pinned.
        input_pos: (T,) int32; those that do not follow the first are padding.
        layer, ring: the caches' geometry, and R of it.
        longest: length of the longest text; None: there is no limit.

    Returns:
        the view, and `slot_positions` after the chunk.
    """
    tokens = input_pos.shape[0]
    first = input_pos[:1]  # (1,)
    positions = first + torch.arange(tokens, dtype=torch.int32)  # (T,)
    kept = torch.where(slot_positions <= first, slot_positions, 0)
    new = torch.where(input_pos == positions, positions + 1, 0).view(1, 1, 1, tokens)
    start = torch.remainder(first, ring)
    if own := layer.pinned:
        start = torch.where(first < own, first, torch.remainder(first - own, ring) + own)
    zeros = torch.zeros(3, dtype=torch.int32)
    slot_positions = update_slice(kept, new, torch.cat([zeros, start]))
    slots = looked_at(layer, longest)
    first_positions = slot_positions[..., :slots]
    age = positions.view(1, 1, tokens, 1) - (first_positions - 1)  # (1, 1, T, L)
    seen = (first_positions > 0) & (age >= 0) & (age < layer.window)
    mask = torch.where(seen, 0.0, HIDDEN)
    if layer.pinned:
        mask = torch.where(first_positions < 0, 0.0, mask)
    return View(start, slots, mask), slot_positions


class SlotCache:
    """`KVCache` over the signature's inputs; what must be kept is left in `after`."""

    def __init__(
        self,
        config: GemmaConfig,
        geometry: CacheGeometry,
        past: Mapping[str, Tensor],
        input_pos: Tensor,
        *,
        longest: int | None,
    ) -> None:
        """Compute masks.

        Args:
            config, geometry: the model's, and its caches'.
            past: by name: keys and values (1, K, S, D) of every layer, and what each kind of layer's slots hold.
            input_pos: (T,) int32.
            longest: length of the longest text; None: there is no limit.
        """
        self.config, self.geometry, self.past = config, geometry, past
        self.after: dict[str, Tensor] = {}
        self.views: dict[LayerCache, View] = {}
        for index, layer in enumerate(geometry.kinds):
            name = f"{HELD}{index}"
            row = past[name].view(1, 1, 1, layer.slots)
            ring = ring_of(layer, geometry.prefill_chunk)
            self.views[layer], row = view(row, input_pos, layer, ring, longest=longest)
            self.after[name] = row.view(past[name].shape)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope, input_pos: Tensor) -> Tensor:
        """See `KVCache.attend`."""
        c, tokens = self.config, q.shape[1]
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        view = self.views[self.geometry.layers[layer]]
        q = rotate(q.view(1, tokens, heads, c.head_dim).transpose(1, 2), rope) * c.query_pre_attn_scalar**-0.5
        k = rotate(k.view(1, tokens, kv_heads, c.head_dim).transpose(1, 2), rope)  # (1, K, T, D)
        v = v.view(1, tokens, kv_heads, c.head_dim).transpose(1, 2)  # (1, K, T, D)
        keys, values = self._write(f"{KEY}{layer}", k, view), self._write(f"{VALUE}{layer}", v, view)  # (1, K, L, D)
        q = q.reshape(1, kv_heads, -1, c.head_dim)  # (1, K, G*T, D)
        scores = soft_cap(q @ keys.transpose(2, 3), c.attn_logit_softcapping).view(1, heads, tokens, -1)
        weights = torch.softmax(scores + view.mask, dim=-1).view(1, kv_heads, -1, view.slots)  # (1, K, G*T, L)
        out = (weights @ values).view(1, heads, tokens, c.head_dim).transpose(1, 2)  # (1, T, H, D)
        return out.reshape(1, tokens, -1)

    def _write(self, name: str, new: Tensor, view: View) -> Tensor:
        """Put the chunk (1, K, T, D) into its slots; those that are looked at."""
        zeros = torch.zeros(2, dtype=torch.int32)
        self.after[name] = update_slice(self.past[name], new, torch.cat([zeros, view.start, zeros[:1]]))
        return self.after[name][:, :, : view.slots]


def states(geometry: CacheGeometry, *, fours: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Inputs that come back as outputs: name -> shape and type.

    Args:
        geometry: of the caches.
        fours: what the slots hold lies in rows of four, and not in one row. Their number is then a multiple of four.
    """
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for index, layer in enumerate(geometry.layers):
        shape = (1, geometry.kv_heads, layer.slots, geometry.head_dim)
        shapes |= {f"{KEY}{index}": (shape, torch.float32), f"{VALUE}{index}": (shape, torch.float32)}
    held = [(1, 1, layer.slots // 4, 4) if fours else (1, 1, 1, layer.slots) for layer in geometry.kinds]
    return shapes | {f"{HELD}{index}": (shape, torch.int32) for index, shape in enumerate(held)}


def signatures(geometry: CacheGeometry) -> list[Signature]:
    """The signatures of a model. Those for short texts have other names: LiteRT-LM takes any prefill and decode for all."""
    chunk, short = geometry.prefill_chunk, geometry.context // SHORT
    sizes = dict.fromkeys([chunk, chunk // 8]) if chunk >= 16 else [chunk]
    score = min(chunk, SCORED)
    fed = _fed(sizes)
    by_size = {each.tokens: each for each in fed} if short >= chunk else {}  # to decode is also to prefill one token
    return [
        *fed,
        Signature(f"{SCORE}_{score}", SCORE, score),
        *(replace(each, name=f"short_{size}", longest=short) for size, each in by_size.items()),
    ]


def two_signatures(geometry: CacheGeometry) -> list[Signature]:
    """One signature for prompts and one for answers: for an engine that packs the weights anew for each."""
    return _fed([geometry.prefill_chunk])


def _fed(sizes: Iterable[int]) -> list[Signature]:
    """Signatures for prompts, one for each size of a call, and the one for answers."""
    return [*(Signature(f"{PREFILL}_{size}", PREFILL, size) for size in sizes), Signature(DECODE, DECODE, 1)]


class Step(nn.Module):
    """One signature: a chunk through the decoder."""

    def __init__(self, decoder: Gemma, geometry: CacheGeometry, role: str, *, longest: int | None) -> None:
        super().__init__()
        self.decoder, self.geometry, self.role, self.longest = decoder, geometry, role, longest

    def forward(self, tokens: Tensor, input_pos: Tensor, past: dict[str, Tensor]) -> dict[str, Tensor]:
        """The states after the tokens (1, T) int32, and logits (1, T, V) unless this only prefills."""
        decoder = self.decoder
        cache = SlotCache(decoder.config, self.geometry, past, input_pos, longest=self.longest)
        x = decoder.model(tokens, input_pos[:1], cache)
        logits = {} if self.role == PREFILL else {"logits": decoder.head(x)}
        return {**logits, **cache.after}


class Pin(nn.Module):
    """The signature that marks the first tokens in the layers that keep them: for an engine that cannot reach the caches."""

    def __init__(self, geometry: CacheGeometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, pinned: Tensor, past: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the slots hold (see `view`) once the first `pinned` (1,) int32 tokens are pinned, and no others."""
        after = {}
        for index, layer in enumerate(self.geometry.kinds):
            if layer.pinned:
                held = past[f"{HELD}{index}"]
                held = torch.where(held < 0, -1 * held, held)
                slots = torch.arange(layer.slots, dtype=torch.int32).view(held.shape)
                after[f"{HELD}{index}"] = torch.where(slots < pinned, -1 * held, held)
        return after
