"""The decoder's seams for ExecuTorch, and one block of it cut in two where the cache is written.

Each half becomes one XNNPACK delegate: `ProjectHalf` is everything up to rotated queries, keys and values, `AttendHalf` the
rest. Both run the decoder's own block. It is written so that nothing splits a delegate: rotary halves come from two linears
each, a shape has one free size and no symbol in it, and where XNNPACK's partitioner breaks the graph (a mean) or takes another
function for ours (the error-function GELU for the tanh one), the same maths is spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8TensorActivationQuantization as ActivationQuantization,
)

from gemma_edge.export.executorch.packing import Weight, is_halved, pieces_of
from gemma_edge.model.checkpoint import linear_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import DecoderLayer, HeadNorm, Layers, RMSNorm
from gemma_edge.model.kv_cache import Rope, rotate_halves
from gemma_edge.model.soft_cap import soft_cap
from gemma_edge.quantize.integers import QuantizedTensor

HIDDEN = -1e9  # score of a slot that must not count; it is finite, so that a row that sees nothing stays a number
PROJECTED = ("q_proj", "k_proj", "v_proj")  # the linears of the first half
TRACED, TRACED_SLOTS = 3, 5  # values of the free sizes while tracing: two different ones that no shape has otherwise
Rows = Callable[[str, int, int], Weight]  # (weight, rows, columns) -> rows of the weight, or of one half of it


def dynamic_int8(weight: QuantizedTensor) -> Tensor:
    """Our integers as the tensor that lowers to XNNPACK's kernels with int8 activations (per token, asymmetric)."""
    codes, scale = weight.codes, weight.scale.float()  # (out, in) int8, (out, groups)
    kinds: Any = torch
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        codes.contiguous(),
        scale.contiguous(),
        torch.zeros(scale.shape, dtype=torch.int8),
        {4: kinds.int4, 8: kinds.int8}[weight.config.bits],
        (1, codes.shape[1] // scale.shape[1]),
        torch.float32,
        ActivationQuantization.INT8_ASYM_PER_TOKEN,
    )
    return tensor


