"""A Gemma 2 checkpoint with outlier channels that computes what the original computes.

Channels get heavy-tailed scales where the next matrix can take them back: pre-norm -> q, k, v; pre-norm -> gate, up; up -> down;
v -> o, one scale per kv head and dim, since the q heads of a group share it. A large model has such outliers in its
activations and the demo model has none; a method that scales channels for quantization (AWQ) must undo them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SPREAD = 0.3  # of the log of a scale, before the tail
WIDEST = 64.0  # scales lie between 1 / WIDEST and WIDEST
DEGREES = 3  # of freedom of Student's t: few channels are large, and those very


def heavy_tailed_scales(count: int, draw: torch.Generator) -> Tensor:
    """(count,) float64: e ^ (SPREAD t), t of Student's distribution."""
    normal = torch.randn(1 + DEGREES, count, generator=draw, dtype=torch.float64)
    t = normal[0] / normal[1:].square().mean(0).sqrt()
    return (SPREAD * t).exp().clamp(1 / WIDEST, WIDEST)


def scale_channels(weights: dict[str, Tensor], config: dict[str, int], *, seed: int) -> dict[str, Tensor]:
    """The same function with outliers.

    Args:
        weights: a Gemma 2 checkpoint's tensors; matrices (out, in).
        config: its config.json.
        seed: of the scales.

    Returns:
        float32 tensors under the same names.
    """
    draw = torch.Generator().manual_seed(seed)
    new = {name: t.double() for name, t in weights.items()}
    kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    group = config["num_attention_heads"] // kv_heads
    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        norms = {
            f"model.layers.{i}.input_layernorm.weight": [f"{attention}{n}_proj.weight" for n in "qkv"],
            f"model.layers.{i}.pre_feedforward_layernorm.weight": [f"{mlp}{n}_proj.weight" for n in ("gate", "up")],
        }
        for norm, readers in norms.items():
            scales = heavy_tailed_scales(config["hidden_size"], draw)
            new[norm] = (1 + new[norm]) * scales - 1  # the norm multiplies by 1 + w
            for name in readers:
                new[name] = new[name] / scales
        scales = heavy_tailed_scales(config["intermediate_size"], draw)
        new[f"{mlp}up_proj.weight"] = new[f"{mlp}up_proj.weight"] * scales[:, None]
        new[f"{mlp}down_proj.weight"] = new[f"{mlp}down_proj.weight"] / scales
        per_kv_head = heavy_tailed_scales(kv_heads * head_dim, draw).view(kv_heads, head_dim)  # (K, D)
        per_q_head = per_kv_head.repeat_interleave(group, dim=0)  # (H, D)
        new[f"{attention}v_proj.weight"] = new[f"{attention}v_proj.weight"] * per_kv_head.flatten()[:, None]
        new[f"{attention}o_proj.weight"] = new[f"{attention}o_proj.weight"] / per_q_head.flatten()
    return {name: t.float().contiguous() for name, t in new.items()}


def write_heavy_tailed(source: Path, out: Path, *, seed: int = 0) -> Path:
    """Write a folder like `source` (one safetensors file, plain floats) with outlier channels, in float32."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    save_file(scale_channels(weights, config, seed=seed), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    return out
