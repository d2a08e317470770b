"""The `.pte` file: a composed program, whose constants are streamed from the quantized checkpoint.

Layout: header and flatbuffer, then segments: small constants and the embedding's table, the delegates, and each of their
constants by name. Where head and embedding read the same bytes of the table, the head's segments lie inside the table. Source:
executorch 1.5, exir/_serialize/_program.py, `serialize_pte_binary`, which needs everything in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program, _program_to_flatbuffer
from executorch.exir._serialize._program import (
    AlignedData,
    _ExtendedHeader,
    _extract_delegate_segments,
    _get_extended_header,
    _insert_flatbuffer_header,
)
from executorch.exir.program import ExecutorchProgramManager
from executorch.exir.schema import DataSegment, ExecutionPlan, KernelCall, NamedData, Program, SubsegmentOffsets
from executorch.exir.schema import Tensor as PlannedTensor
from torch import Tensor

from gemma_edge.export.executorch.packing import (
    CODES,
    SCALE,
    VALUES,
    Constant,
    constants,
    embedding_bytes,
    halves,
    is_halved,
    packed,
    packed_embedding,
    row_bytes,
    shares_table,
    slices,
)
from gemma_edge.model.checkpoint import TABLE
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint

ALIGNMENT = 128  # bytes that the offset of a segment, and so of every constant, is a multiple of
GATHERS = ("quantized_decomposed::embedding_byte", "quantized_decomposed::embedding_4bit", "aten::embedding")


@dataclass
class Segments:
    """The places behind the flatbuffer, in bytes from its end."""

    end: int = 0
    places: list[DataSegment] = field(default_factory=list)

    def take(self, size: int) -> int:
        """Reserve bytes behind everything that is there; return their offset."""
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.end = offset + size
        return offset

    def add(self, size: int, offset: int | None = None) -> int:
        """Add a segment and return its index. With an offset it lies inside another segment."""
        self.places.append(DataSegment(self.take(size) if offset is None else offset, size))
        return len(self.places) - 1


def write_pte(
    composed: ExecutorchProgramManager,
    checkpoint: QuantizedCheckpoint,
    path: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a composed program with the checkpoint's constants. `progress` is called with the bytes just written."""
    program, named = composed.executorch_program, composed._named_data
    assert named is not None, "delegates have constants"
    segments = Segments()
    small: dict[int, bytes] = {}  # offset -> bytes that are in memory
    table = _give_table(program, checkpoint)
    table_bytes = embedding_bytes(checkpoint.config, checkpoint.configs[TABLE])
    rooms: dict[str, int] = {}  # of the embedding's table, by part
    offsets = []
    for index, buffer in enumerate(program.constant_buffer):
        part = table.get(index)
        offsets.append(segments.take(len(buffer.storage) if part is None else table_bytes[part]))
        if part is None:
            small[offsets[-1]] = buffer.storage
        else:
            rooms[part] = offsets[-1]
    program.constant_buffer = []
    program.constant_segment = SubsegmentOffsets(segments.add(segments.end, 0), offsets)
    blobs: list[AlignedData | None] = [None]  # the library counts segments by this list's length
    _extract_delegate_segments(program, blobs)
    for blob in blobs[1:]:
        assert blob is not None
        index = segments.add(len(blob.data))
        small[segments.places[index].offset] = bytes(blob.data)
    places = place_constants(checkpoint, segments, rooms)
    by_key = {constant.key: index for constant, index in places.items()}
    for key, entry in named.pte_data.items():
        if key not in by_key:
            by_key[key] = segments.add(len(named.buffers[entry.buffer_index]))
            small[segments.places[by_key[key]].offset] = bytes(named.buffers[entry.buffer_index])
    if unknown := by_key.keys() ^ named.pte_data.keys():
        raise RuntimeError(f"{path.name}: constant {sorted(unknown)[0]} is written, and no delegate asks for it")
    program.named_data = [NamedData(key, index) for key, index in by_key.items()]
    program.segments = segments.places
    head = _header(program, segments.end)
    base = -(-len(head) // ALIGNMENT) * ALIGNMENT
    with path.open("wb") as file:
        file.write(head)
        for offset, data in small.items():
            file.seek(base + offset)
            file.write(data)
        where = {constant: base + segments.places[index].offset for constant, index in places.items()}
        for weight in checkpoint.configs:
            embedding = {part: base + offset for part, offset in rooms.items()} if weight == TABLE else {}
            _stream(file, checkpoint, weight, where, embedding, progress)
        file.truncate(base + segments.end)


def _give_table(program: Program, checkpoint: QuantizedCheckpoint) -> dict[int, str]:
    """Give the embedding's constants the table's number of rows: buffer index -> part.

    Raises:
        RuntimeError: the program does not gather from exactly one table.
    """
    quant, rows = checkpoint.configs[TABLE], checkpoint.config.vocab_size
    parts = (VALUES,) if quant is None else (CODES, SCALE)
    by_buffer: dict[int, str] = {}
    for plan in program.execution_plan:
        for call in calls(plan):
            if plan.operators[call.op_index].name in GATHERS:
                for part, value in zip(parts, call.args, strict=False):
                    tensor = plan.values[value].val
                    assert isinstance(tensor, PlannedTensor)
                    tensor.sizes[0] = rows
                    by_buffer[tensor.data_buffer_idx] = part
    if sorted(by_buffer.values()) != sorted(parts):
        raise RuntimeError(f"the embedding reads {sorted(by_buffer.values())}, expected {sorted(parts)}")
    return by_buffer


def calls(plan: ExecutionPlan) -> Iterator[KernelCall]:
    """Every operator that a method calls, in order."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            if isinstance(instruction.instr_args, KernelCall):
                yield instruction.instr_args


def place_constants(
    checkpoint: QuantizedCheckpoint, segments: Segments, embedding: Mapping[str, int]
) -> dict[Constant, int]:
    """A segment for every constant of the delegates: its index.

    Args:
        embedding: offset of the embedding's table, by part: the head's pieces lie inside where their bytes are the same.
    """
    config, quant = checkpoint.config, checkpoint.configs[checkpoint.config.head]
    rows, columns = config.vocab_size, config.hidden_size
    # the head's pieces lie side by side, so that they can be written as one
    head = (
        embedding
        if shares_table(config, quant)
        else {part: segments.take(rows * size) for part, size in row_bytes(quant, columns).items()}
    )
    places = {}
    for constant, size in constants(config, checkpoint.configs):
        offset = head[constant.part] + constant.piece * size if constant.weight == config.head else None
        places[constant] = segments.add(size, offset)
    return places


def _stream(
    file: BinaryIO,
    checkpoint: QuantizedCheckpoint,
    weight: str,
    where: Mapping[Constant, int],
    embedding: Mapping[str, int],
    progress: Callable[[int], None],
) -> None:
    """Write one weight's constants.

    Args:
        where: a constant's place in the file.
        embedding: the table's place in the file, by part, where `weight` is the table.
    """

    def put(place: int, values: Tensor, start: int) -> None:
        file.seek(place + start * values.shape[1])
        progress(file.write(values.numpy().data))

    # True if no linear reads the weight, or if the linears read the embedding's bytes
    config = checkpoint.config
    inside = bool(embedding) and (not config.tie_word_embeddings or shares_table(config, checkpoint.configs[weight]))
    for start, rows in slices(checkpoint, weight):
        pieces = halves(rows, checkpoint.config.head_dim) if is_halved(weight) else (rows,)
        for index, piece in enumerate(() if inside else pieces):
            for part, values in packed(piece).items():
                put(where[Constant(weight, part, index)], values, start)
        for part, values in packed_embedding(rows).items() if embedding else ():
            put(embedding[part], values, start)


def _header(program: Program, segments_bytes: int) -> bytes:
    """The file up to its segments, without the padding before them."""
    flatbuffer = _program_to_flatbuffer(program, constant_tensor_alignment=16, delegate_alignment=None)
    length = -(-_ExtendedHeader.EXPECTED_LENGTH // flatbuffer.max_alignment) * flatbuffer.max_alignment
    size = length + len(flatbuffer.data)
    header = _ExtendedHeader(size, -(-size // ALIGNMENT) * ALIGNMENT, segments_bytes).to_bytes()
    file: bytes = _insert_flatbuffer_header(flatbuffer.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", header.ljust(length, b"\0"))
    return file


@dataclass(frozen=True)
class Pte:
    """A `.pte` file read back: its program, and where its bytes are."""

    path: Path
    program: Program
    base: int  # of the segments

    @classmethod
    def open(cls, path: Path) -> Pte:
        """Read header and flatbuffer; no segment."""
        with path.open("rb") as file:
            header = _get_extended_header(file.read(_ExtendedHeader.NUM_HEAD_BYTES))
            assert header is not None, f"{path} has no extended header"
            file.seek(0)
            program = _flatbuffer_to_program(file.read(header.program_size))
        return cls(path, program, header.segment_base_offset)

    def segment(self, index: int) -> bytes:
        """A segment's bytes."""
        place = self.program.segments[index]
        with self.path.open("rb") as file:
            file.seek(self.base + place.offset)
            return file.read(place.size)

    def constant(self, key: str) -> bytes:
        """A delegate's constant by its key."""
        return self.segment(next(entry.segment_index for entry in self.program.named_data or [] if entry.key == key))
