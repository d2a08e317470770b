"""Writes a safetensors file tensor by tensor and slice by slice; the library's own writer holds the whole file in memory.

Source: the format's description in the safetensors README: header length (u64), JSON header, data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.files import replacing

DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Spec:
    """One tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Callable[[], Iterator[Tensor]]  # gives consecutive slices along axis 0, of that dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def plain_spec(name: str, values: Tensor) -> Spec:
    """A tensor that is already in memory."""
    return Spec(name, values.dtype, tuple(values.shape), lambda: iter([values]))


def write_safetensors(path: Path, specs: Sequence[Spec], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors in the given order. An older file is replaced only by a complete one.

    Raises:
        RuntimeError: a tensor's slices do not add up to its shape.
    """
    text = _header(specs, metadata or {})
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            written = 0
            for part in spec.data():
                if part.dtype != spec.dtype:
                    raise RuntimeError(f"{spec.name}: a slice of {part.dtype} for a tensor of {spec.dtype}")
                written += file.write(part.contiguous().view(torch.uint8).numpy().data)
            if written != spec.nbytes:
                raise RuntimeError(f"{spec.name}: {written} bytes for {spec.nbytes}")


def _header(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    """The JSON header, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)
