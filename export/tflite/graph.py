"""A `.tflite` model under construction: tensors, operators, subgraphs. Knows nothing of Gemma, and of torch only its types.

Buffers are shared: weights by name, constants by their bytes, over all subgraphs. Source: LiteRT's schema.fbs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from gemma_edge.export.tflite.packing import Stored

DTYPES = {
    torch.float32: schema.TensorType.FLOAT32,
    torch.int32: schema.TensorType.INT32,
    torch.int64: schema.TensorType.INT32,  # positions: torch widens where it mixes types, nothing here needs it
    torch.bool: schema.TensorType.BOOL,
}
CODES = {4: schema.TensorType.INT4, 8: schema.TensorType.INT8}  # by bits
# the version of an operator says which of its features a model uses
VERSIONS = {"FULLY_CONNECTED": 5}
NO_TENSOR = -1
VARIABLE = "variable"


@dataclass(frozen=True)
class Value:
    """A tensor of a subgraph."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SharedQuantization(schema.QuantizationParametersT):  # type: ignore[misc]
    """Scales that several tensors have in common: written once, where the library writes them again for each."""

    _place: int | None = None

    def Pack(self, builder: Any) -> int:
        """The place of the table in the file."""
        if self._place is None:
            self._place = super().Pack(builder)
        return self._place


@dataclass
class Model:
    """What the subgraphs share."""

    weights: Mapping[str, Stored]
    subgraphs: list[Any] = field(default_factory=list)
    signatures: list[Any] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)  # names, in the order of their codes
    buffers: list[bytes | str] = field(default_factory=lambda: [b""])  # bytes, or the name of a weight's part
    _indices: dict[bytes | str, int] = field(default_factory=dict)
    _quantizations: dict[str, Any] = field(default_factory=dict)

    def operator(self, name: str) -> int:
        """The code of an operator."""
        if name not in self.operators:
            self.operators.append(name)
        return self.operators.index(name)

    def buffer(self, content: bytes | str) -> int:
        """The buffer that holds some bytes, or a part of a weight."""
        if content not in self._indices:
            self._indices[content] = len(self.buffers)
            self.buffers.append(content)
        return self._indices[content]

    def per_channel(self, weight: str, scale: NDArray[np.float32]) -> Any:
        """Scales of a weight's rows."""
        if weight not in self._quantizations:
            zeros = np.zeros(len(scale), np.int64)
            self._quantizations[weight] = SharedQuantization(scale=scale, zeroPoint=zeros)
        return self._quantizations[weight]

    def to_flatbuffer(self, description: str) -> Any:
        """The library's own object; buffers of weights are empty."""
        codes = []
        for name in self.operators:
            code = getattr(schema.BuiltinOperator, name)
            version = VERSIONS.get(name, 1)
            codes.append(schema.OperatorCodeT(min(code, 127), builtinCode=code, version=version))
        contents = [np.frombuffer(b, np.uint8) if isinstance(b, bytes) and b else None for b in self.buffers]
        return schema.ModelT(
            version=3,
            operatorCodes=codes,
            subgraphs=self.subgraphs,
            description=description,
            buffers=[schema.BufferT(data=data) for data in contents],
            signatureDefs=self.signatures,
        )


