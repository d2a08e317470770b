"""From ATen to TFLite: what `torch.export` leaves of the decoder, operator by operator.

What is computed from constants alone is computed here. Source: LiteRT's kernels (tflite/kernels), whose names the right side has.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from gemma_edge.export.tflite.graph import DTYPES, Subgraph, Value
from gemma_edge.export.tflite.seams import UPDATE_SLICE

aten = torch.ops.aten


@dataclass(frozen=True)
class Weight:
    """A matrix that nobody reads here: it stays in the file, by its name."""

    name: str


@dataclass(frozen=True)
class Turned:
    """A tensor whose last two axes change places where it is read."""

    value: Value


@dataclass(frozen=True)
class Variable:
    """What a variable of the model holds: read where it is first used, so that few are in memory at once."""

    name: str


Known = Value | Weight | Turned | Variable | Tensor | list[Value]


@dataclass
class Lowering:
    """The nodes of one program that have values already."""

    graph: Subgraph
    known: dict[Node, Known] = field(default_factory=dict)

    def run(self, node: Node) -> None:
        """Give a node its value.

        Raises:
            RuntimeError: an operator that nobody expected in the decoder.
        """
        if all(isinstance(self.known[each], Tensor) for each in node.all_input_nodes):
            self.known[node] = self._folded(node)
            return
        if node.target not in OPERATORS:
            raise RuntimeError(f"{node.target}: no TFLite operator is known for it; another torch?")
        self.known[node] = OPERATORS[node.target](self, node)

    def _folded(self, node: Node) -> Tensor:
        known: Any = self.known
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        assert callable(node.target)
        result: Tensor = node.target(*args, **kwargs)
        return result

    def value(self, argument: Any, dtype: torch.dtype = torch.float32) -> Value:
        """An argument as a tensor of the subgraph; numbers become constants of that type."""
        known = self.known[argument] if isinstance(argument, Node) else torch.tensor(argument, dtype=dtype)
        if isinstance(known, Weight):
            return self.graph.weight(known.name)
        if isinstance(known, Tensor):
            return self.graph.constant(known.numpy())
        if isinstance(known, Variable):
            meta = argument.meta["val"]
            known = self.known[argument] = self.graph.read(known.name, tuple(meta.shape), meta.dtype)
        assert isinstance(known, Value)
        return known

    def apart(self, argument: Any) -> str | None:
        """The name of a matrix whose channels' scales are multiplied after it; None for all others."""
        known = self.known[argument]
        return known.name if isinstance(known, Weight) and self.graph.model.weights[known.name].apart else None

    def emit(self, name: str, inputs: list[Value | None], shape: Any, dtype: torch.dtype, **options: Any) -> Value:
        """Append an operator with one output."""
        out = self.graph.tensor(tuple(shape), dtype)
        self.graph.op(name, inputs, [out], **options)
        return out

    def like(self, node: Node, name: str, *inputs: Value | None, **options: Any) -> Value:
        """Append an operator whose output is the node's."""
        meta = node.meta["val"]
        return self.emit(name, list(inputs), meta.shape, meta.dtype, **options)

    def reshape(self, value: Value, shape: Any) -> Value:
        """The same elements in another shape."""
        if value.shape == tuple(shape):
            return value
        sizes = self.graph.constant(np.array(shape, np.int32))
        options = {"table": "ReshapeOptions", "newShape": list(shape)}
        return self.emit("RESHAPE", [value, sizes], shape, value.dtype, **options)


Lower = Callable[[Lowering, Node], Known]


def _elementwise(name: str, table: str | None = None) -> Lower:
    def lower(to: Lowering, node: Node) -> Value:
        types = [each.meta["val"].dtype for each in node.args[:2] if isinstance(each, Node)]
        inputs = [to.value(each, types[0]) for each in node.args[:2]]
        return to.like(node, name, *inputs, **({"table": table} if table else {}))

    return lower


def _unary(name: str, **options: Any) -> Lower:
    def lower(to: Lowering, node: Node) -> Value:
        return to.like(node, name, to.value(node.args[0]), **options)

    return lower


def _where(to: Lowering, node: Node) -> Value:
    dtype = node.meta["val"].dtype
    return to.like(node, "SELECT_V2", *(to.value(each, dtype) for each in node.args))


def _reshape(to: Lowering, node: Node) -> Value:
    return to.reshape(to.value(node.args[0]), node.meta["val"].shape)


def _cast(to: Lowering, node: Node) -> Value:
    value, dtype = to.value(node.args[0]), node.meta["val"].dtype
    if DTYPES[value.dtype] == DTYPES[dtype]:
        return value
    options = {"inDataType": DTYPES[value.dtype], "outDataType": DTYPES[dtype]}
    return to.like(node, "CAST", value, table="CastOptions", **options)


def _transpose(to: Lowering, node: Node) -> Known:
    value, (first, second) = to.value(node.args[0]), node.args[1:]
    if all(user.target == aten.matmul.default for user in node.users):
        assert (first, second) == (2, 3), "BATCH_MATMUL turns the last two"
        return Turned(value)
    order = list(range(len(value.shape)))
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    moved = [axis for axis in order if value.shape[axis] != 1]
    if moved == sorted(moved):  # nothing moves in memory
        return to.reshape(value, node.meta["val"].shape)
    return to.like(node, "TRANSPOSE", value, to.graph.constant(np.array(order, np.int32)))


def _slice(to: Lowering, node: Node) -> Value:
    value, (axis, start) = to.value(node.args[0]), node.args[1:3]
    begin = [0] * len(value.shape)
    begin[axis] = start % value.shape[axis]  # type: ignore[index, operator]
    shape = node.meta["val"].shape
    if tuple(shape) == value.shape:
        return value
    return to.like(node, "SLICE", value, *(to.graph.constant(np.array(v, np.int32)) for v in (begin, list(shape))))


