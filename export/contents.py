"""What a manifest says of a bundle's making: what each kind of weight became, and with which versions of which tools."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import gemma_edge
from gemma_edge.model.checkpoint import weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint

TOOLS = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "executorch",
    "torchao",
    "ai-edge-litert",
    "safetensors",
    "tokenizers",
    "numpy",
)


def tool_versions() -> dict[str, str]:
    """Versions of what made a bundle, where installed."""
    found = {"gemma-edge": gemma_edge.__version__}
    for tool in TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parts(quantized: QuantizedCheckpoint, float_bits: int) -> list[dict[str, Any]]:
    """What each kind of weight became: one row per kind, bits and group."""
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for name, (out_features, in_features) in weight_shapes(quantized.config).items():
        config = quantized.configs[name]
        bits = config.bits if config else float_bits
        group = config.group_size if config else 0
        kind = name.split(".", 3)[-1] if ".layers." in name else name.removeprefix("model.")
        weights = out_features * in_features
        row = rows.setdefault(
            (kind, bits, group), {"part": kind, "bits": bits, "group_size": group, "count": 0, "weights": 0, "bytes": 0}
        )
        row["count"] += 1
        row["weights"] += weights
        row["bytes"] += config.stored_bytes(out_features, in_features) if config else weights * bits // 8
    return list(rows.values())
