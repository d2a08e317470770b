"""Reads a finished static graph back and compares it with what it should hold: no operator or shape that an NPU lacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx_ir as ir

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.onnx.check import (
    SMALL_BYTES,
    check_counts,
    check_gelus,
    check_integers,
    check_weights,
    expected_counts,
    stored_name,
)
from gemma_edge.export.onnx.graph import cache_names
from gemma_edge.export.onnx.plain import FEEDS, fed_names, tokens_of
from gemma_edge.export.onnx.weights import HEAD_PACKED, Blob
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import rotary_buffers
from gemma_edge.quantize.recipe import QuantConfig

# PLAIN: what a static graph may hold besides the operators that carry the model
PLAIN: Final = frozenset(
    (
        "Add",
        "Cast",
        "Concat",
        "Constant",
        "Div",
        "Expand",
        "Gather",
        "Mul",
        "Reshape",
        "Slice",
        "Split",
        "Sub",
        "Transpose",
    )
)


def check_static_graph(
    path: Path,
    role: str,
    config: GemmaConfig,
    configs: Mapping[str, QuantConfig | None],
    geometry: CacheGeometry,
    blobs: list[Blob],
) -> None:
    """Check a saved graph of plain.py against the model it should be.

    Args:
        path, role: the graph, one of plain.py's ROLES.
        config, configs, geometry: the model, its integers, and its caches.
        blobs: what the graph holds of the weights file.

    Raises:
        RuntimeError: names the first thing that is not as expected.
    """
    graph = ir.load(path).graph
    numbers = 8 * max(layer.slots for layer in geometry.layers) if role == FEEDS else 0  # of slots, in 64 bits
    check_weights(path, graph, blobs, max(numbers, SMALL_BYTES))
    check_integers(path, graph, config, configs)
    if role == FEEDS:
        names = [value.name for value in graph.outputs]
        if names != fed_names(config, geometry):
            raise RuntimeError(f"{path.name}: it makes {names}, expected {fed_names(config, geometry)}")
        return
    _check_counts(path, graph, config, configs)
    _check_shapes(path, graph, role, config, geometry)
    *_, product = (node for node in graph if node.op_type in ("MatMul", "MatMulNBits"))
    head = stored_name(product.inputs[1])
    if head not in (f"{config.head}.weight", HEAD_PACKED):
        raise RuntimeError(f"{path.name}: the head is {head}")
    check_gelus(path, graph)


def _check_counts(path: Path, graph: ir.Graph, config: GemmaConfig, configs: Mapping[str, QuantConfig | None]) -> None:
    layers = config.num_hidden_layers
    usual = expected_counts(config, configs)
    caps = (layers if config.attn_logit_softcapping is not None else 0) + usual["Tanh"]
    expected = {
        "ScatterElements": 2 * layers,
        "Softmax": layers,
        "RMSNormalization": usual["RMSNormalization"],
        "Gelu": layers,
        "MatMulNBits": usual["MatMulNBits"],
        "MatMul": usual["MatMul"] + 2 * layers,  # scores and values
        "Tanh": caps,
    }
    check_counts(path, graph, expected)
    if odd := sorted({node.op_type for node in graph} - expected.keys() - PLAIN):
        raise RuntimeError(f"{path.name}: {odd[0]} is no plain operator")


def _check_shapes(path: Path, graph: ir.Graph, role: str, config: GemmaConfig, geometry: CacheGeometry) -> None:
    tokens, half = tokens_of(role, config, geometry), config.head_dim // 2
    fed = [(1, tokens, config.hidden_size), *[(tokens, half)] * (2 * len(rotary_buffers(config)))]
    for kind in geometry.kinds:
        fed += [(tokens,), (tokens, kind.slots)]
    caches = [
        (1, geometry.kv_heads, layer.slots, geometry.head_dim) for layer in geometry.layers for _ in ("key", "value")
    ]
    rows = tokens if role == "score" else 1
    inputs = [*fed_names(config, geometry), *cache_names(config.num_hidden_layers, "past_key_values")]
    outputs = ["logits", *cache_names(config.num_hidden_layers, "present")]
    for values, names, shapes in (
        (graph.inputs, inputs, [*fed, *caches]),
        (graph.outputs, outputs, [(1, rows, config.vocab_size), *caches]),
    ):
        found = [(value.name, tuple(value.shape or ())) for value in values]
        if found != list(zip(names, shapes, strict=True)):
            odd = next(pair for pair in zip(found, zip(names, shapes, strict=True), strict=False) if pair[0] != pair[1])
            raise RuntimeError(f"{path.name}: {odd[0]}, expected {odd[1]}")
