"""Reads a finished `.tflite` back and compares it with what it should hold."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.signature import Signature
from gemma_edge.export.tflite.file import ALIGNMENT
from gemma_edge.export.tflite.graph import CODES
from gemma_edge.export.tflite.packing import Packing
from gemma_edge.export.tflite.seams import PREFILL, looked_at, states
from gemma_edge.model.checkpoint import TABLE, linear_shapes, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.recipe import QuantConfig

READERS = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")  # operators whose second input is a weight
OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}


@dataclass(frozen=True)
class Use:
    """An operator that reads a weight."""

    operator: str
    weight: Any  # TensorT
    scales: Any  # TensorT of scales that are a tensor of their own; None: they lie in the weight's


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
        del model  # it keeps the mapping open
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
        matches = [each for each in self.model.signatureDefs if each.signatureKey.decode() == name]
        if len(matches) != 1:
            raise RuntimeError(f"{self.path.name} has {len(matches)} signatures {name}")
        return matches[0]

    def subgraph(self, signature: str) -> Any:
        """The subgraph of a signature."""
        return self.model.subgraphs[self._signature(signature).subgraphIndex]

    def states(self, signature: str) -> list[str]:
        """Inputs that come back as outputs."""
        definition = self._signature(signature)
        outputs = {each.name for each in definition.outputs}
        return [each.name.decode() for each in definition.inputs if each.name in outputs]

    def uses(self, subgraph: Any) -> Iterator[Use]:
        """Every operator that reads a weight, in order."""
        factors = self._factors(subgraph)
        for step in subgraph.operators:
            name = self.name_of(step)
            if name in READERS and not _is_scale(tensor := subgraph.tensors[step.inputs[1]]):
                quantization = tensor.quantization
                blocks = quantization is not None and quantization.detailsType
                apart = subgraph.tensors[quantization.details.scales] if blocks else factors.get(step.outputs[0])
                yield Use(name, tensor, apart)

    def name_of(self, step: Any) -> str:
        """The name of an operator."""
        name: str = OPERATORS[self.model.operatorCodes[step.opcodeIndex].builtinCode]
        return name

    def _factors(self, subgraph: Any) -> dict[int, Any]:
        """Index of a tensor -> the scales that it is multiplied by; they may be looked up first."""
        named = {index: tensor for index, tensor in enumerate(subgraph.tensors) if _is_scale(tensor)}
        for step in subgraph.operators:
            if self.name_of(step) == "EMBEDDING_LOOKUP" and step.inputs[1] in named:
                named[step.outputs[0]] = named[step.inputs[1]]
        products = [step.inputs for step in subgraph.operators if self.name_of(step) == "MUL"]
        return {value: named[factor] for value, factor in products if factor in named}


def check_tflite(
    path: Path,
    packing: Packing,
    config: GemmaConfig,
    configs: Mapping[str, QuantConfig | None],
    geometry: CacheGeometry,
    signatures: Iterable[Signature],
) -> None:
    """Compare a finished file with the model.

    Args:
        path: the file.
        packing: how its weights should lie in it.
        config, configs, geometry: the model, its integers, and its caches.
        signatures: the signatures that it should have.

    Raises:
        RuntimeError: names what is not as it should be.
    """
    file = TFLite(path)
    for signature in signatures:
        subgraph = file.subgraph(signature.name)
        _check_states(file, states(geometry, fours=packing.held_in_fours), signature)
        uses = list(file.uses(subgraph))
        _check_order(path, uses, config, signature)
        _check_slots(path, file, geometry, signature)
        for use in uses:
            _check_weight(path, packing, file, use, config, configs)
    _check_places(path, file)
    largest = max(len(buffer.data) for buffer in file.model.buffers if buffer.data is not None)
    numbered = [layer.slots for layer in geometry.layers if layer.pinned]  # slots, in the signature that pins
    if largest > 4 * max(config.hidden_size, geometry.prefill_chunk, *numbered):
        raise RuntimeError(f"{path.name}: a constant of {largest} bytes lies in the graph: no norm is that large")


def _check_states(file: TFLite, past: Mapping[str, Any], signature: Signature) -> None:
    """Tokens and positions come in; caches come in and go out, or are variables that are read and assigned."""
    path, name, tokens = file.path, signature.name, signature.tokens
    subgraph = file.subgraph(name)
    caches = {key: shape for key, (shape, _) in past.items()}
    come = [subgraph.tensors[index] for index in subgraph.inputs]
    go = [subgraph.tensors[index] for index in subgraph.outputs]
    for step in subgraph.operators:
        if file.name_of(step) == "READ_VARIABLE":
            come.append(subgraph.tensors[step.outputs[0]])
        if file.name_of(step) == "ASSIGN_VARIABLE":
            go.append(subgraph.tensors[step.inputs[1]])
    shapes = {tensor.name.decode(): tuple(tensor.shape.tolist()) for tensor in come}
    expected = {"tokens": (1, tokens), "input_pos": (tokens,), **caches}
    if shapes != expected:
        raise RuntimeError(f"{path.name}: {name} takes {shapes}, expected {expected}")
    kept = sorted(shape for tensor in go if (shape := tuple(tensor.shape.tolist())) in caches.values())
    if kept != sorted(caches.values()):
        raise RuntimeError(f"{path.name}: {name} gives caches of {kept}, expected {sorted(caches.values())}")


def _check_slots(path: Path, file: TFLite, geometry: CacheGeometry, signature: Signature) -> None:
    """Each layer multiplies as many of its slots as the signature looks at: by the keys, then by the values."""
    subgraph = file.subgraph(signature.name)
    right = [step.inputs[1] for step in subgraph.operators if file.name_of(step) == "BATCH_MATMUL"]
    slots = [int(subgraph.tensors[index].shape[2]) for index in right]
    layers = geometry.layers[:-1] if signature.role == PREFILL else geometry.layers  # its last one is not needed
    expected = [looked_at(layer, signature.longest) for layer in layers for _ in "kv"]
    if slots != expected:
        raise RuntimeError(f"{path.name}: {signature.name} looks at {slots} slots, expected {expected}")


def _check_order(path: Path, uses: Iterable[Use], config: GemmaConfig, signature: Signature) -> None:
    """Each weight is read where the decoder reads it, once."""
    name, role = signature.name, signature.role
    last = config.num_hidden_layers - 1
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    linears = [
        weight
        for layer in range(config.num_hidden_layers)
        for weight in sorted(linear_shapes(config, layer), key=lambda each: order.index(each.rpartition(".")[2]))
        if role != PREFILL or layer < last or weight.endswith(("k_proj", "v_proj"))
    ]
    head = [] if role == PREFILL else [config.head]
    expected = [("EMBEDDING_LOOKUP", TABLE), *(("FULLY_CONNECTED", weight) for weight in [*linears, *head])]
    actual = [(use.operator, use.weight.name.decode()) for use in uses]
    if actual != expected:
        first = next(pair for pair in zip([*actual, None], [*expected, None], strict=False) if pair[0] != pair[1])
        raise RuntimeError(f"{path.name}: {name} has {first[0]} where {first[1]} belongs")


def _check_weight(
    path: Path,
    packing: Packing,
    file: TFLite,
    use: Use,
    config: GemmaConfig,
    configs: Mapping[str, QuantConfig | None],
) -> None:
    """Type, shape, bytes and scales of a weight."""
    name = use.weight.name.decode()
    shape, quant = weight_shapes(config)[name], configs[name]
    kind = schema.TensorType.FLOAT32 if quant is None else CODES[quant.bits]
    size = shape[0] * packing.row_bytes(quant, shape[1])["codes"]
    buffer = file.model.buffers[use.weight.buffer]
    if (use.weight.type, tuple(use.weight.shape.tolist()), buffer.size) != (kind, shape, size):
        raise RuntimeError(f"{path.name}: {name} is of type {use.weight.type}, {use.weight.shape}, {buffer.size} bytes")
    if quant is None:
        return
    if not quant.group_size:
        scale, zero_points = use.weight.quantization.scale, use.weight.quantization.zeroPoint
        if packing.channels_apart and (use.scales is None or scale.tolist() != [1.0] or zero_points.tolist() != [0]):
            raise RuntimeError(
                f"{path.name}: {name} has {len(scale)} scales of its own, not 1, or is not multiplied by its channels'"
            )
        if packing.channels_apart:
            scale = np.frombuffer(file.content(use.scales), np.float32)
            zero_points = np.zeros(len(scale))
        if len(scale) != shape[0] or not _positive(scale) or zero_points.any() or len(zero_points) != shape[0]:
            raise RuntimeError(f"{path.name}: {name} has {len(scale)} scales, expected {shape[0]} above 0")
        return
    groups = (shape[0], shape[1] // quant.group_size)
    blocks = use.weight.quantization.details.blockSize
    if use.scales is None or (tuple(use.scales.shape.tolist()), blocks) != (groups, quant.group_size):
        raise RuntimeError(f"{path.name}: {name} has no scales of {groups}")
    if not _positive(np.frombuffer(file.content(use.scales), np.float16)):
        raise RuntimeError(f"{path.name}: {name} has a scale that is not above 0")


def _is_scale(tensor: Any) -> bool:
    return bool(tensor.name.endswith(b".scale"))


def _positive(values: NDArray[Any]) -> bool:
    return bool((values > 0).all() and np.isfinite(values).all())


def _check_places(path: Path, file: TFLite) -> None:
    """Weights lie inside the file, aligned, and no two of them overlap."""
    places = sorted((buffer.offset, buffer.size) for buffer in file.model.buffers if buffer.offset)
    end = 0
    for offset, size in places:
        if offset % ALIGNMENT or offset < end or offset + size > file.size:
            raise RuntimeError(
                f"{path.name}: {size} bytes at {offset} overlap other ones, or lie outside of {file.size}"
            )
        end = offset + size
