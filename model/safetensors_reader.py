"""Reads safetensors files tensor by tensor and row by row, with plain reads into memory of the tensor's own.

The library's "pt" reader maps the whole file private and writable, which the system counts as memory: a file larger than RAM
could not be opened. Here a file is opened for each read and closed after it, so peak memory is the slice asked for.
Source: the format's description in the safetensors README, and its rules on offsets: no holes, no overlaps.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.reading import check_regular, parse_json

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


class SafetensorsFile:
    """A file by its path. Its header is kept, and read again when another file has taken its place."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            InputError: no regular file, damaged or truncated.
        """
        self.path = path
        self._seen: tuple[int, ...] = ()
        with self._open():
            pass

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """By name."""
        return self._header.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts in the header."""
        return self._header.metadata

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` along the first axis of a tensor in its stored dtype, in memory of their own.

        Raises:
            InputError: the file was damaged in the meantime, or holds the tensor no more or in a dtype that torch does not have.
        """
        with self._open() as file:
            entry = self.tensors.get(name)
            if entry is None or entry.dtype not in DTYPES:
                kind = "is missing" if entry is None else f"is {entry.dtype}; supported: {', '.join(DTYPES)}"
                raise InputError(f"{self.path}: tensor {name} {kind}")
            shape, begin, end = entry.shape, entry.start, entry.stop
            if shape:
                first, last, _ = slice(start, stop).indices(shape[0])
                row = (end - begin) // shape[0] if shape[0] else 0
                shape = (max(0, last - first), *shape[1:])
                begin, end = begin + first * row, begin + (first + shape[0]) * row
            out = torch.empty(end - begin, dtype=torch.uint8)
            self._fill(file, begin, out)
        return out.view(DTYPES[entry.dtype]).reshape(shape)

    def whole(self) -> dict[str, Tensor]:
        """Every tensor: for small files."""
        return {name: self.rows(name) for name in self.tensors}

    @contextmanager
    def _open(self) -> Iterator[FileIO]:
        """The open file, whose header is known."""
        check_regular(self.path, "download it again")  # before it is opened: opening a pipe would wait for ever
        try:
            with open(self.path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if seen != self._seen:
                    self._header = _read_header(file, status)
                    self._seen = seen
                yield file
        except (ValueError, OSError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path} is damaged or truncated ({error}); download it again") from None

    def _fill(self, file: FileIO, start: int, out: Tensor) -> None:
        view = out.numpy().data
        file.seek(start)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])  # 2 GiB at most, whatever was asked for
            if not count:
                raise ValueError("it ends early")
            done += count


class TensorFile(Protocol):
    """A file of tensors: safetensors, or GGUF (gguf/tensors.py)."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """By name."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `SafetensorsFile.rows`."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor by its place: a file, and its name there."""

    file: TensorFile
    name: str

    @property
    def entry(self) -> Entry:
        """Its type and shape."""
        return self.file.tensors[self.name]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """As `SafetensorsFile.rows`."""
        return self.file.rows(self.name, start, stop)


def _read_header(file: FileIO, status: os.stat_result) -> Header:
    """Raise ValueError unless all that is said fits together, and the file."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError("too short for a header")
    (size,) = struct.unpack("<Q", prefix)
    room = status.st_size - 8
    if size > min(HEADER_LIMIT, room):
        raise ValueError(f"a header of {size} bytes, at most {min(HEADER_LIMIT, room)} are possible")
    text = bytearray()
    while len(text) < size and (part := file.read(size - len(text))):
        text += part
    fields = parse_json(bytes(text), _unique)
    if not isinstance(fields, dict):
        raise ValueError("the header is not an object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata holds something else than texts")
    tensors = {name: _entry(name, value) for name, value in fields.items()}
    _check_offsets(tensors, room - size)
    base = 8 + size
    return Header(
        {name: Entry(e.dtype, e.shape, base + e.start, base + e.stop) for name, e in tensors.items()}, metadata
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return unique


def _entry(name: str, value: Any) -> Entry:
    """A tensor's own part of the header, with offsets as they stand there."""
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"no type, shape and offsets of {name}") from None
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"no type, shape and offsets of {name}")
    # the size of a type that torch does not have is unknown; nothing reads such a tensor
    if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {stop - start} bytes for {shape} of {dtype}")
    return Entry(dtype, tuple(shape), start, stop)


def _check_offsets(tensors: Mapping[str, Entry], room: int) -> None:
    """One tensor after the other from the first byte of the data to the last."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end or entry.stop < entry.start:
            raise ValueError(f"{name} lies at {entry.start} to {entry.stop}, expected at {end}")
        end = entry.stop
    if end != room:
        raise ValueError(f"tensors of {end} bytes in {room} bytes of data")
