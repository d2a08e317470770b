"""From the decoder to three small graphs over one weights file: generate, score, and onnxruntime-genai's contract.

The model is traced once, without weights. The other two graphs are the first with a few nodes changed.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import convenience
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor, nn

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.hollow import hollow
from gemma_edge.export.onnx.seams import BIAS_INPUT, KEPT, GroupQueryAttention
from gemma_edge.export.onnx.weights import HEAD_PACKED, Blob
from gemma_edge.model.checkpoint import TABLE
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import Gemma, Layers
from gemma_edge.quantize.checkpoint.kv_scales import KINDS, scale_name

OPSET = 23
TRACED, TRACED_BIAS = 3, (4, 7)  # values of the free sizes while tracing
MODULE = "gemma2"  # name of the decoder inside the traced module
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
}
CACHE_DTYPES = {"float32": torch.float32, "int8": torch.int8}  # by `CacheGeometry.dtype`


class Step(nn.Module):
    """One chunk through the decoder: the graph's inputs and outputs."""

    def __init__(self, config: GemmaConfig, geometry: CacheGeometry, layers: Layers) -> None:
        super().__init__()
        self.geometry = geometry
        decoder = Gemma(config, layers)
        if geometry.dtype == "int8":
            for layer in decoder.model.layers:
                for kind in KINDS:  # so that they have the checkpoint's names
                    scale = torch.empty(1, geometry.kv_heads, 1, geometry.head_dim)
                    layer.get_submodule("self_attn").register_buffer(kind, scale)
        self.add_module(MODULE, decoder)

    def forward(
        self, input_ids: Tensor, input_pos: Tensor, past: list[Tensor], kept: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits (1, 1, V) of the last of the tokens (1, T), and the caches after them.

        `kept` is what `KEPT` names, where layers keep the beginning of a text; else it is empty.
        """
        decoder = self.get_submodule(MODULE)
        assert isinstance(decoder, Gemma)
        count = decoder.config.num_hidden_layers if self.geometry.dtype == "int8" else 0
        scales = [decoder.get_buffer(scale_name(layer, kind)) for layer in range(count) for kind in KINDS]
        past_rows, bias = kept or (None, None)
        cache = GroupQueryAttention(decoder.config, self.geometry, past, scales, past_rows, bias)
        x = decoder.model(input_ids, input_pos, cache)  # (1, T, hidden)
        return decoder.head(x[:, -1:]), *cache.present  # the 256k-row head never runs over a prompt


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the cache's graph inputs ("past_key_values") or outputs ("present"), in the order of `Step`."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def trace(config: GemmaConfig, geometry: CacheGeometry, layers: Layers) -> ir.Model:
    """The generation graph, its weights nameless holes: see `attach_weights`."""
    with torch.device("meta"):
        step = Step(config, geometry, layers).eval()
    step.load_state_dict({name: hollow(value) for name, value in step.state_dict().items()}, assign=True)
    kv = [(1, geometry.kv_heads, layer.slots, geometry.head_dim) for layer in geometry.layers for _ in ("key", "value")]
    past = [hollow(torch.empty(shape, device="meta", dtype=CACHE_DTYPES[geometry.dtype])) for shape in kv]
    count = config.num_hidden_layers
    tokens = torch.export.Dim("tokens", min=1, max=1 << 20)
    # sizes of their own, or the number of tokens would be read from the bias, which genai's graph does not have
    bias = {axis: torch.export.Dim(name, min=1, max=1 << 24) for axis, name in ((2, "queries"), (3, "rows"))}
    kept = [torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, *TRACED_BIAS)] if geometry.pinned else []
    model = onnx_program(
        step,
        (torch.zeros(1, TRACED, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), past, kept),
        input_names=["input_ids", "input_pos", *cache_names(count, "past_key_values"), *KEPT[: len(kept)]],
        output_names=["logits", *cache_names(count, "present")],
        dynamic_shapes=({1: tokens}, None, [None] * len(past), [None, bias][: len(kept)]),
    )
    for value in model.graph.inputs:
        if value.name == "input_ids":
            value.shape = ir.Shape([1, "tokens"])
        if value.name == KEPT[1]:
            value.shape = ir.Shape([1, 1, "tokens", "rows"])
    return model


def onnx_program(step: nn.Module, arguments: tuple[Any, ...], **options: Any) -> ir.Model:
    """A module as a graph whose weights are nameless holes: see `attach_weights`.

    Args:
        step: the module, its weights hollow.
        arguments: what it is called with while it is traced.
        options: `torch.onnx.export`'s.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # the exporter's own optimiser reads the weights, and there are none
            verbose=False,
            **options,
        )
    assert program is not None
    model: ir.Model = program.model
    _simplify(model)
    return model


