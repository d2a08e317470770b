"""What a `.pte` file of a bundle may hold. ExecuTorch takes some offsets, indices and texts unchecked, which can end the process.

Source: ExecuTorch's schema/program.fbs and schema/extended_header.h.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path

from gemma_edge.runtimes.engines.structure.flatbuffer import Damaged, Schema, Verifier

IDENTIFIER, HEADER = b"ET12", b"eh00"
IN_SEGMENT = 1  # DataLocation.SEGMENT
SCHEMA: Schema = {
    "Program": (
        *("4", "[ExecutionPlan]", "[Buffer]", "[Buffer]", "[DataSegment]", "Subsegments", "[Subsegments]"),
        "[NamedData]",
    ),
    "ExecutionPlan": (
        *("s", "Container", "[EValue]", "[4]<EValue", "[4]<EValue", "[Chain]", "[Operator]", "[BackendDelegate]"),
        *("[8]", "[Device]"),
    ),
    "Container": ("s", "s"),
    "EValue": ("1", "?0"),
    "Int": ("8",),
    "Bool": ("1",),
    "Tensor": ("1", "4", "[4]", "[1]", "1", "4", "Allocation", "1", "1", "Extra"),
    "Allocation": ("4", "4", "4"),
    "Extra": ("8", "s", "1", "1", "1"),
    "String": ("s",),
    "Longs": ("[8]",),
    "Bools": ("[1]",),
    "Indices": ("[4]",),
    "Chain": ("[4]<EValue", "[4]<EValue", "[Instruction]", "[FrameList]"),
    "Instruction": ("1", "?0"),
    "KernelCall": ("4<Operator", "[4]<EValue"),
    "DelegateCall": ("4<BackendDelegate", "[4]<EValue"),
    "MoveCall": ("4<EValue", "4<EValue"),
    "JumpFalseCall": ("4<EValue", "4<Instruction"),
    "FreeCall": ("4<EValue",),
    "FrameList": ("[Frame]",),
    "Frame": ("s", "4", "s", "s"),
    "Operator": ("s", "s"),
    "BackendDelegate": ("s", "Reference", "[CompileSpec]"),
    "Reference": ("1", "4"),
    "CompileSpec": ("s", "[1]"),
    "Device": ("4", "1", "1"),
    "Buffer": ("[1]",),
    "DataSegment": ("8", "8"),
    "Subsegments": ("4", "[8]"),
    "NamedData": ("s", "4<DataSegment"),
    "nothing": (),
}
_VALUES = ("nothing", "Int", "Bool", "Int", "Tensor", "String", "Longs", "Longs", "Bools", "Indices", "Indices")
_CALLS = ("KernelCall", "DelegateCall", "MoveCall", "JumpFalseCall", "FreeCall")
UNIONS = {"EValue.1": dict(enumerate(_VALUES, 1)), "Instruction.1": dict(enumerate(_CALLS, 1))}


class _Program(Verifier):
    def __init__(self, data: mmap, size: int, segments: int) -> None:
        super().__init__(data, SCHEMA, UNIONS)
        self._size, self._segments = size, segments  # bytes of the flatbuffer, and of the segments behind it

    def check_table(self, name: str, numbers: Mapping[int, int]) -> None:
        """Segments must end inside the file, and delegates must name segments that exist."""
        if name == "DataSegment" and numbers.get(0, 0) + numbers.get(1, 0) > self._segments:
            raise Damaged("a segment lies behind the end of the file")
        in_segment = name == "Reference" and numbers.get(0) == IN_SEGMENT
        if in_segment and numbers.get(1, 0) >= self._counts.get("DataSegment", 0):
            raise Damaged("a delegate names a segment that is not there")


def check_program(path: Path) -> None:
    """Follow every offset and index of a program.

    Raises:
        Damaged: one leads nowhere.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        if len(data) < 40 or data[4:8] != IDENTIFIER or data[8:12] != HEADER:
            raise Damaged("it is not an ExecuTorch program")
        length, size, base = struct.unpack("<IQQ", data[12:32])
        if not (length >= 24 and 40 <= size <= base <= len(data)):
            raise Damaged("its header does not fit its size")
        _Program(data, size, len(data) - base).check("Program")
