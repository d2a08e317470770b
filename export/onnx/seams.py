"""The three seams of the decoder as ONNX operators: nothing here computes, each forward only names the node to emit.

Source: ONNX Runtime's contrib operators (GroupQueryAttention, MatMulNBits, GatherBlockQuantized) and ONNX RotaryEmbedding-23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.onnx import ops

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.onnx.weights import block_size
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import Layers, TiedTable
from gemma_edge.model.kv_cache import Rope
from gemma_edge.quantize.recipe import QuantConfig

Attrs = dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]

# of GroupQueryAttention with int8 caches: it rounds rotated keys and values to the scales, and attends to what the cache holds
INT8_CACHE: Attrs = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
SCALE_INPUTS = (12, 13)  # where it takes the scales of K and V
KEPT = ("past_rows", "attention_bias")  # the graph's inputs for layers that keep the beginning of a text
BIAS_INPUT = 10  # where it takes what is added to the scores


class MatMulNBits(nn.Module):
    """A linear over packed integers: packed (out, blocks, bytes), scale (out, blocks)."""

    def __init__(self, in_features: int, out_features: int, config: QuantConfig, accuracy_level: int) -> None:
        super().__init__()
        self.config, self.accuracy_level = config, accuracy_level
        self.in_features, self.out_features = in_features, out_features
        block = block_size(config, in_features)
        blocks = in_features // block
        self.register_buffer(
            "weight_packed", torch.empty(out_features, blocks, block * config.bits // 8, dtype=torch.uint8)
        )
        self.register_buffer("weight_scale", torch.empty(out_features, blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return matmul_nbits(x, self.get_buffer("weight_packed"), self.get_buffer("weight_scale"), self)


def matmul_nbits(x: Tensor, packed: Tensor, scale: Tensor, weight: MatMulNBits | QuantizedEmbedding) -> Tensor:
    """One MatMulNBits node: symmetric codes, so without zero points."""
    attrs: Attrs = {
        "N": weight.out_features,
        "K": weight.in_features,
        "bits": weight.config.bits,
        "block_size": block_size(weight.config, weight.in_features),
        "accuracy_level": weight.accuracy_level,
    }
    shape = (*x.shape[:-1], weight.out_features)
    inputs = (x, packed, scale)
    return ops.symbolic("com.microsoft::MatMulNBits", inputs, attrs=attrs, dtype=torch.float32, shape=shape, version=1)


class QuantizedEmbedding(nn.Module):
    """The table: gathered by rows and, where the head is tied to it, multiplied as the head, over the same bytes."""

    def __init__(self, vocab_size: int, hidden_size: int, config: QuantConfig, accuracy_level: int) -> None:
        super().__init__()
        self.config, self.accuracy_level = config, accuracy_level
        self.in_features, self.out_features = hidden_size, vocab_size
        self.block = block_size(config, hidden_size)
        self.register_buffer(
            "weight_packed", torch.empty(vocab_size, hidden_size * config.bits // 8, dtype=torch.uint8)
        )
        self.register_buffer("weight_scale", torch.empty(vocab_size, hidden_size // self.block))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, hidden)."""
        attrs: Attrs = {"bits": self.config.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 1}
        inputs = (self.get_buffer("weight_packed"), tokens, self.get_buffer("weight_scale"))
        shape = (*tokens.shape, self.in_features)
        return ops.symbolic(
            "com.microsoft::GatherBlockQuantized", inputs, attrs=attrs, dtype=torch.float32, shape=shape, version=1
        )

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, V). graph.py replaces the reshaped table by a second name for the same bytes."""
        packed = self.get_buffer("weight_packed")
        blocks = packed.view(self.out_features, self.in_features // self.block, -1)  # (V, blocks, bytes)
        return matmul_nbits(x, blocks, self.get_buffer("weight_scale"), self)


class FloatLinear(nn.Module):
    """A linear over float weights, stored in 16 or 32 bits and multiplied in 32."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return nn.functional.linear(x, self.weight.float())


