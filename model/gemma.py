"""The decoder of Gemma, Gemma 2 and Gemma 3, in the order of the papers. Which of them it is, the configuration says.

Source: Gemma report (arXiv 2403.08295), Gemma 2 report (2408.00118), Gemma 3 report (2503.19786); HF modeling_gemma.py,
modeling_gemma2.py and modeling_gemma3.py.

A backend may replace three seams, and nothing else: `Linear`, `Embedding` and `KVCache.attend`. Module and parameter names are
Hugging Face's, so that a checkpoint's tensor names are also the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_edge.model.config import HEAD, TABLE, GemmaConfig, Rotary
from gemma_edge.model.kv_cache import KVCache, Rope
from gemma_edge.model.soft_cap import soft_cap


class Linear(nn.Module):
    """y = x W^T, without bias."""

    def __init__(self, name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return F.linear(x, self.weight)


class TiedTable(Protocol):
    """What the decoder needs from an embedding."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, hidden)."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, V), without the softcap."""
        ...


class Embedding(nn.Module):
    """The table: it turns tokens into vectors and, where the head is tied to it, vectors into logits."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, hidden)."""
        return F.embedding(tokens, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, V)."""
        return F.linear(x, self.weight)


@dataclass(frozen=True)
class Layers:
    """Builds the two weight seams from the name of the weight in the checkpoint, without `.weight`."""

    linear: Callable[[str, int, int], nn.Module] = Linear
    embedding: Callable[[str, int, int], TiedTable] = Embedding


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w), because Gemma stores a norm's weight minus one."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        return F.rms_norm(x, (x.shape[-1],), 1.0 + self.weight, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of each head on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, T, heads * D)."""
        heads = x.view(x.shape[0], -1, x.shape[2] // self.weight.shape[0], self.weight.shape[0])  # (B, T, heads, D)
        return super().forward(heads).view(x.shape[0], -1, x.shape[2])  # (B, T, heads * D)


class Attention(nn.Module):
    """Grouped-query attention; scores, masks and the cache are `KVCache.attend`'s."""

    def __init__(self, config: GemmaConfig, layer: int, layers: Layers) -> None:
        super().__init__()
        self.layer = layer
        name, hidden = f"model.layers.{layer}.self_attn", config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = layers.linear(f"{name}.q_proj", hidden, q_size)
        self.k_proj = layers.linear(f"{name}.k_proj", hidden, kv_size)
        self.v_proj = layers.linear(f"{name}.v_proj", hidden, kv_size)
        self.o_proj = layers.linear(f"{name}.o_proj", q_size, hidden)
        self.q_norm, self.k_norm = (
            HeadNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x: Tensor, cache: KVCache, rope: Rope, input_pos: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        out: Tensor = self.o_proj(cache.attend(self.layer, q, k, v, rope, input_pos))
        return out


class MLP(nn.Module):
    """GeGLU with the tanh approximation of GELU."""

    def __init__(self, config: GemmaConfig, layer: int, layers: Layers) -> None:
        super().__init__()
        name, hidden, ffn = f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size
        self.gate_proj = layers.linear(f"{name}.gate_proj", hidden, ffn)
        self.up_proj = layers.linear(f"{name}.up_proj", hidden, ffn)
        self.down_proj = layers.linear(f"{name}.down_proj", ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """One block, normalised before each branch and, from Gemma 2 on, after it."""

    def __init__(self, config: GemmaConfig, layer: int, layers: Layers | None = None) -> None:
        super().__init__()
        layers = layers or Layers()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, layers)
        self.mlp = MLP(config, layer, layers)
        self.norms = config.norms
        for name in self.norms.names:
            self.add_module(name, RMSNorm(hidden, eps))

    def norm(self, name: str | None, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden), by one of `norms`; as it is where the family has none there."""
        out: Tensor = x if name is None else self.get_submodule(name)(x)
        return out

    def forward(self, x: Tensor, cache: KVCache, rope: Rope, input_pos: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        n = self.norms
        x = x + self.norm(n.after_attention, self.self_attn(self.norm(n.before_attention, x), cache, rope, input_pos))
        x = x + self.norm(n.after_mlp, self.mlp(self.norm(n.before_mlp, x)))
        return x


class GemmaModel(nn.Module):
    """Embedding, blocks and final norm: everything below the head."""

    def __init__(self, config: GemmaConfig, layers: Layers | None = None) -> None:
        super().__init__()
        layers = layers or Layers()
        self.config = config
        self.embed_tokens = layers.embedding(TABLE, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, layers) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, inv_freq in inverse_frequencies(config).items():
            self.register_buffer(name, inv_freq, persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        """(B, T) int64 tokens at `input_pos` (1,) -> (B, T, hidden)."""
        ropes = layer_ropes(self, self.config, input_pos, tokens.shape[1])
        x = self.embed_tokens(tokens) * self.config.hidden_size**0.5
        for layer, rope in zip(self.layers, ropes, strict=True):
            x = layer(x, cache, rope, input_pos)
        out: Tensor = self.norm(x)
        return out


class Gemma(nn.Module):
    """The whole language model."""

    def __init__(self, config: GemmaConfig, layers: Layers | None = None) -> None:
        super().__init__()
        self.config = config
        layers = layers or Layers()
        self.model = GemmaModel(config, layers)
        self.lm_head: nn.Module | None = None
        if not config.tie_word_embeddings:
            self.lm_head = layers.linear(HEAD, config.hidden_size, config.vocab_size)

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, T, V) of the tokens (B, T) written at `input_pos` (1,)."""
        return self.head(self.model(tokens, input_pos, cache))

    def head(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> soft-capped logits (B, T, V)."""
        logits = self.model.embed_tokens.logits(x) if self.lm_head is None else self.lm_head(x)
        return soft_cap(logits, self.config.final_logit_softcapping)


def rotary_buffers(config: GemmaConfig) -> dict[Rotary, str]:
    """The different rotary embeddings among the layers, and the name of each one's buffer of inverse frequencies."""
    rotaries = dict.fromkeys(config.rotary(layer) for layer in range(config.num_hidden_layers))
    return {rotary: f"inv_freq_{index}" if index else "inv_freq" for index, rotary in enumerate(rotaries)}


def inverse_frequencies(config: GemmaConfig) -> dict[str, Tensor]:
    """Inverse frequencies (D/2,) float32 by the name of their buffer, on the CPU even when the model is built on `meta`."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    return {name: 1.0 / rotary.theta**exponents / rotary.factor for rotary, name in rotary_buffers(config).items()}


def rotary_angles(inv_freq: Tensor, input_pos: Tensor, tokens: int) -> Rope:
    """Rotary angles of `tokens` positions from `input_pos` (1,) on. They are computed, not looked up: no position is the last."""
    return angles_at(inv_freq, input_pos + torch.arange(tokens))


def angles_at(inv_freq: Tensor, positions: Tensor) -> Rope:
    """Rotary angles of positions (T,)."""
    angles = positions.to(torch.float32)[:, None] * inv_freq[None, :]  # (T, D/2)
    return Rope(angles.cos(), angles.sin())


def layer_ropes(module: nn.Module, config: GemmaConfig, input_pos: Tensor, tokens: int) -> list[Rope]:
    """The rotary angles of every layer, from the module's buffers. Layers with the same rotary embedding share them."""
    ropes = {
        rotary: rotary_angles(module.get_buffer(name), input_pos, tokens)
        for rotary, name in rotary_buffers(config).items()
    }
    return [ropes[config.rotary(layer)] for layer in range(config.num_hidden_layers)]


def layer_rope(config: GemmaConfig, layer: int, input_pos: Tensor, tokens: int) -> Rope:
    """The rotary angles of one layer on its own."""
    inv_freq = inverse_frequencies(config)[rotary_buffers(config)[config.rotary(layer)]]
    return rotary_angles(inv_freq, input_pos, tokens)
