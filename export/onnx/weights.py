"""The weights file of an ONNX bundle: its layout, and its bytes, streamed from a quantized checkpoint.

The layout depends on shapes and the recipe alone, so the file's size is known before any work. Source of the packing:
ONNX Runtime's MatMulNBits and GatherBlockQuantized (codes stored plus 2^(bits-1), the even column in the low nibble).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import HEAD, TABLE, Weights, norm_sizes, row_slices, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.checkpoint.kv_scales import KINDS, scale_name
from gemma_edge.quantize.checkpoint.packing import pack_bytes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.checkpoint.writer import narrow
from gemma_edge.quantize.recipe import QuantConfig

ALIGNMENT = 4096  # a page, so that every tensor can be mapped
BLOCK_SIZES = (256, 128, 64, 32, 16)  # block sizes that the kernels know, the best first
# HEAD_PACKED: a head's codes in the three-dimensional shape that MatMulNBits reads; those of a tied head are the table's bytes
HEAD_PACKED = f"{HEAD}.weight_packed"


def block_size(config: QuantConfig, in_features: int) -> int:
    """The kernel's block: the largest that divides the group; the group's scale is repeated for each of its blocks.

    Raises:
        InputError: no block divides the row.
    """
    group = config.group_size or in_features
    for block in BLOCK_SIZES:
        if group % block == 0:
            return block
    raise InputError(
        f"rows of {in_features} are not a multiple of {BLOCK_SIZES[-1]}, which ONNX Runtime needs; use `bits` 16",
        field="bits",
    )


@dataclass(frozen=True)
class Blob:
    """One tensor of the weights file."""

    name: str  # name of the graph's initializer
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def layout(
    config: GemmaConfig,
    configs: Mapping[str, QuantConfig | None],
    dtypes: Mapping[str, torch.dtype],
    *,
    int8_kv: bool = False,
) -> list[Blob]:
    """Every tensor of the file, in order.

    Args:
        configs: integers of each weight, None = float.
        dtypes: how the float weights are stored.
        int8_kv: with the scales of an int8 KV cache.
    """
    blobs: list[Blob] = []
    end = 0

    def add(name: str, dtype: torch.dtype, *shape: int) -> None:
        nonlocal end
        blobs.append(Blob(name, dtype, shape, -(-end // ALIGNMENT) * ALIGNMENT))
        end = blobs[-1].offset + blobs[-1].nbytes

    for weight, (rows, columns) in weight_shapes(config).items():
        quant = configs[weight]
        if quant is None:
            add(f"{weight}.weight", dtypes[weight], rows, columns)
            continue
        block = block_size(quant, columns)
        blocks = columns // block
        packed = (columns * quant.bits // 8,) if weight == TABLE else (blocks, block * quant.bits // 8)
        add(f"{weight}.weight_packed", torch.uint8, rows, *packed)
        add(f"{weight}.weight_scale", torch.float32, rows, blocks)
    for name, size in norm_sizes(config).items():
        add(name, torch.float32, size)
    if int8_kv:
        for layer in range(config.num_hidden_layers):
            for kind in KINDS:
                add(scale_name(layer, kind), torch.float32, 1, config.num_key_value_heads, 1, config.head_dim)
    return blobs


def file_bytes(blobs: list[Blob]) -> int:
    """Size of the weights file."""
    return blobs[-1].offset + blobs[-1].nbytes


def matrix_bytes(config: GemmaConfig, configs: Mapping[str, QuantConfig]) -> dict[str, int]:
    """Bytes of the file that each matrix takes, including the gaps behind its tensors. They do not depend on other matrices."""
    taken = dict.fromkeys(configs, 0)
    for blob in layout(config, configs, {}):
        weight = blob.name.rpartition(".")[0]
        if weight in taken:
            taken[weight] += -(-blob.nbytes // ALIGNMENT) * ALIGNMENT
    return taken


def float_dtypes(source: Weights, configs: Mapping[str, QuantConfig | None], float_bits: int) -> dict[str, torch.dtype]:
    """How each unquantized matrix is stored: float32, or the checkpoint's own 16-bit type (bfloat16 for float32)."""
    names = [name for name, config in configs.items() if config is None]
    if float_bits == 32:
        return dict.fromkeys(names, torch.float32)
    return {name: narrow(source.dtype(name)) for name in names}