def _simplify(model: ir.Model) -> None:
    """Fold constants and drop what is unused, without looking at weights."""
    for name, value in model.graph.initializers.items():
        if name.startswith(f"{MODULE}.") and "inv_freq" not in name:
            value.const_value = None
    optimizer.fold_constants(model)
    for step in (
        common.LiftConstantsToInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)


def attach_weights(model: ir.Model, blobs: list[Blob], file_name: str) -> None:
    """Point every weight of the graph to its bytes in the weights file.

    Raises:
        RuntimeError: a weight of the graph is not in the file, or the other way round, or differs in shape or type.
    """
    graph = model.graph
    _use_norms_plus_one(graph)
    _name_table_twice(graph)
    holes = {name.removeprefix(f"{MODULE}."): v for name, v in graph.initializers.items() if v.const_value is None}
    by_name = {blob.name: blob for blob in blobs}
    expected = set(by_name) | ({HEAD_PACKED} & holes.keys())
    if set(holes) != expected:
        raise RuntimeError(f"graph and weights file differ in {sorted(set(holes) ^ expected)[:4]}")
    for name, value in holes.items():
        old_name = value.name
        blob = by_name[name if name in by_name else f"{TABLE}.weight_packed"]
        shape = tuple(value.shape or ())
        same_bytes = name not in by_name and value.dtype == ir.DataType.UINT8
        if not same_bytes and (shape != blob.shape or value.dtype != DTYPES[blob.dtype]):
            raise RuntimeError(f"{name}: the graph has {value.dtype} {shape}, the file {blob.dtype} {blob.shape}")
        tensor_shape = value.shape
        assert tensor_shape is not None and value.dtype is not None and old_name is not None
        graph.initializers.pop(old_name)
        value.name = name
        value.const_value = ir.ExternalTensor(
            file_name, blob.offset, blob.nbytes, value.dtype, shape=tensor_shape, name=name
        )
        graph.register_initializer(value)
    common.RemoveUnusedNodesPass()(model)


def _use_norms_plus_one(graph: ir.Graph) -> None:
    """The file holds 1 + w of every norm: drop the additions."""
    for value in [v for name, v in graph.initializers.items() if name.endswith("norm.weight")]:
        ((node, _),) = value.uses()
        if node.op_type != "Add":
            raise RuntimeError(f"{value.name} goes into {node.op_type}, expected the addition of one")
        convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)


