"""Reads a finished graph back and compares it with what it should hold: silent wrong numbers start with an unexpected node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.onnx.seams import BIAS_INPUT, INT8_CACHE, KEPT, SCALE_INPUTS
from gemma_edge.export.onnx.weights import HEAD_PACKED, Blob
from gemma_edge.model.checkpoint import TABLE, norm_sizes, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.checkpoint.kv_scales import KINDS, scale_name
from gemma_edge.quantize.recipe import QuantConfig

USUAL = (0, 1, 2, 5, 6)  # inputs of GroupQueryAttention that are neither weight nor cache: q, k, v and lengths
SMALL_BYTES = 4096  # constants the exporter makes; anything larger must be one of the known weights
# operator -> which of its inputs are the packed codes and their scales
QUANTIZED_INPUTS = {"MatMulNBits": (1, 2), "GatherBlockQuantized": (0, 2)}


def check_graph(
    path: Path,
    config: GemmaConfig,
    configs: Mapping[str, QuantConfig | None],
    geometry: CacheGeometry,
    blobs: list[Blob],
    *,
    windowed: bool,
) -> None:
    """Check a saved graph against the model it should be.

    Args:
        path: the graph.
        config, configs, geometry: the model, its integers, and its caches.
        blobs: layout of the weights file.
        windowed: the cache slides inside GroupQueryAttention (ours); False: the window is only a mask (genai's).

    Raises:
        RuntimeError: names the first thing that is not as expected.
    """
    graph = ir.load(path).graph
    check_counts(path, graph, expected_counts(config, configs))
    _check_attention(path, graph, config, geometry, windowed)
    check_weights(path, graph, blobs)
    check_integers(path, graph, config, configs)
    _check_table_and_head(path, graph, config)
    check_gelus(path, graph)


def expected_counts(config: GemmaConfig, configs: Mapping[str, QuantConfig | None]) -> dict[str, int]:
    """How often each operator that carries the model occurs."""
    layers = config.num_hidden_layers
    # every matrix is multiplied, except an untied table: only its rows are gathered
    multiplied = [configs[name] is not None for name in configs if name != TABLE or config.tie_word_embeddings]
    return {
        "GroupQueryAttention": layers,
        "RotaryEmbedding": 2 * layers,
        "RMSNormalization": len(norm_sizes(config)),
        "Gelu": layers,
        "MatMulNBits": multiplied.count(True),
        "MatMul": multiplied.count(False),
        "GatherBlockQuantized": int(configs[TABLE] is not None),
        "Tanh": int(config.final_logit_softcapping is not None),
    }


def check_counts(path: Path, graph: ir.Graph, expected: Mapping[str, int]) -> None:
    """Each of these operators occurs as often as expected."""
    counts = Counter(node.op_type for node in graph)
    for op, count in expected.items():
        if counts[op] != count:
            raise RuntimeError(f"{path.name}: {counts[op]} {op} nodes, expected {count}")


def check_gelus(path: Path, graph: ir.Graph) -> None:
    """Every Gelu is Gemma's."""
    for node in graph:
        if node.op_type == "Gelu" and node.attributes["approximate"].as_string() != "tanh":
            raise RuntimeError(f"{path.name}: a Gelu is not the tanh approximation")


def _check_attention(path: Path, graph: ir.Graph, config: GemmaConfig, geometry: CacheGeometry, windowed: bool) -> None:
    for layer, node in enumerate(node for node in graph if node.op_type == "GroupQueryAttention"):
        cache = geometry.layers[layer]
        slides = windowed and not cache.pinned
        expected: dict[str, float] = {
            "local_window_size": cache.window if slides or config.is_local(layer) else -1,
            "sliding_window_cache": int(slides),
            "softcap": config.attn_logit_softcapping or 0.0,
            "scale": config.query_pre_attn_scalar**-0.5,
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "do_rotary": 0,
        }
        for name, value in expected.items():
            actual = node.attributes[name].value
            if abs(actual - value) > 1e-6 * abs(value):
                raise RuntimeError(f"{path.name}: layer {layer} attends with {name} {actual}, expected {value}")
        _check_cache(path, node, layer, geometry.dtype, biased=windowed and cache.pinned > 0)


def _check_cache(path: Path, node: ir.Node, layer: int, dtype: str, *, biased: bool) -> None:
    """An attention node reads and writes the caches of its layer, in their type, and rounds to the scales of its layer."""
    int8 = dtype == "int8"
    kinds = ("key", "value")
    expected = {
        **{3 + i: f"past_key_values.{layer}.{kind}" for i, kind in enumerate(kinds)},
        **{i: scale_name(layer, kind) for i, kind in zip(SCALE_INPUTS, KINDS, strict=True) if int8},
        **({BIAS_INPUT: KEPT[1]} if biased else {}),
    }
    inputs = {index: value.name for index, value in enumerate(node.inputs) if value is not None and index not in USUAL}
    if inputs != expected:
        odd = min(index for index, _ in inputs.items() ^ expected.items())
        raise RuntimeError(f"{path.name}: attention {layer} reads {inputs.get(odd)}, expected {expected.get(odd)}")
    for value, name in zip(node.outputs[1:], kinds, strict=True):
        if value.name != f"present.{layer}.{name}":
            raise RuntimeError(f"{path.name}: attention {layer} writes {value.name}, expected present.{layer}.{name}")
    for cache in (*node.inputs[3:5], *node.outputs[1:]):
        if cache is None or cache.dtype != ir.DataType.from_numpy(np.dtype(dtype)):
            raise RuntimeError(f"{path.name}: a cache of layer {layer} is {cache and cache.dtype}, expected {dtype}")
    for attribute, setting in INT8_CACHE.items():
        actual = node.attributes[attribute].value if attribute in node.attributes else None
        if actual != (setting if int8 else None):
            raise RuntimeError(f"{path.name}: layer {layer} attends with {attribute} {actual} over a cache of {dtype}")


def check_weights(path: Path, graph: ir.Graph, blobs: list[Blob], small: int = SMALL_BYTES) -> None:
    """Every weight is in the file once, at its place, and no other constant is large (a float copy of a weight would be)."""
    by_name = {blob.name: blob for blob in blobs}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if not isinstance(tensor, ir.ExternalTensor):
            if tensor.nbytes > small:
                raise RuntimeError(f"{path.name}: constant {name} of {tensor.nbytes} bytes is inside the graph")
            continue
        blob = by_name.get(name) or (by_name.get(f"{TABLE}.weight_packed") if name == HEAD_PACKED else None)
        if blob is None:
            raise RuntimeError(f"{path.name}: {name} is in the graph but not in the weights file")
        if (tensor.offset, tensor.length) != (blob.offset, blob.nbytes):
            raise RuntimeError(
                f"{path.name}: {name} points to {tensor.offset}+{tensor.length}, written at {blob.offset}"
            )
    held = set(graph.initializers)
    if (
        HEAD_PACKED in held - by_name.keys()
    ):  # the table's bytes, which a graph that looks nothing up has under this name only
        held.add(f"{TABLE}.weight_packed")
    missing = {blob.name for blob in blobs} - held
    if missing:
        raise RuntimeError(f"{path.name}: {sorted(missing)[0]} is in the weights file but not in the graph")


def check_integers(path: Path, graph: ir.Graph, config: GemmaConfig, configs: Mapping[str, QuantConfig | None]) -> None:
    """Bits, shape and group of every quantized operator are its weight's, and so are the scales that it reads.

    A group is as many whole blocks as share a scale; the kernel takes the next scale after each block.
    """
    shapes = weight_shapes(config)
    for node in graph:
        if node.op_type not in QUANTIZED_INPUTS:
            continue
        packed, scale = (node.inputs[index] for index in QUANTIZED_INPUTS[node.op_type])
        assert packed is not None and packed.name is not None and scale is not None
        weight = config.head if packed.name == HEAD_PACKED else packed.name.removesuffix(".weight_packed")
        quant, (rows, columns) = configs[weight], shapes[weight]
        if quant is None:
            raise RuntimeError(f"{path.name}: {node.op_type} reads {weight}, which is float")
        expected = {"bits": quant.bits}
        if node.op_type == "MatMulNBits":
            expected |= {"N": rows, "K": columns}
        for name, value in expected.items():
            actual = node.attributes[name].as_int()
            if actual != value:
                raise RuntimeError(f"{path.name}: {node.op_type} of {weight} has {name} {actual}, expected {value}")
        group, block = quant.group_size or columns, node.attributes["block_size"].as_int()
        if group % block:
            raise RuntimeError(f"{path.name}: {node.op_type} of {weight} has block_size {block}, no part of {group}")
        scales, expected_scales = tuple(scale.shape or ()), (rows, columns // block)
        if scale.name != f"{weight}.weight_scale" or scales != expected_scales:
            raise RuntimeError(
                f"{path.name}: {node.op_type} of {weight} with block_size {block} reads {scale.name} {list(scales)},"
                f" expected {weight}.weight_scale {list(expected_scales)}"
            )


def _check_table_and_head(path: Path, graph: ir.Graph, config: GemmaConfig) -> None:
    """Tokens must look up rows of the table, and logits must be products with the head: the shapes of both are the same."""
    (lookup,) = (
        node
        for node in graph
        if any(v is not None and v.name == "input_ids" for v in node.inputs) and node.op_type.startswith("Gather")
    )
    *_, product = (node for node in graph if node.op_type in ("MatMul", "MatMulNBits"))
    for what, value, expected in (
        ("table", lookup.inputs[0], {f"{TABLE}.weight", f"{TABLE}.weight_packed"}),
        ("head", product.inputs[1], {f"{config.head}.weight", HEAD_PACKED}),
    ):
        name = stored_name(value)
        if name not in expected:
            raise RuntimeError(f"{path.name}: the {what} is {name}, expected {sorted(expected)[0]}")


def stored_name(value: ir.Value | None) -> str | None:
    """The name of the initializer behind a value, which may have been cast or transposed."""
    while value is not None and (node := value.producer()) is not None:
        value = node.inputs[0]
    return value.name if value is not None else None
