"""After lowering: what a `.tflite` holds is read back from the file and compared with what it should hold."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from gemma_edge.export.bundle import CacheGeometry
from gemma_edge.export.tflite.file import ALIGNMENT
from gemma_edge.export.tflite.graph import CODES
from gemma_edge.export.tflite.packing import row_bytes
from gemma_edge.export.tflite.seams import KEY, PREFILL, VALUE, states
from gemma_edge.model.checkpoint import TABLE, linear_shapes, weight_shapes
from gemma_edge.model.config import Gemma2Config
from gemma_edge.quantize.recipe import QuantConfig

READERS = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")  # operators whose second input is a weight
OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}


@dataclass(frozen=True)
class Use:
    """An operator that reads a weight."""

    operator: str
    weight: Any  # TensorT
    scales: Any  # TensorT of a blockwise weight's scales, else None


class TFLite:
    """A `.tflite` file read back: its graph, and the bytes of its buffers."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if not schema.Model.ModelBufferHasIdentifier(data, 0):
                raise RuntimeError(f"{path.name} is no TFLite model")
            self.model: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytes(data[: self._head(data)]), 0))

    def _head(self, data: Any) -> int:
        """Where the graph ends: at the first buffer behind it."""
        model = schema.Model.GetRootAs(data, 0)
        behind = [offset for i in range(model.BuffersLength()) if (offset := model.Buffers(i).Offset()) > 1]
        del model  # it holds on to the mapping
        return min(behind, default=self.size)

    def content(self, tensor: Any) -> bytes:
        """The bytes of a constant."""
        buffer = self.model.buffers[tensor.buffer]
        if not buffer.offset:
            return bytes(buffer.data)
        with self.path.open("rb") as file:
            file.seek(buffer.offset)
            return file.read(buffer.size)

    def _signature(self, name: str) -> Any:
        found = [each for each in self.model.signatureDefs if each.signatureKey.decode() == name]
        if len(found) != 1:
            raise RuntimeError(f"{self.path.name} has {len(found)} signatures {name}")
        return found[0]

    def subgraph(self, signature: str) -> Any:
        """The subgraph of a signature."""
        return self.model.subgraphs[self._signature(signature).subgraphIndex]

    def states(self, signature: str) -> list[str]:
        """Inputs that come back as outputs."""
        found = self._signature(signature)
        outputs = {each.name for each in found.outputs}
        return [each.name.decode() for each in found.inputs if each.name in outputs]

    def uses(self, subgraph: Any) -> Iterator[Use]:
        """Every operator that reads a weight, in order."""
        for step in subgraph.operators:
            name = OPERATORS[self.model.operatorCodes[step.opcodeIndex].builtinCode]
            if name in READERS:
                tensor = subgraph.tensors[step.inputs[1]]
                quantization = tensor.quantization
                blocks = quantization is not None and quantization.detailsType
                yield Use(name, tensor, subgraph.tensors[quantization.details.scales] if blocks else None)


def check_tflite(
    path: Path,
    config: Gemma2Config,
    configs: Mapping[str, QuantConfig | None],
    geometry: CacheGeometry,
    signatures: Mapping[str, tuple[str, int]],
) -> None:
    """Compare a finished file with the model.

    Args:
        signatures: name -> what it is for, and its tokens.

    Raises:
        RuntimeError: names what is not as it should be.
    """
    found = TFLite(path)
    for name, (role, tokens) in signatures.items():
        subgraph = found.subgraph(name)
        _check_inputs(path, name, subgraph, geometry, tokens)
        uses = list(found.uses(subgraph))
        _check_order(path, name, uses, config, role)
        for use in uses:
            _check_weight(path, found, use, config, configs)
    _check_places(path, found)
    largest = max(len(buffer.data) for buffer in found.model.buffers if buffer.data is not None)
    if largest > 4 * max(config.hidden_size, geometry.prefill_chunk):
        raise RuntimeError(f"{path.name}: a constant of {largest} bytes lies in the graph: no norm is that large")


