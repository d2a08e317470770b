"""transformers' Gemma with its keys (rotated) and values looked at, or rounded as an int8 cache rounds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from gemma_edge.quantize.checkpoint.kv_scales import KVRanges, KVScales
from support.checkpoints import HFModel, hf_logits


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """(B, K, T, D) as the int8 cache of ONNX Runtime holds it under scales (K, D)."""
    scale = scale[:, None]  # (K, 1, D)
    return (x * (1.0 / scale)).round().clamp(-128, 127) * scale


def round_kv(model: HFModel, scales: KVScales) -> None:
    """From now on the model attends to rounded keys and values."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        k_scale, v_scale = scales[module.layer_idx]
        return eager_attention_forward(module, q, rounded(k, k_scale), rounded(v, v_scale), mask, **options)

    AttentionInterface.register("rounded_kv", attend)
    model.set_attn_implementation("rounded_kv")


def kv_ranges(model: HFModel, ids: Tensor) -> KVRanges:
    """Ranges of K and V over the tokens (T,)."""
    ranges = KVRanges()

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        ranges.add(module.layer_idx, k, v)
        return eager_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register("recorded_kv", attend)
    AttentionMaskInterface.register("recorded_kv", eager_mask)  # else transformers makes no mask, not even a causal one
    model.set_attn_implementation("recorded_kv")
    hf_logits(model, ids)
    model.set_attn_implementation("eager")
    return ranges