class FloatEmbedding(FloatLinear):
    """The table in float: only the gathered rows are widened."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, hidden)."""
        return nn.functional.embedding(tokens, self.weight).float()

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, V)."""
        return super().forward(x)


def make_layers(configs: dict[str, QuantConfig | None], dtypes: dict[str, torch.dtype], accuracy_level: int) -> Layers:
    """The decoder's weight seams for a checkpoint.

    Args:
        configs: integers of each weight, None = float.
        dtypes: how the float weights are stored.
        accuracy_level: of MatMulNBits: 4 = int8 activations (fast), 0 = float32 (exact).
    """

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        config = configs[name]
        if config is None:
            return FloatLinear(in_features, out_features, dtypes[name])
        return MatMulNBits(in_features, out_features, config, accuracy_level)

    def embedding(name: str, vocab_size: int, hidden_size: int) -> TiedTable:
        config = configs[name]
        if config is None:
            return FloatEmbedding(hidden_size, vocab_size, dtypes[name])
        return QuantizedEmbedding(vocab_size, hidden_size, config, accuracy_level)

    return Layers(linear, embedding)


@dataclass
class GroupQueryAttention:
    """`KVCache` as graph inputs and outputs: GroupQueryAttention writes, evicts, masks and attends.

    `sliding_window_cache` keeps each layer in a buffer of fixed size (`LayerCache.slots`), the window moving inside. A global
    layer is one whose window is the whole context, so that no layer ever grows. The rotation is a node of its own because the
    operator's own rotary table has an end.

    A layer that keeps the beginning of a text has no sliding window, because the operator knows none with a beginning: the engine
    moves its rows, says how many are in use, and hides those that have left the window by `bias`.
    """

    config: GemmaConfig
    geometry: CacheGeometry
    past: list[Tensor]  # 2 * layers x (1, K, slots, D): key 0, value 0, key 1, ...
    scales: list[Tensor]  # 2 * layers x (1, K, 1, D), in the same order, for int8 caches; else empty
    past_rows: Tensor | None = None  # (1,) int64, rows in use before this chunk, of a layer that keeps the beginning
    bias: Tensor | None = None  # (1, 1, T, past_rows + T), added to such a layer's scores
    present: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope, input_pos: Tensor) -> Tensor:
        """See `gemma_edge.model.kv_cache.KVCache.attend`."""
        c = self.config
        cos, sin = rope.cos.unsqueeze(0), rope.sin.unsqueeze(0)  # (1, T, D/2)
        q = ops.rotary_embedding(q, cos, sin, num_heads=c.num_attention_heads)  # (1, T, H*D)
        k = ops.rotary_embedding(k, cos, sin, num_heads=c.num_key_value_heads)  # (1, T, K*D)
        keeps = self.geometry.layers[layer].pinned > 0
        before = self.past_rows if keeps and self.past_rows is not None else input_pos
        total = (before + q.shape[1]).to(torch.int32)  # (1,) tokens, or rows in use, after this chunk
        past_k, past_v = self.past[2 * layer], self.past[2 * layer + 1]
        attrs: Attrs = {
            "num_heads": c.num_attention_heads,
            "kv_num_heads": c.num_key_value_heads,
            "scale": c.query_pre_attn_scalar**-0.5,
            "softcap": c.attn_logit_softcapping or 0.0,
            "local_window_size": -1 if keeps else self.geometry.layers[layer].window,
            "sliding_window_cache": 0 if keeps else 1,
            "do_rotary": 0,
        }
        inputs: list[Tensor | None] = [q, k, v, past_k, past_v, total - 1, total.squeeze(0)]
        if keeps:
            inputs += [*[None] * (BIAS_INPUT - len(inputs)), self.bias]
        if self.scales:
            attrs |= INT8_CACHE
            inputs += [*[None] * (SCALE_INPUTS[0] - len(inputs)), *self.scales[2 * layer : 2 * layer + 2]]
        out, present_k, present_v = ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attrs=attrs,
            dtypes=(torch.float32, past_k.dtype, past_v.dtype),
            shapes=(q.shape, past_k.shape, past_v.shape),
            version=1,
        )
        self.present += [present_k, present_v]
        return out