class Linear(nn.Module):
    """y = x W^T over integers or float32."""

    def __init__(self, name: str, weight: Weight, piece: int = 0) -> None:
        """Keep the weight.

        Args:
            name: of the weight in the checkpoint.
            weight: (out, in).
            piece: which of the weight's pieces this is.
        """
        super().__init__()
        self.name, self.piece, self.given = name, piece, weight
        value = dynamic_int8(weight) if isinstance(weight, QuantizedTensor) else weight
        self.weight = nn.Parameter(value, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return F.linear(x, self.weight)


class HalvedLinear(nn.Module):
    """A linear whose heads come as the two coordinates of each rotary plane, from a linear each: no slice in the graph."""

    def __init__(self, name: str, first: Weight, second: Weight) -> None:
        super().__init__()
        self.first, self.second = Linear(name, first, 0), Linear(name, second, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, in) -> two of (B, T, out/2)."""
        return self.first(x), self.second(x)


class MeanByLinear(nn.Module):
    """RMSNorm with the mean of squares as a product with a row of 1/n: XNNPACK takes no mean over the last axis."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        size = norm.weight.shape[0]
        self.register_buffer("mean_row", torch.full((1, size), 1.0 / size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> same."""
        return x * torch.rsqrt(self.mean(x * x) + self.eps) * (1.0 + self.weight)

    def mean(self, squares: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, 1)."""
        return F.linear(squares, self.get_buffer("mean_row"))


class HalvedNorm(nn.Module):
    """HeadNorm of what `HalvedLinear` gives: each half, divided by the root of the whole head's mean square."""

    def __init__(self, norm: HeadNorm) -> None:
        super().__init__()
        self.eps, self.size = norm.eps, norm.weight.shape[0] // 2
        self.first, self.second = (nn.Parameter(half.clone(), requires_grad=False) for half in norm.weight.chunk(2))
        self.register_buffer("mean_row", torch.full((1, self.size), 0.5 / self.size))

    def forward(self, halves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Two of (1, T, heads * D/2) -> two of (1, T, heads, D/2)."""
        a, b = (half.view(1, -1, half.shape[2] // self.size, self.size) for half in halves)
        factor = torch.rsqrt(self.share(a * a) + self.share(b * b) + self.eps)  # (1, T, heads, 1)
        return a * factor * (1.0 + self.first), b * factor * (1.0 + self.second)

    def share(self, squares: Tensor) -> Tensor:
        """What one half adds to the mean: (1, T, heads, D/2) -> (1, T, heads, 1)."""
        return F.linear(squares, self.get_buffer("mean_row"))


def vector_of(name: str, vector: Callable[[str], Tensor]) -> Tensor:
    """A norm that a half computes with, by its name there; `vector` gives the checkpoint's own by theirs."""
    norm, _, part = name.rpartition(".")
    if part == "weight":
        return vector(name)
    return vector(f"{norm}.weight").chunk(2)[("first", "second").index(part)].clone()


def tanh_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU's tanh approximation as x * sigmoid(2 y): XNNPACK would compute the error-function one."""
    assert approximate == "tanh"
    c = 2 * (2 / torch.pi) ** 0.5
    return x * torch.sigmoid(x * (x * x * (c * 0.044715) + c))


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {torch.ops.aten.gelu.default: tanh_gelu}


@dataclass(frozen=True)
class Limits:
    """The largest values of the free sizes."""

    chunk: int  # tokens in one call
    slots: int  # slots of the layer's cache


class Half(nn.Module):
    """One delegate's worth of the decoder. Names of weights and norms are relative to the block, or to `model.` for the head."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.group = config.num_attention_heads // config.num_key_value_heads

    def example(self, limits: Limits) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
        """Inputs to trace with, and which of their sizes are free."""
        raise NotImplementedError

    def outline(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Zeros of the outputs' shapes."""
        raise NotImplementedError


class _Cut:
    """`KVCache` that keeps what would be written and attended to."""

    def __init__(self, config: GemmaConfig) -> None:
        self.config = config
        self.out: tuple[Tensor, Tensor, Tensor]

    def attend(self, layer: int, q: Any, k: Any, v: Tensor, rope: Rope, input_pos: Tensor) -> Tensor:
        """Take q and k as `HalvedLinear` gives them, and v (1, T, K*D); rotate, and keep."""
        c = self.config
        kv_heads = c.num_key_value_heads
        q = self._rotated(q, c.num_attention_heads, rope) * c.query_pre_attn_scalar**-0.5  # (1, H, T, D)
        k = self._rotated(k, kv_heads, rope)  # (1, K, T, D)
        self.out = (
            q.view(kv_heads, -1, c.head_dim),  # (K, G*T, D)
            k.view(kv_heads, -1, 1, c.head_dim),  # (K, T, 1, D)
            v.view(1, -1, kv_heads, c.head_dim).transpose(1, 2).contiguous().view(kv_heads, -1, 1, c.head_dim),
        )
        return v  # to an output projection that is not there

    def _rotated(self, halves: tuple[Tensor, Tensor], heads: int, rope: Rope) -> Tensor:
        size = self.config.head_dim // 2
        a, b = (half.view(1, -1, heads, size).transpose(1, 2) for half in halves)  # (1, heads, T, D/2) each
        return rotate_halves(a, b, rope)


class ProjectHalf(Half):
    """A block up to what the cache is written with."""

    def __init__(self, config: GemmaConfig, block: DecoderLayer) -> None:
        super().__init__(config)
        self.block = block

    def example(self, limits: Limits) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
        """See `Half.example`."""
        tokens, c = Dim("tokens", min=1, max=limits.chunk), self.config
        angles = torch.zeros(TRACED, c.head_dim // 2)
        return (torch.zeros(1, TRACED, c.hidden_size), angles, angles.clone()), ({1: tokens}, {0: tokens}, {0: tokens})

    def outline(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `Half.outline`."""
        (x, *_), c = inputs, self.config
        kv_heads, tokens = c.num_key_value_heads, x.shape[1]
        new = (kv_heads, tokens, 1, c.head_dim)
        return torch.zeros(kv_heads, self.group * tokens, c.head_dim), torch.zeros(new), torch.zeros(new)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, keys and values of a chunk.

        Args:
            x: (1, T, hidden).
            cos, sin: (T, D/2).

        Returns:
            q: (K, G*T, D), scaled.
            k, v: (K, T, 1, D), as `llama.update_cache_with_indices` takes them.
        """
        cut = _Cut(self.config)
        self.block.self_attn(self.block.norm(self.block.norms.before_attention, x), cut, Rope(cos, sin), None)
        return cut.out


class _Resume:
    """`KVCache` that begins where the cache has been written."""

    def __init__(self, config: GemmaConfig, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        self.config, self.q, self.keys, self.values, self.mask = config, q, keys, values, mask

    def attend(self, layer: int, q: Any, k: Any, v: Any, rope: Rope, input_pos: Tensor) -> Tensor:
        """Soft-capped attention: (1, T, H*D)."""
        c = self.config
        group = c.num_attention_heads // c.num_key_value_heads
        scores = soft_cap(torch.bmm(self.q, self.keys.transpose(1, 2)), c.attn_logit_softcapping)  # (K, G*T, S)
        out = torch.bmm(torch.softmax(scores + self.mask, dim=-1), self.values)  # (K, G*T, D)
        out = out.view(c.num_key_value_heads, group, -1, c.head_dim)  # (K, G, T, D)
        return out.permute(2, 0, 1, 3).contiguous().view(1, -1, c.num_attention_heads * c.head_dim)


class AttendHalf(Half):
    """A block from the written cache on."""

    def __init__(self, config: GemmaConfig, block: DecoderLayer) -> None:
        super().__init__(config)
        self.block = block

    def example(self, limits: Limits) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
        """See `Half.example`."""
        c, kv_heads = self.config, self.config.num_key_value_heads
        tokens, used = Dim("tokens", min=1, max=limits.chunk), Dim("used", min=1, max=limits.slots)
        queries = self.group * TRACED
        cache = torch.zeros(kv_heads, TRACED_SLOTS, c.head_dim)
        inputs = (
            torch.zeros(1, TRACED, c.hidden_size),
            torch.zeros(kv_heads, queries, c.head_dim),
            cache,
            cache.clone(),
            torch.zeros(1, queries, TRACED_SLOTS),
        )
        free = self.group * tokens
        return inputs, ({1: tokens}, {1: free}, {1: used}, {1: used}, {1: free, 2: used})

    def outline(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `Half.outline`."""
        return (torch.zeros_like(inputs[0]),)

    def forward(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The block's output.

        Args:
            x: (1, T, hidden), the block's input.
            q: (K, G*T, D).
            keys, values: (K, S, D), the slots that hold something.
            mask: (1, G*T, S), added to the scores.

        Returns:
            (1, T, hidden).
        """
        out: Tensor = self.block(x, _Resume(self.config, q, keys, values, mask), None, None)
        return out


class Head(Half):
    """Final norm, a piece of the head's matrix, and soft cap. Its weights have their full names in the checkpoint."""

    def __init__(self, config: GemmaConfig, piece: Linear) -> None:
        super().__init__(config)
        self.rows = piece.weight.shape[0]
        self.model = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.piece = piece

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, hidden) -> logits (1, T, rows)."""
        return soft_cap(self.piece(self.model["norm"](x)), self.config.final_logit_softcapping)

    def example(self, limits: Limits) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
        """See `Half.example`."""
        return (torch.zeros(1, TRACED, self.config.hidden_size),), ({1: Dim("tokens", min=1, max=limits.chunk)},)

    def outline(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `Half.outline`."""
        return (torch.zeros(1, inputs[0].shape[1], self.rows),)


def linears_of(half: type[Half], config: GemmaConfig, layer: int) -> list[str]:
    """The weights that one half of a layer computes with."""
    names = linear_shapes(config, layer)
    return [name for name in names if (name.rpartition(".")[2] in PROJECTED) == (half is ProjectHalf)]


def block_half(half: type[ProjectHalf] | type[AttendHalf], config: GemmaConfig, layer: int, weight: Rows) -> Half:
    """One half of a layer over given weights; what the other half computes with is not there."""

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        relative = name.removeprefix(f"model.layers.{layer}.")
        if name not in linears_of(half, config, layer):
            return nn.Identity()
        if not is_halved(name):
            return Linear(relative, weight(name, out_features, in_features))
        return HalvedLinear(relative, *(weight(name, out_features // 2, in_features) for _ in range(2)))

    block = DecoderLayer(config, layer, Layers(linear))
    if half is not ProjectHalf:
        block.self_attn.q_norm = block.self_attn.k_norm = nn.Identity()
    return _ready(half(config, block))


def head_piece(config: GemmaConfig, weight: Rows) -> Half:
    """The head over one piece of its matrix."""
    shape = config.vocab_size, config.hidden_size
    rows = shape[0] // pieces_of(config.head, shape)
    return _ready(Head(config, Linear(config.head, weight(config.head, rows, shape[1]))))


def _ready(half: Half) -> Half:
    """Every norm replaced by one that a delegate takes whole. XNNPACK gets their weights as inputs: any value does."""
    for parent in list(half.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RMSNorm):
                child.weight.zero_()
                setattr(parent, name, HalvedNorm(child) if isinstance(child, HeadNorm) else MeanByLinear(child))
    return half.eval()