def _check_inputs(path: Path, name: str, subgraph: Any, geometry: CacheGeometry, tokens: int) -> None:
    wanted = {"tokens": (1, tokens), "input_pos": (tokens,)} | {
        key: shape for key, (shape, _) in states(geometry).items()
    }
    tensors = [subgraph.tensors[index] for index in subgraph.inputs]
    shapes = {tensor.name.decode(): tuple(tensor.shape.tolist()) for tensor in tensors}
    if shapes != wanted:
        raise RuntimeError(f"{path.name}: {name} takes {shapes}, expected {wanted}")
    written = [subgraph.tensors[index] for index in subgraph.outputs]
    caches = sum(tuple(tensor.shape.tolist()) == wanted[f"{KEY}0"] for tensor in written)
    if not caches or len(written) < 2 * len(geometry.layers):
        raise RuntimeError(f"{path.name}: {name} gives {len(written)} tensors, {caches} of them like {KEY}0, {VALUE}0")


def _check_order(path: Path, name: str, uses: Iterable[Use], config: Gemma2Config, role: str) -> None:
    """Each weight is read where the decoder reads it, once."""
    last = config.num_hidden_layers - 1
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    linears = [
        weight
        for layer in range(config.num_hidden_layers)
        for weight in sorted(linear_shapes(config, layer), key=lambda each: order.index(each.rpartition(".")[2]))
        if role != PREFILL or layer < last or weight.endswith(("k_proj", "v_proj"))
    ]
    head = [] if role == PREFILL else [TABLE]
    wanted = [("EMBEDDING_LOOKUP", TABLE), *(("FULLY_CONNECTED", weight) for weight in [*linears, *head])]
    found = [(use.operator, use.weight.name.decode()) for use in uses]
    if found != wanted:
        first = next(pair for pair in zip([*found, None], [*wanted, None], strict=False) if pair[0] != pair[1])
        raise RuntimeError(f"{path.name}: {name} has {first[0]} where {first[1]} belongs")


def _check_weight(
    path: Path, found: TFLite, use: Use, config: Gemma2Config, configs: Mapping[str, QuantConfig | None]
) -> None:
    """Type, shape, bytes and scales of a weight."""
    name = use.weight.name.decode()
    shape, quant = weight_shapes(config)[name], configs[name]
    kind = schema.TensorType.FLOAT32 if quant is None else CODES[quant.bits]
    size = shape[0] * row_bytes(quant, shape[1])["codes"]
    buffer = found.model.buffers[use.weight.buffer]
    if (use.weight.type, tuple(use.weight.shape.tolist()), buffer.size) != (kind, shape, size):
        raise RuntimeError(f"{path.name}: {name} is of type {use.weight.type}, {use.weight.shape}, {buffer.size} bytes")
    if quant is None:
        return
    if not quant.group_size:
        scale = use.weight.quantization.scale
        zero_points = use.weight.quantization.zeroPoint
        if len(scale) != shape[0] or not _positive(scale) or zero_points.any() or len(zero_points) != shape[0]:
            raise RuntimeError(f"{path.name}: {name} has {len(scale)} scales, expected {shape[0]} above 0")
        return
    groups = (shape[0], shape[1] // quant.group_size)
    blocks = use.weight.quantization.details.blockSize
    if use.scales is None or (tuple(use.scales.shape.tolist()), blocks) != (groups, quant.group_size):
        raise RuntimeError(f"{path.name}: {name} has no scales of {groups}")
    if not _positive(np.frombuffer(found.content(use.scales), np.float16)):
        raise RuntimeError(f"{path.name}: {name} has a scale that is not above 0")


def _positive(values: NDArray[Any]) -> bool:
    return bool((values > 0).all() and np.isfinite(values).all())


def _check_places(path: Path, found: TFLite) -> None:
    """Weights lie inside the file, aligned, and none in another."""
    places = sorted((buffer.offset, buffer.size) for buffer in found.model.buffers if buffer.offset)
    end = 0
    for offset, size in places:
        if offset % ALIGNMENT or offset < end or offset + size > found.size:
            raise RuntimeError(f"{path.name}: {size} bytes at {offset} lie in other ones, or outside of {found.size}")
        end = offset + size