def _cat(to: Lowering, node: Node) -> Value:
    values, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    dtype, rank = node.meta["val"].dtype, len(node.meta["val"].shape)
    inputs = [to.value(each, dtype) for each in values]  # type: ignore[union-attr]
    return to.like(node, "CONCATENATION", *inputs, table="ConcatenationOptions", axis=axis % rank)  # type: ignore[operator]


def _chunk(to: Lowering, node: Node) -> list[Value]:
    value, axis = to.value(node.args[0]), to.graph.constant(np.array(node.args[2], np.int32))
    outs = [to.graph.tensor(tuple(part.shape), part.dtype) for part in node.meta["val"]]
    to.graph.op("SPLIT", [axis, value], outs, table="SplitOptions", numSplits=len(outs))
    return outs


def _getitem(to: Lowering, node: Node) -> Value:
    parts, index = to.known[node.args[0]], node.args[1]  # type: ignore[index]
    part: Value = parts[index]  # type: ignore[index, assignment]
    return part


def _rms_norm(to: Lowering, node: Node) -> Value:
    x, scale, eps = to.value(node.args[0]), to.value(node.args[2]), to.value(node.args[3])
    column = (*x.shape[:-1], 1)
    last = to.graph.constant(np.array([len(x.shape) - 1], np.int32))
    squares = to.emit("MUL", [x, x], x.shape, x.dtype, table="MulOptions")
    mean = to.emit("MEAN", [squares, last], column, x.dtype, table="ReducerOptions", keepDims=True)
    shifted = to.emit("ADD", [mean, eps], column, x.dtype, table="AddOptions")
    root = to.emit("RSQRT", [shifted], column, x.dtype)
    normed = to.emit("MUL", [x, root], x.shape, x.dtype, table="MulOptions")
    return to.like(node, "MUL", normed, scale, table="MulOptions")


def _linear(to: Lowering, node: Node) -> Value:
    # activations become int8 per token, asymmetric: XNNPACK's kernels have no other
    options = {"keepNumDims": True, "asymmetricQuantizeInputs": True}
    x, weight = to.value(node.args[0]), to.value(node.args[1])
    out = to.like(node, "FULLY_CONNECTED", x, weight, None, table="FullyConnectedOptions", **options)
    name = to.apart(node.args[1])
    if name is None:
        return out
    return to.like(node, "MUL", out, to.graph.channels(name, weight.shape[:1]), table="MulOptions")


def _embedding(to: Lowering, node: Node) -> Value:
    table, ids = to.value(node.args[0]), to.value(node.args[1])
    dtype, count = node.meta["val"].dtype, int(np.prod(ids.shape))
    flat, size = to.reshape(ids, (count,)), (count, table.shape[1])
    rows = to.emit("EMBEDDING_LOOKUP", [flat, table], size, dtype)
    name = to.apart(node.args[0])
    if name is not None:
        scales = to.emit("EMBEDDING_LOOKUP", [flat, to.graph.channels(name, (table.shape[0], 1))], (count, 1), dtype)
        rows = to.emit("MUL", [rows, scales], size, dtype, table="MulOptions")
    return to.reshape(rows, node.meta["val"].shape)


def _matmul(to: Lowering, node: Node) -> Value:
    right = to.known[node.args[1]]  # type: ignore[index]
    turned = isinstance(right, Turned)
    other = right.value if isinstance(right, Turned) else to.value(node.args[1])
    return to.like(node, "BATCH_MATMUL", to.value(node.args[0]), other, table="BatchMatMulOptions", adjY=turned)


def _update_slice(to: Lowering, node: Node) -> Value:
    operand, update = to.value(node.args[0]), to.value(node.args[1])
    return to.like(node, "DYNAMIC_UPDATE_SLICE", operand, update, to.value(node.args[2]))


OPERATORS: Mapping[Any, Lower] = {
    aten.__and__.Tensor: _elementwise("LOGICAL_AND"),
    aten.alias.default: _reshape,  # of a slice that takes all
    aten.add.Tensor: _elementwise("ADD", "AddOptions"),
    aten.cat.default: _cat,
    aten.chunk.default: _chunk,
    aten.cos.default: _unary("COS"),
    aten.div.Tensor: _elementwise("DIV", "DivOptions"),
    aten.embedding.default: _embedding,
    aten.eq.Tensor: _elementwise("EQUAL"),
    aten.ge.Scalar: _elementwise("GREATER_EQUAL"),
    aten.gelu.default: _unary("GELU", table="GeluOptions", approximate=True),
    aten.gt.Scalar: _elementwise("GREATER"),
    aten.le.Tensor: _elementwise("LESS_EQUAL"),
    aten.linear.default: _linear,
    aten.lt.Scalar: _elementwise("LESS"),
    aten.lt.Tensor: _elementwise("LESS"),
    aten.matmul.default: _matmul,
    aten.mul.Tensor: _elementwise("MUL", "MulOptions"),
    aten.remainder.Scalar: _elementwise("FLOOR_MOD"),
    aten.reshape.default: _reshape,
    aten.rms_norm.default: _rms_norm,
    aten.sin.default: _unary("SIN"),
    aten.slice.Tensor: _slice,
    aten.softmax.int: _unary("SOFTMAX", table="SoftmaxOptions", beta=1.0),
    aten.sub.Tensor: _elementwise("SUB", "SubOptions"),
    aten.tanh.default: _unary("TANH"),
    aten.to.dtype: _cast,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _reshape,
    aten.view.default: _reshape,
    aten.where.Scalar: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.self: _where,
    operator.getitem: _getitem,
    UPDATE_SLICE: _update_slice,
}
