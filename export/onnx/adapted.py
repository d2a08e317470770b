"""A bundle's graphs with two more inputs for every linear of the layers: the factors of a LoRA. Weights stay in the bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from gemma_edge.bundle.manifest import confined
from gemma_edge.bundle.settings import OnnxSettings
from gemma_edge.model.checkpoint import linear_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.runtimes.engines.adapter import ROLES, SIDES

THROUGH = ("Cast", "Transpose")  # between a float weight and its product


def write_graphs(bundle: Path, settings: OnnxSettings, config: GemmaConfig, out: Path) -> dict[str, str]:
    """Write the graphs of an adapter, the same ones for every adapter of a bundle: role -> file name.

    Raises:
        RuntimeError: a linear is not where export/onnx puts it.
    """
    files = {}
    for role in ROLES:
        name = settings.roles[role]
        model = ir.load(confined(bundle, name))
        _add_inputs(model.graph, config)
        ir.save(model, out / name)
        files[role] = name
    return files


def _add_inputs(graph: ir.Graph, config: GemmaConfig) -> None:
    """Turn y = W x into y = W x + (x A) B, with A and B as inputs of a rank that is chosen when the graph runs."""
    for layer in range(config.num_hidden_layers):
        for linear, (rows, columns) in linear_shapes(config, layer).items():
            product = _product(graph, linear)
            rank = f"{linear}.rank"  # each its own: an adapter need not change every linear
            shapes = ir.Shape([columns, rank]), ir.Shape([rank, rows])
            a, b = (
                ir.Value(name=f"{linear}.{side}", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
                for side, shape in zip(SIDES, shapes, strict=True)
            )
            graph.inputs.extend([a, b])
            output = product.outputs[0]
            users = list(output.uses())
            down = ir.node("MatMul", [product.inputs[0], a])  # (1, T, r)
            up = ir.node("MatMul", [down.outputs[0], b])  # (1, T, out)
            total = ir.node("Add", [output, up.outputs[0]])
            graph.insert_after(product, [down, up, total])
            for value, name in ((down, "down"), (up, "up"), (total, "adapted")):
                value.outputs[0].name = f"{linear}.{name}"
            for node, index in users:
                node.replace_input_with(index, total.outputs[0])


def _product(graph: ir.Graph, linear: str) -> ir.Node:
    """The node that multiplies with a linear's weight."""
    for name in (f"{linear}.weight_packed", f"{linear}.weight"):
        if name in graph.initializers:
            (product,) = _products(graph.initializers[name])
            return product
    raise RuntimeError(f"the graph has no weight of {linear}")


def _products(value: ir.Value) -> Iterator[ir.Node]:
    for node, _ in value.uses():
        if node.op_type in THROUGH:
            yield from _products(node.outputs[0])
        else:
            yield node
