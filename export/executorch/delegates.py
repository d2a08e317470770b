"""Reads back from a delegate's blob, by the library's own schema, what XNNPACK computes each linear with."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile

from gemma_edge.quantize.recipe import QuantConfig


@dataclass(frozen=True)
class Kernel:
    """The types of a linear: XNNPACK's names without `xnn_datatype_`."""

    activation: str
    weight: str
    scales: int = 0  # scales per row; 0: a float weight
    group_size: int = 0  # columns per scale; 0: the whole row


@dataclass(frozen=True)
class FullyConnected:
    """A linear of a delegate."""

    key: str  # key of its weight
    scale_key: str  # key of its scales; "": it has none
    kernel: Kernel


def kernel_of(config: QuantConfig | None, columns: int) -> Kernel:
    """The kernel that a weight must be computed with: int8 activations with a scale per token, unless it is float."""
    if config is None:
        return Kernel("fp32", "fp32")
    if config.bits == 8:
        return Kernel("qdint8", "qcint8", 1)
    group = config.group_size or columns
    return Kernel("qdint8", "qbint4", columns // group, group)


def linears(blobs: list[bytes]) -> Iterator[FullyConnected]:
    """Every linear of some delegates."""
    for graph in _graphs(blobs):
        values = {_tensor(value)["id_out"]: value for value in graph["xvalues"]}
        constants = graph["constant_data"]
        for node in graph["xnodes"]:
            if node["xnode_union_type"] == "XNNFullyConnected":
                yield _linear(node["xnode_union"], values, constants)


def _linear(node: dict[str, Any], values: dict[int, Any], constants: list[dict[str, Any]]) -> FullyConnected:
    activation, weight = values[node["input1_id"]], values[node["filter_id"]]
    tensor = _tensor(weight)
    quant = weight["xvalue_union"].get("quant_params") or {}
    rows, count = tensor["dims"][0], quant.get("num_scales", 0)
    group = quant.get("group_size", 0)
    scales = count // rows if count > 0 else 0
    kernel = Kernel(_type(activation), _type(weight), scales, group)
    scale = constants[quant["scale_buffer_idx"]]["named_key"] if scales else ""
    return FullyConnected(constants[tensor["constant_buffer_idx"]]["named_key"], scale, kernel)


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    union = value["xvalue_union"]
    tensor: dict[str, Any] = union.get("tensor_value", union)
    return tensor


def _type(value: dict[str, Any]) -> str:
    return str(_tensor(value)["datatype"]).removeprefix("xnn_datatype_")


def _graphs(blobs: list[bytes]) -> Iterator[dict[str, Any]]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        schema = folder / "schema.fbs"
        schema.write_bytes(importlib.resources.files(serialization).joinpath("schema.fbs").read_bytes())
        for blob in blobs:
            header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
            graph = folder / "graph.bin"
            graph.write_bytes(blob[header.flatbuffer_offset :][: header.flatbuffer_size])
            _flatc_decompile(name, str(schema), str(graph))
            yield json.loads((folder / "graph.json").read_text())
