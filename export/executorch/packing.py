"""A weight as the bytes that XNNPACK's delegates and ExecuTorch's embedding operators read, and the keys of these bytes.

Source: executorch 1.5, backends/xnnpack/operators/node_visitor.py (`get_serialized_buffer_index`, `get_quant_params`) and
exir/passes/_quant_patterns_and_replacements.py (`embedding_4bit`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_edge.model.checkpoint import TABLE, TABLES, row_slices, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.checkpoint.packing import pack_bytes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.integers import QuantizedTensor
from gemma_edge.quantize.recipe import QuantConfig

HALVED = ("q_proj", "k_proj")  # linears whose output is rotated: their rows come as two halves of every head
LARGEST_PIECE = 1 << 28  # weights that are lowered at once; a quarter of the 2B model's table has 147 million
CODES, SCALE, VALUES = "codes", "scale", "values"  # parts of a weight; VALUES of a float one
Weight = Tensor | QuantizedTensor


@dataclass(frozen=True)
class Constant:
    """One constant of a delegate."""

    weight: str  # as in the checkpoint, without `.weight`
    part: str  # CODES, SCALE or VALUES
    piece: int = 0  # index of the piece, below `pieces_of` the weight

    @property
    def key(self) -> str:
        """The key that a delegate looks it up by. It is as long as the library's own key, a hash of the bytes."""
        name = hashlib.sha256(f"{self.weight}/{self.part}/{self.piece}".encode()).hexdigest()
        return f"scale_{name}" if self.part == SCALE else name


def is_halved(weight: str) -> bool:
    """Whether a weight's pieces are the first and the second half of every head; the pieces of others are consecutive rows."""
    return weight.rpartition(".")[2] in HALVED


def pieces_of(weight: str, shape: tuple[int, int]) -> int:
    """How many linears a weight becomes: two if its output is rotated, several of equal size for a large head, else one."""
    if is_halved(weight):
        return 2
    rows, columns = shape
    if weight not in TABLES or rows * columns <= LARGEST_PIECE:
        return 1
    # in steps of 16 rows, so that pieces of one part lie side by side, each aligned for XNNPACK
    counts = (count for count in range(2, rows // 16 + 1) if rows % (16 * count) == 0)
    return next((count for count in counts if rows // count * columns <= LARGEST_PIECE), 1)


def random_weight(config: QuantConfig | None, rows: int, columns: int, generator: torch.Generator) -> Weight:
    """Some weight of a kind, different from every other one."""
    if config is None:
        return torch.randn(rows, columns, generator=generator)
    groups = columns // config.group_size if config.group_size else 1
    limit = 7 if config.bits == 4 else 127
    codes = torch.randint(-limit, limit + 1, (rows, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    return QuantizedTensor(codes, scale.to(torch.bfloat16), config)


def packed(weight: Weight) -> dict[str, Tensor]:
    """The constants of some rows of a linear: part -> (rows, bytes) uint8."""
    if isinstance(weight, Tensor):
        return {VALUES: _bytes(weight.float())}
    four = weight.config.bits == 4
    codes = pack_bytes(weight.codes, 4) if four else weight.codes
    # XNNPACK takes the scales of groups in bfloat16, those of whole channels in float32; a 4-bit channel is one group to it
    scale = weight.scale.to(torch.bfloat16) if four else weight.scale.float()
    return {CODES: _bytes(codes), SCALE: _bytes(scale)}


def packed_embedding(weight: Weight) -> dict[str, Tensor]:
    """The constants of some rows of the table as an embedding operator reads them: part -> (rows, bytes) uint8."""
    if isinstance(weight, QuantizedTensor) and weight.config.bits == 4:
        codes = pack_bytes(weight.codes, 4)
        codes = codes << 4 | codes >> 4  # the even column in the high nibble
        return {CODES: codes, SCALE: _bytes(weight.scale.float())}
    return packed(weight)


def shares_table(config: GemmaConfig, quant: QuantConfig | None) -> bool:
    """Whether embedding and head read the same bytes; `quant` is the table's."""
    return config.tie_word_embeddings and (quant is None or quant.bits == 8)


def row_bytes(config: QuantConfig | None, columns: int, *, embedding: bool = False) -> dict[str, int]:
    """Bytes of one row of a weight, by part."""
    if config is None:
        return {VALUES: 4 * columns}
    groups = columns // config.group_size if config.group_size else 1
    four = config.bits == 4
    return {CODES: columns * config.bits // 8, SCALE: groups * (2 if four and not embedding else 4)}


def slices(checkpoint: QuantizedCheckpoint, weight: str) -> Iterator[tuple[int, Weight]]:
    """A weight's rows from the checkpoint, (first row, rows) at a time; one that is halved in one piece."""
    shape = weight_shapes(checkpoint.config)[weight]
    for start, stop in [(0, shape[0])] if is_halved(weight) else row_slices(shape):
        if checkpoint.configs[weight] is None:
            yield start, checkpoint.rows(weight, start, stop)
        else:
            yield start, checkpoint.quantized(weight, start, stop)


def halves(weight: Weight, head_dim: int) -> tuple[Weight, Weight]:
    """The rows of the first and of the second half of every head."""

    def rows(values: Tensor, half: int) -> Tensor:
        heads = values.view(-1, 2, head_dim // 2, values.shape[1])  # (heads, 2, D/2, columns)
        return heads[:, half].reshape(-1, values.shape[1])

    if isinstance(weight, Tensor):
        return rows(weight, 0), rows(weight, 1)
    codes, scale = weight.codes, weight.scale
    first, second = (QuantizedTensor(rows(codes, half), rows(scale, half), weight.config) for half in (0, 1))
    return first, second


def constants(config: GemmaConfig, configs: Mapping[str, QuantConfig | None]) -> Iterator[tuple[Constant, int]]:
    """Every constant of the delegates with its bytes; the pieces of one part of a weight follow each other."""
    for weight, (rows, columns) in weight_shapes(config).items():
        if weight == TABLE and not config.tie_word_embeddings:
            continue  # only the embedding reads it
        count = pieces_of(weight, (rows, columns))
        for part, size in row_bytes(configs[weight], columns).items():
            for piece in range(count):
                yield Constant(weight, part, piece), rows // count * size


def embedding_bytes(config: GemmaConfig, quant: QuantConfig | None) -> dict[str, int]:
    """Bytes of the table as the embedding reads it, by part."""
    rows, columns = config.vocab_size, config.hidden_size
    return {part: rows * size for part, size in row_bytes(quant, columns, embedding=True).items()}


def weights_bytes(config: GemmaConfig, configs: Mapping[str, QuantConfig | None]) -> int:
    """Bytes that the weights take of the file. A table counts once if embedding and head read the same bytes of it."""
    total = sum(size for _, size in constants(config, configs))
    quant = configs[TABLE]
    return total if shares_table(config, quant) else total + sum(embedding_bytes(config, quant).values())


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).view(len(values), -1)
