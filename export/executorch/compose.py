"""The whole model as one program: lowered halves, with the ring caches written in place between them.

Everything outside the delegates is here: positions, rotary angles, masks, the embedding's rows, and the caches. Each layer's
cache is a ring (model/kv_cache.py): slots and masks are computed from the absolute position, so generation has no end.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_edge.bundle.geometry import PINNED_UNIT, CacheGeometry, LayerCache
from gemma_edge.export.executorch.packing import CODES, SCALE, row_bytes
from gemma_edge.export.executorch.seams import HIDDEN
from gemma_edge.export.executorch.templates import Called
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import inverse_frequencies, layer_ropes
from gemma_edge.model.kv_cache import slots_of, visible
from gemma_edge.quantize.recipe import QuantConfig

for operators in ("executorch.extension.llm.custom_ops.custom_ops", "executorch.kernels.quantized"):
    importlib.import_module(operators)  # registers them; without it they are unknown to torch.export

USED_STEP = 64  # slots are read in steps of 64, because a delegate allocates again whenever a size grows


class Embedding(nn.Module):
    """Rows of the table. The table has one row here; pte.py gives it its size and streams its bytes into the file."""

    def __init__(self, hidden_size: int, quant: QuantConfig | None) -> None:
        super().__init__()
        self.quant = quant
        if quant is None:
            self.register_buffer("table", torch.zeros(1, hidden_size))
            return
        sizes = row_bytes(quant, hidden_size, embedding=True)
        dtype = torch.uint8 if quant.bits == 4 else torch.int8
        self.register_buffer("table", torch.zeros(1, sizes[CODES], dtype=dtype))
        groups = sizes[SCALE] // 4
        self.register_buffer("scale", torch.zeros((1, groups) if groups > 1 else (1,)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(1, T) int64 -> (1, T, hidden)."""
        table = self.get_buffer("table")
        if self.quant is None:
            return F.embedding(tokens, table)
        limits = (-8, 7) if self.quant.bits == 4 else (-128, 127)
        ops = torch.ops.quantized_decomposed
        gather = ops.embedding_4bit.default if self.quant.bits == 4 else ops.embedding_byte.default
        rows: Tensor = gather(table, self.get_buffer("scale"), None, *limits, tokens)
        return rows


@dataclass(frozen=True)
class View:
    """A chunk's place in the caches of one geometry."""

    slots: Tensor  # (K, T) int64, the slots it is written to
    used: int  # U, the number of slots that are read
    mask: Tensor  # (1, G*T, U)


class Composed(nn.Module):
    """`forward(tokens, input_pos)` as the official LLM runners call it."""

    def __init__(
        self,
        config: GemmaConfig,
        geometry: CacheGeometry,
        embedding: Embedding,
        layers: Sequence[tuple[Called, Called]],
        head: Sequence[Called],
        *,
        every_position: bool,
    ) -> None:
        """Put the parts together.

        Args:
            config, geometry: the model's, and its caches'.
            embedding: the table's rows.
            layers: the two halves of each.
            head: the pieces of final norm, head and soft cap.
            every_position: logits are computed at every position; False: at the last one.
        """
        super().__init__()
        self.config, self.geometry, self.every_position = config, geometry, every_position
        self.embed_tokens, self.head = embedding, nn.ModuleList(head)
        self.project = nn.ModuleList(first for first, _ in layers)
        self.attend = nn.ModuleList(second for _, second in layers)
        for name, inv_freq in inverse_frequencies(config).items():
            self.register_buffer(name, inv_freq, persistent=False)
        for index, layer in enumerate(geometry.layers):
            shape = (geometry.kv_heads, layer.slots, 1, geometry.head_dim)
            self.register_buffer(f"key_{index}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"value_{index}", torch.zeros(shape), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Logits of the tokens (1, T) written at `input_pos` (1,): (1, 1, V), or (1, T, V) with `every_position`.

        Where the caches keep the beginning of a text, `input_pos` also says how many of its tokens are pinned, PINNED_UNIT for
        each. So the official runners, which know nothing of it, pin none.
        """
        count = tokens.shape[1]
        pinned: Tensor | int = 0
        if self.geometry.pinned:
            pinned = torch.div(input_pos, PINNED_UNIT, rounding_mode="floor")  # (1,)
            input_pos = torch.remainder(input_pos, PINNED_UNIT)
        ropes = layer_ropes(self, self.config, input_pos, count)
        positions = input_pos + torch.arange(count)  # (T,)
        views = {layer: self._view(layer, positions, pinned) for layer in self.geometry.kinds}
        x = self.embed_tokens(tokens) * self.config.hidden_size**0.5  # (1, T, hidden)
        for index, (layer, rope, project, attend) in enumerate(
            zip(self.geometry.layers, ropes, self.project, self.attend, strict=True)
        ):
            q, k, v = project(x, rope.cos, rope.sin)
            view = views[layer]
            x = attend(x, q, self._write("key", index, k, view), self._write("value", index, v, view), view.mask)[0]
        x = x if self.every_position else x[:, -1:]
        return torch.cat([piece(x)[0] for piece in self.head], dim=-1)

    def _view(self, layer: LayerCache, positions: Tensor, pinned: Tensor | int) -> View:
        """What the layers of one geometry share."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        slots = slots_of(positions, layer.slots, layer.pinned)
        slots = slots.unsqueeze(0).expand(self.geometry.kv_heads, -1).contiguous()  # (K, T)
        seen = visible(positions, layer.slots, layer.window, layer.pinned, pinned)
        mask = torch.where(seen, 0.0, HIDDEN)  # (T, S)
        mask = mask.unsqueeze(0).expand(group, -1, -1).reshape(1, -1, layer.slots)  # (1, G*T, S)
        # until the ring is full, the slots behind hold nothing yet
        steps = torch.div(positions[-1] + USED_STEP, USED_STEP, rounding_mode="floor")
        used: Any = (steps * USED_STEP).clamp(max=layer.slots).item()
        check: Any = torch._check
        check(used >= 1)
        check(used <= layer.slots)
        return View(slots, used, mask[:, :, :used])

    def _write(self, kind: str, index: int, new: Tensor, view: View) -> Tensor:
        """Put the chunk (K, T, 1, D) into its slots; return the slots in use (K, U, D)."""
        cache = self.get_buffer(f"{kind}_{index}")
        torch.ops.llama.update_cache_with_indices(new, cache, 0, view.slots)
        return cache.view(self.geometry.kv_heads, -1, self.geometry.head_dim)[:, : view.used]
