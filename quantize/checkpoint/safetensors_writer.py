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
    data: Callable[[], Iterator[Tensor]]  # consecutive slices along axis 0, of that dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, specs: Sequence[Spec], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors in the order given.

    Raises:
        RuntimeError: a tensor's slices do not add up to its shape.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            written = 0
            for part in spec.data():
                if part.dtype != spec.dtype:
                    raise RuntimeError(f"{spec.name}: a slice of {part.dtype} for a tensor of {spec.dtype}")
                written += file.write(part.contiguous().view(torch.uint8).numpy().data)
            if written != spec.nbytes:
                raise RuntimeError(f"{spec.name}: {written} bytes for {spec.nbytes}")


def replace_safetensors(path: Path, specs: Sequence[Spec], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file beside `path` and rename it: whatever happens, there is the old one or the new one, and nothing else."""
    written = path.with_suffix(".partial")
    try:
        write_safetensors(written, specs, metadata)
        written.rename(path)
    finally:
        written.unlink(missing_ok=True)
