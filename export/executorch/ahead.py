"""The same halves of blocks as Core ML's and Vulkan's delegates, lowered ahead of time: an experiment.

Nothing on Linux runs Core ML, and the wheel of ExecuTorch runs no Vulkan, so nobody has run these files here. Both libraries
keep a half's weights inside its delegate, under no names of ours: every half is lowered over its own weights, all in memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from executorch.exir.backend.partitioner import Partitioner
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from gemma_edge.bundle.accelerators import COREML, VULKAN
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.executorch.compose import Embedding
from gemma_edge.export.executorch.lowering import compose
from gemma_edge.export.executorch.packing import (
    CODES,
    SCALE,
    Weight,
    halves,
    is_halved,
    packed_embedding,
    pieces_of,
)
from gemma_edge.export.executorch.seams import (
    AttendHalf,
    Half,
    HalvedNorm,
    Limits,
    Linear,
    MeanByLinear,
    ProjectHalf,
    block_half,
    head_piece,
)
from gemma_edge.export.executorch.templates import Called, Delegate, delegated, template
from gemma_edge.model.checkpoint import TABLE, weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.integers import QuantizedTensor

ROOM = 1 << 16  # bytes of a delegate that are no weights: its graph, and the norms


def _core_ml() -> Partitioner:
    """iOS 18 is the first to keep groups of 4 bits. In float16 the angles of positions would go wrong."""
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT32,
        compute_unit=coremltools.ComputeUnit.ALL,
    )
    partitioner: Partitioner = CoreMLPartitioner(compile_specs=specs)
    return partitioner


def _vulkan() -> Partitioner:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    partitioner: Partitioner = VulkanPartitioner({"require_dynamic_shapes": True})
    return partitioner


PARTITIONERS: Mapping[str, Callable[[], Partitioner]] = {COREML: _core_ml, VULKAN: _vulkan}


def write_ahead(
    checkpoint: QuantizedCheckpoint,
    geometry: CacheGeometry,
    path: Path,
    methods: Mapping[str, str],
    accelerator: str,
    progress: Callable[[int], None],
) -> None:
    """Write the whole program.

    Args:
        checkpoint, geometry, progress: as of `Backend.lower`.
        path: the file.
        methods: `generate` and `score` -> the method's name.
        accelerator: a key of PARTITIONERS.

    Raises:
        RuntimeError: a half became something else than one delegate, or holds a weight as floats.
    """
    parts = Halves(checkpoint, PARTITIONERS[accelerator], geometry, progress)
    layers = [
        (parts.half(ProjectHalf, layer), parts.half(AttendHalf, layer))
        for layer in range(checkpoint.config.num_hidden_layers)
    ]
    head = parts.head()
    with _quiet():
        program = compose(checkpoint, geometry, methods, (table(checkpoint), layers, head))
    with path.open("wb") as file:
        program.write_to_file(file)


class Halves:
    """The model's halves, each lowered over its own weights."""

    def __init__(
        self,
        checkpoint: QuantizedCheckpoint,
        partitioner: Callable[[], Partitioner],
        geometry: CacheGeometry,
        progress: Callable[[int], None],
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.partitioner, self.geometry, self.progress = partitioner, geometry, progress

    def half(self, kind: type[ProjectHalf] | type[AttendHalf], layer: int) -> Called:
        """One half of a layer."""
        limits = Limits(self.geometry.prefill_chunk, self.geometry.layers[layer].slots if kind is AttendHalf else 0)
        half = block_half(kind, self.config, layer, _Rows(self.checkpoint).next)
        return self.called(half, limits, f"model.layers.{layer}.")

    def head(self) -> list[Called]:
        """The pieces of the head."""
        head = self.config.head
        count = pieces_of(head, (self.config.vocab_size, self.config.hidden_size))
        rows, limits = _Rows(self.checkpoint), Limits(self.geometry.prefill_chunk, 0)
        return [self.called(head_piece(self.config, rows.next), limits, "") for _ in range(count)]

    def called(self, half: Half, limits: Limits, prefix: str) -> Called:
        """Lower a half."""
        weights = self.write(half, prefix)
        with _quiet():  # not around `progress`, which prints
            delegate, arguments, outputs = delegated(half, limits, self.partitioner())
        data = delegate.named_data_store_output
        size = len(delegate.processed_bytes) + (sum(map(len, data.buffers)) if data else 0)
        if size > weights + ROOM + 32 * self.config.hidden_size:
            raise RuntimeError(f"{prefix}{type(half).__name__} lowered to {size} bytes, its weights have {weights}")
        self.progress(weights)
        with _quiet():
            stub = template(half, Delegate(b"", {}, {}, arguments, outputs), limits).stub
        module = LoweredBackendModule(stub, delegate.backend_id, delegate.processed_bytes, delegate.compile_specs, data)
        return Called(module, [each for each in arguments if not isinstance(each, str)], outputs)

    def write(self, half: Half, prefix: str) -> int:
        """Write a half's linears and norms as these delegates take them, with the checkpoint's norms.

        Returns:
            the bytes of its weights.
        """
        weights = 0
        for name, module in list(half.named_modules()):
            own = f"{prefix}{name.removeprefix('block.')}"
            if isinstance(module, Linear):
                weights += write_linear(module)
            elif isinstance(module, (MeanByLinear, HalvedNorm)):
                norm = _HalvedMean if isinstance(module, HalvedNorm) else _Mean
                given: Any = SimpleNamespace(weight=_constant(self.checkpoint.vector(f"{own}.weight")), eps=module.eps)
                half.set_submodule(name, norm(given))
        return weights


class _Rows:
    """A checkpoint's weights as the seams ask for them: piece after piece."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.waiting: dict[str, list[Weight]] = {}
        self.start: dict[str, int] = {}

    def next(self, name: str, rows: int, columns: int) -> Weight:
        """The next rows of a weight."""
        if is_halved(name):
            if not self.waiting.get(name):
                whole = self._rows(name, 0, weight_shapes(self.checkpoint.config)[name][0])
                self.waiting[name] = list(halves(whole, self.checkpoint.config.head_dim))
            return self.waiting[name].pop(0)
        start = self.start.get(name, 0)
        self.start[name] = start + rows
        return self._rows(name, start, start + rows)

    def _rows(self, name: str, start: int, stop: int) -> Weight:
        if self.checkpoint.configs[name] is None:
            return self.checkpoint.rows(name, start, stop)
        return self.checkpoint.quantized(name, start, stop)


class _Mean(MeanByLinear):
    """RMSNorm with a mean: coremltools 9 fails at a product with one row and a sum behind it."""

    def mean(self, squares: Tensor) -> Tensor:
        return squares.mean(-1, keepdim=True)


class _HalvedMean(HalvedNorm):
    """The same for the norms of heads."""

    def share(self, squares: Tensor) -> Tensor:
        return 0.5 * squares.mean(-1, keepdim=True)


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.float(), requires_grad=False)


def write_linear(linear: Linear) -> int:
    """Let a linear multiply float activations by its integers; the bytes of its weight."""
    given = linear.given
    if not isinstance(given, QuantizedTensor):
        return 4 * given.numel()
    codes, scale = given.codes.contiguous(), given.scale.float().contiguous()
    kinds: Any = torch
    target = {4: kinds.int4, 8: kinds.int8}[given.config.bits]
    columns = codes.shape[1] // scale.shape[1]
    zeros = torch.zeros(scale.shape, dtype=torch.int8)
    value: Any = IntxUnpackedToInt8Tensor(codes, scale, zeros, target, (1, columns), torch.float32, None)
    linear.weight = nn.Parameter(value, requires_grad=False)
    return weight_bytes(given)


def weight_bytes(weight: QuantizedTensor) -> int:
    """Codes and float32 scales."""
    return weight.codes.numel() * weight.config.bits // 8 + 4 * weight.scale.numel()


def table(checkpoint: QuantizedCheckpoint) -> Embedding:
    """The embedding with its whole table: it stays outside the delegates, as in every program here."""
    config, quant = checkpoint.config, checkpoint.configs[TABLE]
    rows = config.vocab_size
    embedding = Embedding(config.hidden_size, quant)
    if quant is None:
        embedding.table = checkpoint.rows(TABLE, 0, rows)
        return embedding
    parts = packed_embedding(checkpoint.quantized(TABLE, 0, rows))
    embedding.table = parts[CODES].contiguous().view(embedding.get_buffer("table").dtype)
    scale = parts[SCALE].contiguous().view(torch.float32)
    embedding.scale = scale if scale.shape[1] > 1 else scale.view(rows)
    return embedding


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the converters print and log for their own authors. Exceptions come through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stderr(nowhere),
            contextlib.redirect_stdout(nowhere),
        ):
            yield
    finally:
        logging.disable(disabled)
