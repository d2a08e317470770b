"""Soft caps on the final logits and on the attention scores, which are computed here too. Gemma 3 has none.

Source: Gemma 2 report, section 2 ("Logit soft-capping"); HF modeling_gemma2.py, `eager_attention_forward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_edge.model.config import GemmaConfig


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap); unchanged without a cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def soft_capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, config: GemmaConfig) -> Tensor:
    """softmax(cap * tanh(q k^T / sqrt(query_pre_attn_scalar) / cap)) v over the visible slots.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D); each kv head serves H/K query heads.
        mask: (T, S) bool.

    Returns:
        (B, H, T, D).
    """
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q = q.reshape(batch, kv_heads, group * tokens, head_dim)  # (B, K, G*T, D)
    scores = q @ k.transpose(2, 3) * config.query_pre_attn_scalar**-0.5  # (B, K, G*T, S)
    scores = soft_cap(scores, config.attn_logit_softcapping)
    scores = scores.masked_fill(~mask.repeat(group, 1), float("-inf"))
    out: Tensor = (scores.softmax(dim=-1) @ v).reshape(batch, heads, tokens, head_dim)
    return out