def _name_table_twice(graph: ir.Graph) -> None:
    """Replace Reshape(table) before a tied head by an initializer of the new shape over the same bytes.

    With the Reshape, ONNX Runtime's constant folding would hold the table twice.
    """
    table = graph.initializers.get(f"{MODULE}.{TABLE}.weight_packed")
    if table is None or f"{MODULE}.{HEAD_PACKED}" in graph.initializers:
        return
    reshapes = [node for node, _ in table.uses() if node.op_type == "Reshape"]
    if not reshapes and all(node.op_type != "MatMulNBits" for node in graph):  # a graph that only looks up
        return
    if len(reshapes) != 1:
        raise RuntimeError(f"the tied table is reshaped {len(reshapes)} times, expected once for the head")
    old = reshapes[0].outputs[0]
    ((head, index),) = old.uses()
    attributes = {
        name: attr.as_int() for name, attr in head.attributes.items() if name in ("N", "K", "bits", "block_size")
    }
    blocks = attributes["K"] // attributes["block_size"]
    shape = ir.Shape([attributes["N"], blocks, attributes["block_size"] * attributes["bits"] // 8])
    alias = ir.Value(name=HEAD_PACKED, shape=shape, type=ir.TensorType(ir.DataType.UINT8))
    graph.initializers[HEAD_PACKED] = alias
    head.replace_input_with(index, alias)
    graph.remove(reshapes[0], safe=True)


def score_graph(model: ir.Model) -> ir.Model:
    """The generation graph with logits at every position: the slice of the last one is taken out."""
    model = model.clone()
    graph = model.graph
    (final_norm,) = [node for node in graph if node.op_type == "RMSNormalization" and _feeds_slice(node)]
    (cut,) = [node for node, _ in final_norm.outputs[0].uses()]
    convenience.replace_all_uses_with(cut.outputs[0], final_norm.outputs[0])
    graph.remove(cut, safe=True)
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([1, "tokens", logits.shape[2]])
    _forget_shapes(graph)
    common.RemoveUnusedNodesPass()(model)
    return model


def _feeds_slice(node: ir.Node) -> bool:
    uses = node.outputs[0].uses()
    return len(uses) == 1 and all(user.op_type in ("Slice", "Gather") for user, _ in uses)


def _forget_shapes(graph: ir.Graph) -> None:
    """Drop the inner shapes, which are still right for one last position only."""
    outputs = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None


def genai_graph(model: ir.Model, config: GemmaConfig) -> ir.Model:
    """The generation graph under onnxruntime-genai's contract: `attention_mask` in place of `input_pos`, caches of any length.

    genai sizes the caches by the length that its user chooses, and refuses a windowed cache longer than that. So a local layer's
    window is only a mask in this graph, and a global layer has none.
    """
    model = model.clone()
    graph = model.graph
    input_pos = next(value for value in graph.inputs if value.name == "input_pos")
    input_ids = next(value for value in graph.inputs if value.name == "input_ids")
    mask = ir.Value(name="attention_mask", shape=ir.Shape([1, "total_sequence_length"]), type=input_ids.type)
    ends = {"start": 1, "end": 2}
    total = ir.node("Shape", [mask], attributes=ends)  # (1,) tokens after this chunk
    tokens = ir.node("Shape", [input_ids], attributes=ends)  # (1,) tokens of this chunk
    before = ir.node("Sub", [total.outputs[0], tokens.outputs[0]])
    graph.insert_before(graph[0], [total, tokens, before])
    for node, name in ((total, "total_tokens"), (tokens, "new_tokens"), (before, "past_tokens")):
        node.outputs[0].name = name
    convenience.replace_all_uses_with(input_pos, before.outputs[0])
    graph.inputs.remove(input_pos)
    graph.inputs.insert(1, mask)
    for value in [value for value in graph.inputs if value.name in KEPT]:
        if value.name == KEPT[0]:
            convenience.replace_all_uses_with(value, before.outputs[0])
        graph.inputs.remove(value)
    for layer, node in enumerate(node for node in graph if node.op_type == "GroupQueryAttention"):
        if len(node.inputs) > BIAS_INPUT:
            node.replace_input_with(BIAS_INPUT, None)
        node.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", 0)
        if not config.is_local(layer):
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", -1)
    for values, length in ((graph.inputs, "past_sequence_length"), (graph.outputs, "total_sequence_length")):
        for value in values:
            if value.name is not None and value.name.startswith(("past_key_values.", "present.")):
                value.shape = ir.Shape([1, config.num_key_value_heads, length, config.head_dim])
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write the graph; the weights stay where `attach_weights` pointed."""
    ir.save(model, path)