def weights_bytes(
    source: Weights,
    configs: Mapping[str, QuantConfig | None],
    float_bits: int,
    *,
    int8_kv: bool = False,
) -> int:
    """Size of the weights file, before any work."""
    return file_bytes(blobs_of(source, configs, float_bits, int8_kv=int8_kv))


def resident_bytes(blobs: list[Blob]) -> int:
    """What ONNX Runtime keeps of the weights in memory, measured: codes packed once; scales three times (mapped, packed, and
    as block sums); float matrices widened to float32.
    """
    total = 0
    for blob in blobs:
        if blob.name.endswith(".weight_scale"):
            total += 3 * blob.nbytes
        elif blob.dtype == torch.uint8:
            total += blob.nbytes
        else:
            total += 4 * prod(blob.shape)
    return total


def blobs_of(
    source: Weights,
    configs: Mapping[str, QuantConfig | None],
    float_bits: int,
    *,
    int8_kv: bool = False,
) -> list[Blob]:
    """The weights file of a checkpoint, float or quantized already, under a recipe's configurations."""
    return layout(source.config, configs, float_dtypes(source, configs, float_bits), int8_kv=int8_kv)


def write_weights(
    checkpoint: QuantizedCheckpoint, blobs: list[Blob], path: Path, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Write the file of `layout`. `progress` is called with the bytes just written.

    Raises:
        RuntimeError: the checkpoint's slices do not fill a tensor exactly.
    """
    with path.open("wb") as file:
        for blob, parts in _contents(checkpoint, blobs):
            file.seek(blob.offset)  # the gap before it reads as zeros
            for part in parts:
                if part.dtype != blob.dtype:
                    raise RuntimeError(f"{blob.name}: a slice of {part.dtype} for a tensor of {blob.dtype}")
                progress(file.write(part.contiguous().view(torch.uint8).numpy().data))
            if file.tell() != blob.offset + blob.nbytes:
                raise RuntimeError(f"{blob.name}: {file.tell() - blob.offset} bytes for {blob.nbytes}")


def _contents(checkpoint: QuantizedCheckpoint, blobs: list[Blob]) -> Iterator[tuple[Blob, Iterator[Tensor]]]:
    scale = torch.empty(0)  # of the packed weight just written: its scales follow it, kept in one piece (see store.py)
    by_name = {blob.name: blob for blob in blobs}
    kv_scales = {
        scale_name(layer, kind): values
        for layer, pair in (checkpoint.kv_scales or {}).items()
        for kind, values in zip(KINDS, pair, strict=True)
    }
    for blob in blobs:
        weight, _, part = blob.name.rpartition(".")
        if part == "weight_packed":
            scale = torch.empty(by_name[f"{weight}.weight_scale"].shape)
            yield blob, _packed(checkpoint, weight, blob, scale)
        elif part == "weight_scale":
            yield blob, iter([scale])
        elif weight in checkpoint.configs:
            yield blob, _plain(checkpoint, weight, blob)
        elif part in KINDS:
            yield blob, iter([kv_scales[blob.name]])
        else:
            yield blob, iter([1.0 + checkpoint.vector(blob.name)])  # RMSNormalization multiplies, Gemma's norm by 1 + w


def _packed(checkpoint: QuantizedCheckpoint, weight: str, blob: Blob, scale: Tensor) -> Iterator[Tensor]:
    """Slices of the packed codes; the scales, repeated per block, are left in `scale`."""
    shape, config = weight_shapes(checkpoint.config)[weight], checkpoint.configs[weight]
    assert config is not None
    repeat = (config.group_size or shape[1]) // block_size(config, shape[1])
    for start, stop in row_slices(shape):
        part = checkpoint.quantized(weight, start, stop)
        scale[start:stop] = part.scale.float().repeat_interleave(repeat, dim=1)
        yield pack_bytes(part.codes, config.bits).view(stop - start, *blob.shape[1:])


def _plain(checkpoint: QuantizedCheckpoint, weight: str, blob: Blob) -> Iterator[Tensor]:
    for start, stop in row_slices((blob.shape[0], blob.shape[1])):
        yield checkpoint.rows(weight, start, stop).to(blob.dtype)