class Subgraph:
    """One signature's operators, in order."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name = model, name
        self.tensors: list[Any] = []
        self.steps: list[Any] = []
        self._known: dict[tuple[Any, ...], Value] = {}  # constants and weights that are tensors already

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, name: str = "", buffer: int = 0) -> Value:
        """A tensor without a value, or with that of a buffer."""
        label = name or f"t{len(self.tensors)}"
        self.tensors.append(schema.TensorT(shape=list(shape), type=DTYPES[dtype], buffer=buffer, name=label))
        return Value(len(self.tensors) - 1, tuple(shape), dtype)

    def constant(self, value: NDArray[Any]) -> Value:
        """A constant of type float32, int32 or bool."""
        dtype = {"f": torch.float32, "i": torch.int32, "b": torch.bool}[value.dtype.kind]
        data = value.astype({torch.float32: np.float32, torch.int32: np.int32, torch.bool: np.bool_}[dtype]).tobytes()
        key = (data, value.shape, dtype)
        if key not in self._known:
            self._known[key] = self.tensor(value.shape, dtype, f"c{len(self.tensors)}", self.model.buffer(data))
        return self._known[key]

    def weight(self, name: str) -> Value:
        """A matrix of the model, integers or float32."""
        if (name,) in self._known:
            return self._known[(name,)]
        stored = self.model.weights[name]
        value = self.tensor(stored.shape, torch.float32, name, self.model.buffer(stored.codes))
        if stored.config is not None:
            self.tensors[value.index].type = CODES[stored.config.bits]
            self.tensors[value.index].quantization = self._quantization(stored)
        self._known[(name,)] = value
        return value

    def channels(self, name: str, shape: tuple[int, ...]) -> Value:
        """The scales of a matrix's rows, where its own are not enough, float32."""
        key = name, shape
        if key not in self._known:
            scale = self.model.weights[name].scale
            self._known[key] = self.tensor(shape, torch.float32, scale, self.model.buffer(scale))
        return self._known[key]

    def _quantization(self, stored: Stored) -> Any:
        assert stored.config is not None
        if not stored.config.group_size:
            assert stored.row_scale is not None
            return self.model.per_channel(stored.codes, stored.row_scale)
        shape = (stored.shape[0], stored.shape[1] // stored.config.group_size)
        scales = self.tensor(shape, torch.float32, f"{stored.scale}", self.model.buffer(stored.scale))
        self.tensors[scales.index].type = schema.TensorType.FLOAT16
        blocks = schema.BlockwiseQuantizationT(scales.index, NO_TENSOR, stored.config.group_size)
        return schema.QuantizationParametersT(
            detailsType=schema.QuantizationDetails.BlockwiseQuantization, details=blocks
        )

    def _variable(self, name: str) -> Value:
        """The handle of a variable that all signatures share."""
        if (VARIABLE, name) not in self._known:
            handle = self._known[(VARIABLE, name)] = self.tensor((1,), torch.int32, f"{name}.handle")
            self.tensors[handle.index].type = schema.TensorType.RESOURCE
            self.op("VAR_HANDLE", [], [handle], table="VarHandleOptions", container="", sharedName=name)
        return self._known[(VARIABLE, name)]

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Value:
        """What a variable holds."""
        value = self.tensor(shape, dtype, name)
        self.op("READ_VARIABLE", [self._variable(name)], [value], table="ReadVariableOptions")
        return value

    def assign(self, name: str, value: Value) -> None:
        """Let a variable hold a value."""
        self.op("ASSIGN_VARIABLE", [self._variable(name), value], [], table="AssignVariableOptions")

    def op(self, name: str, inputs: Sequence[Value | None], outputs: Sequence[Value], **options: Any) -> None:
        """Append an operator. `options` are the fields of its table, and `table` that table's name where it has one."""
        table = options.pop("table", None)
        self.steps.append(
            schema.OperatorT(
                opcodeIndex=self.model.operator(name),
                inputs=[NO_TENSOR if value is None else value.index for value in inputs],
                outputs=[value.index for value in outputs],
                builtinOptionsType=getattr(schema.BuiltinOptions, table) if table else 0,
                builtinOptions=getattr(schema, f"{table}T")(**options) if table else None,
            )
        )

    def finish(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> None:
        """Add the subgraph to the model, with a signature of its name."""
        self.model.signatures.append(
            schema.SignatureDefT(
                inputs=[schema.TensorMapT(name, value.index) for name, value in inputs.items()],
                outputs=[schema.TensorMapT(name, value.index) for name, value in outputs.items()],
                signatureKey=self.name,
                subgraphIndex=len(self.model.subgraphs),
            )
        )
        self.model.subgraphs.append(
            schema.SubGraphT(
                tensors=self.tensors,
                inputs=[value.index for value in inputs.values()],
                outputs=[value.index for value in outputs.values()],
                operators=self.steps,
                name=self.name,
            )
        )
